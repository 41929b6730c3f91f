"""Opens image files: every mode becomes RGB, and every error names its file."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from training.readers.files import EmbeddedImage, ShardMember

MAX_ASPECT = 200  # so that a resize to 224 pixels gives at most 10 million pixels


class BrokenImageError(ValueError):
    """An image file that exists but can't be decoded; the message names it."""


class HugeImageError(BrokenImageError):
    """An image with absurdly many pixels (a decompression bomb)."""


class NarrowImageError(BrokenImageError):
    """An image so narrow that resizing its shorter side would give absurdly many pixels."""


def check_shape(image: Image.Image) -> None:
    """Refuses an image with one side more than `MAX_ASPECT` times the other: 1 x 10,000 pixels would cost gigabytes.

    Raises:
        NarrowImageError: the message doesn't name the file.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        width, height = image.size
        raise NarrowImageError(f"{width:,} x {height:,} pixels, one side is over {MAX_ASPECT} times the other")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any PIL mode (1, L, LA, P, RGBA, CMYK, I;16, F and so on) to 8-bit RGB, dropping alpha."""
    if image.mode.startswith("I") or image.mode == "F":
        # PIL clips such values to 255 instead of scaling them; 16-bit greyscale PNG is the usual case.
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
        at_least: decode a JPEG at 1/2, 1/4 or 1/8 of its size as long as both sides keep at least this many pixels.
            This is several times faster for large images, but the pixels differ slightly.

    Returns:
        The RGB image. EXIF rotation is not applied: the published numbers were made without it.

    Raises:
        BrokenImageError: the file is missing, truncated, not an image, or too large or too narrow to be one.
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
                image.draft("RGB", (at_least, at_least))  # does nothing except for JPEG
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise HugeImageError(f"{name}: {error}") from error
    except NarrowImageError as error:
        raise NarrowImageError(f"{name}: {error}") from error
    # Pillow's readers raise all kinds of errors on broken chunks: SyntaxError, IndexError, struct.error.
    except Exception as error:
        raise BrokenImageError(f"{name}: not a readable image ({type(error).__name__}: {error})") from error
