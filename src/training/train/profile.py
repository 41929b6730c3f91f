"""How well a training uses the GPU: FLOPs of the model, and a profile of a few steps."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from training.runtime.gpus import GPUS
from training.runtime.messages import first_line

WARM_UP, RECORDED, ROWS = 10, 5, 10
logger = logging.getLogger(__name__)


class StepProfile:
    """Records steps 11 to 15 of this process, without overhead afterwards; a context manager.

    Args:
        folder: folder for ``trace.json.gz`` (for ui.perfetto.dev) and ``table.txt``.
        device: device of the model.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        stages = schedule(skip_first=WARM_UP - 2, wait=0, warmup=2, active=RECORDED, repeat=1)
        self.profiler = profile(activities=activities, schedule=stages, on_trace_ready=self._write)
        self.is_written = False

    def __enter__(self) -> "StepProfile":
        self.profiler.start()
        return self

    def step(self) -> None:
        """Marks the end of a step."""
        if not self.is_written:
            self.profiler.step()

    def __exit__(self, *_: object) -> None:
        self.profiler.stop()  # writes what has been recorded so far
        if not self.is_written:
            logger.warning(
                f"--profile {self.folder}: nothing recorded, because training ended before step {WARM_UP + 1}"
            )

    def _write(self, profiler: profile) -> None:
        self.is_written = True
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "table.txt").write_text(table)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        logger.info(f"profile of up to {RECORDED} steps, with a trace for ui.perfetto.dev in {self.folder}:\n{table}")


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a training step; padding and recomputation do not count.

    Attributes:
        per_image, per_token: FLOPs of the forward pass and, for trained parts, of the backward pass.
        peak: FLOP/s of the device.
    """

    per_image: float
    per_token: float
    peak: float

    def utilisation(self, num_images: int, num_tokens: int, seconds: float) -> float:
        """Returns the fraction of the peak that was used to process these images and tokens in one process."""
        return (num_images * self.per_image + num_tokens * self.per_token) / seconds / self.peak


def peak_of(device_name: str, is_16_bit: bool) -> float | None:
    """Returns a device's peak FLOP/s, half of it for fp32, which is computed in TF32; None if it is not in `GPUS`."""
    peak = next((peak for name, (peak, _) in GPUS.items() if name in device_name), None)
    return peak and peak * (1.0 if is_16_bit else 0.5)


def count_model(
    model: Any, tokenizer: Callable, device: torch.device, precision: str, features_are_cached: bool
) -> ModelFlops | None:
    """Counts a model's FLOPs on its device, before it is compiled.

    Returns:
        The FLOPs; None if the device's peak is unknown, or, with a warning, if they can't be counted.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_of(name, "16" in precision or precision == "amp")
    if peak is None:
        return None
    try:
        ids = tokenizer(["word " * 512])[:1].to(device)
        size = None if features_are_cached else model.visual.preprocess_cfg["size"]
        return ModelFlops(*count_flops(model, size, ids), peak)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        logger.warning(f"FLOPs of this model are not counted, so no utilisation is logged ({first_line(error)})")
        return None


def count_flops(model: Any, size: tuple[int, int] | None, ids: torch.Tensor) -> tuple[float, float]:
    """Counts FLOPs per image and per token of a two-tower model, before it is compiled.

    Args:
        model: a model in eval mode; only its gradients change, which are set to None.
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
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not support the fused layers of evaluation
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # nor all fused attention kernels
            output = compute()
            if output.requires_grad:
                output.sum().backward()
        return float(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
