"""Opening image files: every mode becomes RGB, every failure names its file."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dataloaders.files import EmbeddedImage, ShardMember

MAX_ASPECT = 200  # a resize to 224 pixels then makes 10 million pixels at most


class BrokenImageError(ValueError):
    """An image file that exists but can't be decoded; the message names it."""


class HugeImageError(BrokenImageError):
    """An image of absurdly many pixels (a decompression bomb)."""


class NarrowImageError(BrokenImageError):
    """An image of which a resize of the shorter side would make absurdly many pixels."""


def check_shape(image: Image.Image) -> None:
    """Refuses an image that is more than `MAX_ASPECT` times as long as it is wide: 1 x 10,000 pixels cost gigabytes.

    Raises:
        NarrowImageError: without the file's name.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        width, height = image.size
        raise NarrowImageError(f"{width:,} x {height:,} pixels, one side is over {MAX_ASPECT} times the other")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any PIL mode (1, L, LA, P, RGBA, CMYK, I;16, F, ..) to 8-bit RGB, dropping alpha."""
    if image.mode.startswith("I") or image.mode == "F":
        # PIL clips these to 255 instead of scaling; 16-bit greyscale PNG is the usual case.
        pixels = np.asarray(image, dtype=np.float32)
        peak = 65535.0 if pixels.max(initial=0.0) > 255 else 255.0
        image = Image.fromarray((pixels.clip(0, peak) * (255.0 / peak)).round().astype(np.uint8))
    if image.mode == "RGB":
        image.load()
        return image  # `convert` would copy it
    return image.convert("RGB")


def load_rgb(path: str | Path | ShardMember | EmbeddedImage | bytes, at_least: int | None = None) -> Image.Image:
    """Reads an image file completely.

    Args:
        path: a file in any format that Pillow reads, or its bytes.
        at_least: let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep so many pixels:
            several times faster for large pictures, and not quite the same pixels.

    Returns:
        The RGB image. EXIF rotation is not applied: the published numbers were made without it.

    Raises:
        BrokenImageError: the file is absent, truncated, no image, or too large or too narrow to be one.
    """
    name, file = path, path
    if isinstance(path, (ShardMember, EmbeddedImage)):
        file = path.open()
    elif isinstance(path, bytes):
        name, file = "image", io.BytesIO(path)
    try:
        with Image.open(file) as image:
            check_shape(image)
            if at_least:
                image.draft("RGB", (at_least, at_least))  # of JPEG alone
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise HugeImageError(f"{name}: {error}") from error
    except NarrowImageError as error:
        raise NarrowImageError(f"{name}: {error}") from error
    # On broken chunks Pillow's readers raise anything: SyntaxError, IndexError, struct's own.
    except Exception as error:
        raise BrokenImageError(f"{name}: not a readable image ({type(error).__name__}: {error})") from error
