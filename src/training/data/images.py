"""From a picture file to the tensor that a tower takes: as published, or several times faster and nearly the same.

- ``exact``: Pillow decodes, the transform resizes with Pillow. The published numbers were made so.
- ``fast``: torchvision decodes JPEGs, to the same pixels, and torch resizes, by Pillow's filter with the processor's
  vector instructions: 2 values in 1,000 of 165 photographs differ, by one of 255 levels.
- ``scaled``: besides, large JPEGs are decoded at a half, a quarter or an eighth of their size: 0.21 levels on average
  of the same photographs. A random crop then falls elsewhere.

What comes after a transform's resize (crop, colours, ..) is the transform's own, on a Pillow image of the final size.
"""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from dataloaders.files import EmbeddedImage, ShardMember
from dataloaders.images import BrokenImageError, check_shape, load_rgb, to_rgb

MODES = ("exact", "fast", "scaled")
IN_EVALUATION, IN_TRAINING = "exact", "fast"  # where --image-decoding is not given
Source = str | Path | ShardMember | EmbeddedImage | bytes


class PictureReader:
    """Reads picture files through a transform.

    Args:
        transform: PIL image -> [3, H, W].
        mode: one of `MODES`. A transform that does not begin with torchvision's own resize or random crop is always
            given Pillow's image; one with another random crop never a scaled one.
    """

    def __init__(self, transform: Callable, mode: str = "exact"):
        self.whole = transform
        self.resize, self.rest = (None, None) if mode == "exact" else _split(transform)
        self.at_least = pixels_needed(transform) if mode == "scaled" else None

    def __call__(self, source: Source) -> torch.Tensor:
        """Reads one picture.

        Args:
            source: a file in any format that Pillow reads, or its bytes.

        Returns:
            What the transform makes of it.

        Raises:
            BrokenImageError: as `load_rgb`.
        """
        return self.transform(self.decode(source))

    def read(self, sources: Sequence[Source]) -> list[torch.Tensor | BrokenImageError]:
        """Reads several pictures; returns for each what the transform makes of it, or why it can't be read."""
        found = []
        for source in sources:
            try:
                found.append(self(source))
            except BrokenImageError as error:
                found.append(error)
        return found

    def decode(self, source: Source) -> Image.Image | torch.Tensor:
        """Returns the picture as `transform` takes it, which may be called several times."""
        if self.resize is None:
            return load_rgb(source, self.at_least)
        return decode_bytes(source, self.at_least)

    def transform(self, picture: Image.Image | torch.Tensor) -> torch.Tensor:
        """Returns what the transform makes of a decoded picture."""
        if self.resize is None:
            return self.whole(picture)
        return self.rest(functional.to_pil_image(self.resize(picture)))


def decode_bytes(source: Source, at_least: int | None = None) -> torch.Tensor:
    """Decodes a picture to [3, H, W] uint8: JPEGs by torchvision, all else as `load_rgb` does.

    Args:
        source: a file or its bytes.
        at_least: as of `load_rgb`.

    Raises:
        BrokenImageError: as `load_rgb`.
    """
    try:
        return _decode(source, at_least)
    except Exception:  # whatever it is, Pillow alone decides whether it is a fault, and names it
        return _as_tensor(load_rgb(source, at_least))


def _as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _decode(source: Source, at_least: int | None) -> torch.Tensor:
    """By torchvision what is a plain colour JPEG, and not to be decoded at a reduced size."""
    if isinstance(source, (ShardMember, EmbeddedImage)):
        source = source.open().getvalue()
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    with Image.open(io.BytesIO(data)) as image:  # reads the header alone, refuses decompression bombs
        check_shape(image)
        size = image.size
        if at_least:
            image.draft("RGB", (at_least, at_least))
        if (image.format, image.mode, image.size) != ("JPEG", "RGB", size):
            return _as_tensor(to_rgb(image))
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def _split(transform: Callable) -> tuple[Callable | None, Callable | None]:
    """The first step of a transform, on bytes [3, H, W], and the others, on a Pillow image; None if that can't be."""
    steps = list(getattr(transform, "transforms", []))
    if steps[:1] == [to_rgb]:
        steps = steps[1:]
    first = steps[0] if steps else None
    if isinstance(first, transforms.RandomResizedCrop):
        return partial(_random_crop, first), transforms.Compose(steps[1:])
    if isinstance(first, transforms.Resize):
        how = {"interpolation": first.interpolation, "max_size": first.max_size, "antialias": True}
        return partial(functional.resize, size=_as_list(first.size), **how), transforms.Compose(steps[1:])
    return None, None


def _as_list(size: int | tuple[int, int]) -> list[int]:
    return [size] if isinstance(size, int) else list(size)


def _random_crop(crop: transforms.RandomResizedCrop, pixels: torch.Tensor) -> torch.Tensor:
    """The crop's own draw, its resize in torch's bytes."""
    top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)
    part = pixels[:, top : top + height, left : left + width]
    return functional.resize(part, list(crop.size), interpolation=crop.interpolation, antialias=True)


def pixels_needed(transform: Callable) -> int | None:
    """Returns how short an image's short side may be before a transform notices: twice what it makes of it.

    With open_clip's random crop that is twice what the smallest crop needs; without randomness, twice the pixels that
    come out. None for a transform with another random crop.
    """
    steps = getattr(transform, "transforms", [])
    crops = [s for s in steps if isinstance(s, transforms.RandomResizedCrop)]
    if crops:
        return math.ceil(2 * max(crops[0].size) / math.sqrt(min(crops[0].scale)))
    if not steps or any("random" in type(step).__name__.lower() for step in steps):
        return None
    made = transform(Image.new("RGB", (64, 64)))
    return 2 * max(made.size if isinstance(made, Image.Image) else made.shape[-2:])
