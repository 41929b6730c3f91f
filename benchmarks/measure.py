"""What all figures share: sizes, interleaved timing, peak memory, and captions with the published lengths."""

import gc
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
    """Device and size of the measurements.

    Attributes:
        device: device of all figures.
        quick: use the smallest sizes.
        folder: folder for generated data.
        repeats: number of runs of each side, of which the fastest counts.
    """

    device: torch.device
    quick: bool
    folder: Path
    repeats: int = 2

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, quick: object, cpu: object, gpu: object) -> object:
        """Returns the size for this setting."""
        return quick if self.quick else gpu if self.on_gpu else cpu


@dataclass
class Figure:
    """The results of one figure.

    Attributes:
        name: key in the JSON file.
        title: one line that says what is measured, and at which size.
        ratios: name -> baseline over ours: ``time_ratio`` and others.
        facts: name -> further number.
    """

    name: str
    title: str
    ratios: dict[str, float]
    facts: dict[str, object] = field(default_factory=dict)


def fastest(sides: dict[str, Callable[[], object]], setting: Setting) -> dict[str, float]:
    """Returns the seconds of the fastest run of each side.

    The sides take turns, so that other load on the machine affects them alike. There is no warm-up here: the check that
    both sides give the same result runs first.
    """
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(setting.repeats):
        for name, work in sides.items():
            synchronize(setting)
            start = time.perf_counter()
            work()
            synchronize(setting)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def largest_that_fits(work: Callable[[int], Figure], size: int) -> Figure:
    """Calls `work` with `size`, and with half of it again and again as long as a GPU runs out of memory.

    Raises:
        torch.OutOfMemoryError: not even size 1 fits.
    """
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(setting: Setting) -> None:
    """Waits for the device."""
    if setting.on_gpu:
        torch.cuda.synchronize(setting.device)


def peak_bytes(work: Callable[[], object], setting: Setting) -> int:
    """Returns the peak number of bytes that `work` allocates, in addition to those allocated before.

    On CUDA, the allocator counts them. On the CPU, this is the peak of the running sum of all allocations and frees of
    torch's CPU allocator, as recorded by torch's profiler; it includes temporaries inside operators.
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


def matrix_rate(setting: Setting, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product."""
    size = setting.pick(256, 2048, 8192)
    a = torch.randn(size, size, device=setting.device, dtype=dtype)
    a @ a
    return 2 * size**3 / fastest({"product": lambda: a @ a}, setting)["product"]


def reference_captions(num_images: int, num_long: int, num_corners: int = 2) -> tuple[torch.Tensor, ...]:
    """Draws random captions with the lengths of the published data; every call gives the same ones.

    Raw captions have about 18 tokens. Long ones have 121 +- 40 and are cut to the context, which leaves about 110.

    Returns:
        Token ids [num_images, 128] of raw captions and [num_images, num_long, 128] of long ones, padded with 0.
    """
    stream = torch.Generator().manual_seed(0)

    def draw(count: int, mean: float, spread: float, shortest: int) -> torch.Tensor:
        lengths = (mean + spread * torch.randn(count, generator=stream)).round().clamp(shortest, CONTEXT_LENGTH).long()
        ids = torch.randint(1000, VOCABULARY, (count, CONTEXT_LENGTH), generator=stream)
        ids[:, 0] = CLS
        ids[:, 1 : 1 + num_corners] = VOCABULARY + torch.arange(num_corners)
        ids[torch.arange(count), lengths - 1] = SEP
        return ids.masked_fill(torch.arange(CONTEXT_LENGTH) >= lengths[:, None], 0)

    short = draw(num_images, RAW_TOKENS, RAW_SPREAD, 8)
    return short, draw(num_images * num_long, LONG_TOKENS, LONG_SPREAD, 20).unflatten(0, (num_images, num_long))


def as_photograph(content: bytes, size: tuple[int, int]) -> bytes:
    """Enlarges an image file to (width, height); grain makes the JPEG as large as a photograph with as many pixels."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = np.random.default_rng(len(content)).normal(0, 6, (size[1], size[0], 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def check_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Checks that both sides of a figure give the same result.

    Raises:
        AssertionError: they differ by more than `tolerance` times the largest value.
    """
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error <= tolerance:
        raise AssertionError(f"{name}: ours and the baseline differ by {error:.2e} of the largest value")


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """Returns all gradients of a model in one vector, and removes them from the model."""
    whole = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return whole
