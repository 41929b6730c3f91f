"""What all figures share: sizes, timing in turns, peak memory, the caption lengths of the published data."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

CONTEXT_LENGTH, VOCABULARY, CLS, SEP = 128, 30522, 101, 102
RAW_TOKENS, RAW_SPREAD, LONG_TOKENS, LONG_SPREAD = 18, 5, 121, 40


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: of all figures.
        quick: the smallest sizes.
        folder: for data that figures make.
        repeats: runs of each side, in turns; the fastest counts.
    """

    device: torch.device
    quick: bool
    folder: Path
    repeats: int = 2

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, quick: object, cpu: object, gpu: object) -> object:
        """The size for this setting."""
        return quick if self.quick else gpu if self.on_gpu else cpu


@dataclass
class Figure:
    """What one figure found.

    Attributes:
        name: key in the JSON file.
        title: one line: what is measured, and at which size.
        ratios: baseline over ours; ``time_ratio`` and others.
        facts: further numbers, by name.
    """

    name: str
    title: str
    ratios: dict[str, float]
    facts: dict[str, object] = field(default_factory=dict)


def fastest(sides: dict[str, Callable[[], object]], setting: Setting) -> dict[str, float]:
    """Seconds of the fastest run of each side; sides take turns, so that a busy machine hits them alike. The check that
    both give the same has warmed them up."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(setting.repeats):
        for name, work in sides.items():
            synchronize(setting)
            start = time.perf_counter()
            work()
            synchronize(setting)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def synchronize(setting: Setting) -> None:
    """Waits for the device."""
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)


def peak_bytes(work: Callable[[], object], setting: Setting) -> int:
    """Most bytes that `work` holds at once, beyond those held before.

    On CUDA as its allocator counts them; on the CPU the running sum of all allocations and frees that torch's profiler
    records from torch's CPU allocator, temporaries inside operators included.
    """
    if setting.on_gpu:
        before = torch.cuda.memory_allocated(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
        work()
        return torch.cuda.max_memory_allocated(setting.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def matrix_rate(setting: Setting) -> float:
    """FLOP/s of one large matrix product: bf16 on a GPU, fp32 on the CPU."""
    size = setting.pick(1024, 2048, 8192)
    a = torch.randn(size, size, device=setting.device, dtype=torch.bfloat16 if setting.on_gpu else torch.float32)
    a @ a
    return 2 * size**3 / fastest({"product": lambda: a @ a}, setting)["product"]


def reference_captions(num_images: int, num_long: int, num_corners: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random captions with the lengths of the published data: raw ones of about 18 tokens, long ones of about 136
    which the context cuts to about 110 on average.

    Returns:
        Token ids [num_images, 128] of raw captions and [num_images, num_long, 128] of long ones, padded with 0.
    """
    stream = torch.Generator().manual_seed(seed)

    def draw(count: int, mean: float, spread: float, shortest: int) -> torch.Tensor:
        lengths = (mean + spread * torch.randn(count, generator=stream)).round().clamp(shortest, CONTEXT_LENGTH).long()
        ids = torch.randint(1000, VOCABULARY, (count, CONTEXT_LENGTH), generator=stream)
        ids[:, 0] = CLS
        ids[:, 1 : 1 + num_corners] = VOCABULARY + torch.arange(num_corners)
        ids[torch.arange(count), lengths - 1] = SEP
        return ids.masked_fill(torch.arange(CONTEXT_LENGTH) >= lengths[:, None], 0)

    short = draw(num_images, RAW_TOKENS, RAW_SPREAD, 8)
    return short, draw(num_images * num_long, LONG_TOKENS, LONG_SPREAD, 20).unflatten(0, (num_images, num_long))


def as_photograph(picture: bytes, size: tuple[int, int]) -> bytes:
    """Enlarges a picture to (width, height); grain makes the JPEG as large for its pixels as a photograph's."""
    with Image.open(io.BytesIO(picture)) as image:
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(len(picture)).normal(0, 6, (size[1], size[0], 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def check_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Both sides must give the same before they are timed.

    Raises:
        AssertionError: they do not.
    """
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error <= tolerance:
        raise AssertionError(f"{name}: ours and the baseline differ by {error:.2e} of the largest value")


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients of a model in one vector; zeros them."""
    whole = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return whole
