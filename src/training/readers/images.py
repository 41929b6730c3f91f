"""Opens image files: every mode becomes RGB, and every error names its file."""

import io
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from training.readers.faults import BadSample
from training.readers.files import StoredImage

Source = str | Path | StoredImage | bytes
# Pillow's other readers are never used: its reader of EPS starts Ghostscript on the file.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "GIF", "TIFF")
MAX_ASPECT = 200  # so that a resize to 224 pixels gives at most 10 million pixels
_VALUES = "image values of unknown range"
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()  # for 2 to 8
_OPTIONAL = {  # brand in the file -> (its format in Pillow, its usual name, the package that reads it)
    **dict.fromkeys((b"avif", b"avis"), ("AVIF", "AVIF", "'Pillow>=11.3'")),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), ("HEIF", "HEIC", "pillow-heif")
    ),
}


class BrokenImageError(BadSample):
    """An image file that exists but can't be decoded, or would take absurdly much memory; the message names it."""

    def __init__(self, message: str, kind: str = "broken image"):
        super().__init__(message, kind)


@cache
def _formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that this installation reads; registers pillow-heif if it is installed."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN and (name != "AVIF" or features.check("avif")))


def image_file(source: Source) -> BinaryIO:
    """Opens the file of an image, which may be a part of another file."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return source.open() if isinstance(source, StoredImage) else open(source, "rb")


def open_image(file: str | Path | IO[bytes]) -> Image.Image:
    """Opens an image and reads its header; pixels are not decoded yet.

    Raises:
        BrokenImageError: one side is more than `MAX_ASPECT` times the other; resizing 1 x 10,000 pixels would cost
            gigabytes. The message doesn't name the file.
        OSError: the file is missing, or not an image in one of `FORMATS`.
        PIL.Image.DecompressionBombError: the image has absurdly many pixels.
    """
    image = Image.open(file, formats=_formats())
    if max(image.size) > MAX_ASPECT * min(image.size):
        width, height = image.size
        image.close()
        found = f"{width:,} x {height:,} pixels, one side is over {MAX_ASPECT} times the other"
        raise BrokenImageError(found, "image too narrow")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any PIL mode (1, L, LA, P, RGBA, CMYK, I;16, F and so on) to 8-bit RGB, dropping alpha.

    Integers of more than 8 bits are divided by the smallest power of 2 that leaves 8 bits, so 12 bits in 16 keep their
    contrast. Other numbers are scaled from the range 0 to 1, 255 or 65535 that they fill.

    Raises:
        BrokenImageError: values are negative or not finite, or Pillow has discarded the bits that were used. The
            message doesn't name the file.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(np.asarray(image), image.mode == "F")
    # Of 16 bits per colour, Pillow keeps the upper 8.
    shortened = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    if shortened and np.asarray(image.convert("RGB")).max() < 16:
        raise BrokenImageError("colours of 16 bits, of which the upper 4 are not used; save it with 8 bits", _VALUES)
    if image.mode == "RGB":
        image.load()
        return image  # `convert` would copy it
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, is_float: bool) -> Image.Image:
    low, high = float(pixels.min(initial=0)), float(pixels.max(initial=0))
    if not np.isfinite(pixels).all() or low < 0:
        found = f"values from {low:,.6g} to {high:,.6g}, expected 0 to 1, 255 or 65535; save it with 8 bits"
        raise BrokenImageError(found, _VALUES)
    if is_float:
        peak = next((peak for peak in (1, 255, 65535) if peak / 4 <= high <= peak), high or 1)
    else:
        peak = (1 << max(8, int(high).bit_length())) - 1
    return Image.fromarray((pixels * (255.0 / peak)).round().astype(np.uint8))


def orientation_of(image: Image.Image) -> int:
    """Returns the orientation in the EXIF data of an opened image, 1 to 8; 1 if there are none or they are broken.

    Pillow turns TIFF images when it decodes them; from then on, theirs is 1.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises all kinds of errors; broken EXIF data cost no image
        return 1
    return value if value in range(1, len(_TURNS) + 2) else 1


def load_rgb(source: Source, at_least: int | None = None, upright: bool = False) -> Image.Image:
    """Reads an image file completely.

    Args:
        source: a file in one of `FORMATS`, or its bytes.
        at_least: decode a JPEG at 1/2, 1/4 or 1/8 of its size as long as both sides keep at least this many pixels.
            This is several times faster for large images, but the pixels differ slightly.
        upright: apply the EXIF rotation, also if the source doesn't say so. The published numbers were made without.

    Raises:
        BrokenImageError: the file is missing, truncated, not an image, or too large or too narrow to be one.
    """
    try:
        with image_file(source) as file, open_image(file) as image:
            if at_least:
                image.draft("RGB", (at_least, at_least))  # does nothing except for JPEG
            decoded = to_rgb(image)
            orientation = orientation_of(image) if upright or getattr(source, "upright", False) else 1
            return decoded if orientation == 1 else decoded.transpose(Image.Transpose[_TURNS[orientation - 2]])
    except Exception as error:
        raise as_broken(error, source) from error


def as_broken(error: Exception, source: Source) -> BrokenImageError:
    """Returns a `BrokenImageError` that names the source, for an error raised by `open_image` or by decoding."""
    name = "image" if isinstance(source, bytes) else source
    if isinstance(error, Image.DecompressionBombError):
        return BrokenImageError(f"{name}: {error}", "image too large")
    if isinstance(error, BrokenImageError):
        return BrokenImageError(f"{name}: {error}", error.kind)
    if isinstance(error, UnidentifiedImageError):
        with image_file(source) as file:
            head = file.read(12)
        needed, shown, package = _OPTIONAL.get(head[8:12], ("", "", "")) if head[4:8] == b"ftyp" else ("", "", "")
        if needed and needed not in _formats():
            return BrokenImageError(f"{name}: {shown} needs pip install {package}", f"{shown} without {package}")
        return BrokenImageError(f"{name}: not a readable image (none of {', '.join(_formats())})")
    # Pillow's readers raise all kinds of errors on broken chunks: SyntaxError, IndexError, struct.error.
    return BrokenImageError(f"{name}: not a readable image ({type(error).__name__}: {error})")
