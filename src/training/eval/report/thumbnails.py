"""Thumbnails for the HTML report, as large as a budget of bytes allows."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.contrib.concurrent import thread_map

from training.readers.files import NUM_THREADS, ShardMember
from training.readers.images import BrokenImageError, load_rgb

# Longest side in pixels and WebP quality, from good on a phone down to barely recognisable scenes.
STEPS = ((160, 60), (128, 55), (112, 50), (96, 45), (80, 40), (64, 40), (56, 35), (48, 30), (40, 20))
SAMPLE = 48


def make_thumbnails(paths: Sequence[Path | ShardMember], budget: int) -> list[bytes]:
    """Makes a WebP thumbnail of each image, with the largest of `STEPS` for which all thumbnails fit the budget.

    Args:
        paths: image files.
        budget: total number of bytes; exceeded only if even the smallest step does not fit.

    Returns:
        One WebP file per image; empty for unreadable images.
    """
    sample = paths[:: -(-len(paths) // SAMPLE) or 1]
    for step in STEPS[:-1]:
        if sum(map(len, _make_all(sample, step))) * len(paths) <= 0.95 * budget * len(sample):
            thumbnails = _make_all(paths, step)
            if sum(map(len, thumbnails)) <= budget:
                return thumbnails
    return _make_all(paths, STEPS[-1])


def _make_all(paths: Sequence[Path | ShardMember], step: tuple[int, int]) -> list[bytes]:
    # Threads, because Pillow releases the GIL while decoding. Few lines in a log file.
    how = {"max_workers": NUM_THREADS, "delay": 2, "mininterval": 0.5 if sys.stderr.isatty() else 30}
    return thread_map(lambda path: _thumbnail(path, *step), paths, desc="thumbnails", unit="image", **how)


def _thumbnail(path: Path | ShardMember, edge: int, quality: int) -> bytes:
    try:
        image = load_rgb(path, at_least=2 * edge)
    except BrokenImageError:
        return b""
    image.thumbnail((edge, edge))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
