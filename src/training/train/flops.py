"""FLOPs that a model needs per image and per token, and what share of the GPU's peak a training makes of it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.runtime.messages import first_line

# Matrix products in 16 bits without sparsity, FLOP/s, from the vendor's data sheets; the first name that fits counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFlops:
    """What a training step has to compute; padding and recomputation do not count.

    Attributes:
        per_image, per_token: forward and, where something is trained, backward.
        peak: FLOP/s of the device.
    """

    per_image: float
    per_token: float
    peak: float

    def utilisation(self, num_images: int, num_tokens: int, seconds: float) -> float:
        """Returns the share of the peak that was used for so many images and tokens of one process."""
        return (num_images * self.per_image + num_tokens * self.per_token) / seconds / self.peak


def peak_of(device_name: str, is_16_bit: bool) -> float | None:
    """Returns a device's peak in FLOP/s; TF32, which fp32 is computed in, has half of it. None: not in the table."""
    peak = next((peak for name, peak in PEAKS.items() if name in device_name), None)
    return peak and peak * (1.0 if is_16_bit else 0.5)


def count_model(
    model: torch.nn.Module, tokenizer: Callable, device: torch.device, precision: str, features_are_cached: bool
) -> ModelFlops | None:
    """Returns what a model computes, counted on its device before it is compiled; None where the peak is unknown.

    A model that can't be counted is no reason not to train it: a warning says why.
    """
    peak = (
        peak_of(torch.cuda.get_device_name(device), "16" in precision or precision == "amp")
        if device.type == "cuda"
        else None
    )
    if peak is None:
        return None
    try:
        ids = tokenizer(["word " * 512])[:1].to(device)
        size = None if features_are_cached else model.visual.preprocess_cfg["size"]
        return ModelFlops(*count_flops(model, size, ids), peak)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        logger.warning(f"FLOPs of this model are not counted, so no utilisation is logged ({first_line(error)})")
        return None


def count_flops(model: torch.nn.Module, size: tuple[int, int] | None, ids: torch.Tensor) -> tuple[float, float]:
    """Counts FLOPs per image and per token of a two-tower model, before it is compiled.

    Args:
        model: in eval mode; its gradients are dropped, nothing else changes.
        size: (height, width) of images; None if their features are cached.
        ids: [captions, length], without padding.
    """
    image = 0.0
    if size:
        pixels = torch.zeros(1, 3, *size, device=ids.device)
        image = _count(lambda: model.encode_image(pixels))
    text = _count(lambda: model.encode_text(ids)) / ids.numel()
    model.zero_grad(set_to_none=True)
    return image, text


def _count(compute: Callable[[], torch.Tensor]) -> float:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know the fused layers of evaluation
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # nor every fused attention
            output = compute()
            if output.requires_grad:
                output.sum().backward()
        return float(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
