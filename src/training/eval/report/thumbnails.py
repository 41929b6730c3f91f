"""Small pictures for the page, as large as a budget of bytes allows."""

import io
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dataloaders.files import NUM_THREADS, ShardMember
from dataloaders.images import BrokenImageError, load_rgb

# Longest side in pixels and WebP quality, from what looks good on a phone down to what still tells scenes apart.
STEPS = ((160, 60), (128, 55), (112, 50), (96, 45), (80, 40), (64, 40), (56, 35), (48, 30), (40, 20))
SAMPLE = 48


def make_thumbnails(paths: Sequence[Path | ShardMember], budget: int) -> list[bytes]:
    """Makes a WebP picture of each image, at the largest step at which all together stay within the budget.

    Args:
        paths: image files.
        budget: bytes for all; kept unless even the smallest step does not fit.

    Returns:
        One file per image; empty where there is no readable one.
    """
    distance = -(-len(paths) // SAMPLE) or 1
    sample = paths[::distance]
    step = 0
    while step < len(STEPS) - 1:
        size = sum(map(len, _make_all(sample, STEPS[step])))
        if size * len(paths) <= 0.95 * budget * max(len(sample), 1):
            pictures = _make_all(paths, STEPS[step])
            if sum(map(len, pictures)) <= budget:
                return pictures
        step += 1
    return _make_all(paths, STEPS[-1])


def _make_all(paths: Sequence[Path | ShardMember], step: tuple[int, int]) -> list[bytes]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:  # Pillow decodes without Python's lock
        work = pool.map(lambda path: _thumbnail(path, *step), paths)
        interval = 0.5 if sys.stderr.isatty() else 30  # a log file wants a line now and then
        return list(tqdm(work, "thumbnails", len(paths), unit="image", delay=2, mininterval=interval))


def _thumbnail(path: Path | ShardMember, edge: int, quality: int) -> bytes:
    try:
        image = load_rgb(path, at_least=2 * edge)
    except BrokenImageError:
        return b""
    image.thumbnail((edge, edge))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
