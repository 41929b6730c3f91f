"""From an image file to the tensor that a tower takes: exactly as published, or faster with nearly the same pixels.

- ``exact``: Pillow decodes, and the transform resizes with Pillow. The published numbers were made this way.
- ``fast``: torchvision decodes JPEGs, to the same pixels, and torch resizes with Pillow's filter and the processor's
  vector instructions. On 165 photographs, 2 of 1,000 values differ, by one of 255 levels.
- ``scaled``: like ``fast``, but large JPEGs are decoded at a half, a quarter or an eighth of their size. On the same
  photographs, values differ by 0.21 levels on average. A random crop is then taken at another place.

The steps of a transform after its resize (crop, colours and so on) always run on a Pillow image of the final size.
"""

import ast
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial

import numpy as np
import torch
from open_clip import AugmentationCfg
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from training.readers import images

MODES = ("exact", "fast", "scaled")
IN_EVALUATION, IN_TRAINING = "exact", "fast"  # defaults of --image-decoding


class ImageReader:
    """Reads image files and applies a transform.

    Args:
        transform: function from PIL image to [3, H, W].
        mode: one of `MODES`. A transform that doesn't begin with torchvision's resize or random resized crop always
            gets an image decoded by Pillow. A transform with another random crop never gets an image decoded at a
            reduced size.
        upright: apply the EXIF rotation of all images, not only of sources that say so.
    """

    def __init__(self, transform: Callable, mode: str = "exact", upright: bool = False):
        self.whole, self.upright = transform, upright
        self.resize, self.rest = (None, transform) if mode == "exact" else _split(transform)
        self.at_least = pixels_needed(transform) if mode == "scaled" else None

    def __call__(self, source: images.Source) -> torch.Tensor:
        """Reads one image.

        Args:
            source: a file in one of `images.FORMATS`, or its bytes.

        Returns:
            The output of the transform.

        Raises:
            images.BrokenImageError: see `load_rgb`.
        """
        return self.transform(self.decode(source))

    def decode(self, source: images.Source) -> Image.Image | torch.Tensor:
        """Returns the decoded image, the argument of `transform`; it may be transformed several times."""
        if self.resize is None:
            return images.load_rgb(source, self.at_least, self.upright)
        return decode_bytes(source, self.at_least, self.upright)

    def transform(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Applies the transform to a decoded image."""
        return self.rest(image if self.resize is None else functional.to_pil_image(self.resize(image)))


def decode_bytes(source: images.Source, at_least: int | None = None, upright: bool = False) -> torch.Tensor:
    """Decodes an image to [3, H, W] uint8: colour JPEGs at full size by torchvision, everything else by `load_rgb`.

    Args:
        source: a file or its bytes.
        at_least, upright: see `load_rgb`.

    Raises:
        images.BrokenImageError: see `load_rgb`.
    """
    try:
        with images.image_file(source) as file:
            data = file.read()
        with images.open_image(io.BytesIO(data)) as image:  # reads only the header, and refuses decompression bombs
            turned = upright or getattr(source, "upright", False)
            size, orientation = image.size, images.orientation_of(image) if turned else 1
            if at_least:
                image.draft("RGB", (at_least, at_least))
            if (image.format, image.mode, image.size, orientation) == ("JPEG", "RGB", size, 1):
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        decoded = images.load_rgb(data, at_least, turned)
    except Exception:  # whatever went wrong, Pillow decides whether the image is broken, and names the fault
        decoded = images.load_rgb(source, at_least, upright)
    return torch.from_numpy(np.array(decoded)).permute(2, 0, 1)


def _split(transform: Callable) -> tuple[Callable | None, Callable]:
    """Splits a transform into its resize, for [3, H, W] uint8, and the further steps, for a Pillow image.

    Returns (None, the transform) if it doesn't begin with torchvision's resize or random resized crop.
    """
    steps = list(getattr(transform, "transforms", []))
    if steps[:1] == [images.to_rgb]:
        steps = steps[1:]
    first = steps[0] if steps else None
    if isinstance(first, transforms.RandomResizedCrop):
        return partial(_random_crop, first), transforms.Compose(steps[1:])
    if isinstance(first, transforms.Resize):
        size = [first.size] if isinstance(first.size, int) else list(first.size)
        how = {"interpolation": first.interpolation, "max_size": first.max_size, "antialias": True}
        return partial(functional.resize, size=size, **how), transforms.Compose(steps[1:])
    return None, transform


def _random_crop(crop: transforms.RandomResizedCrop, pixels: torch.Tensor) -> torch.Tensor:
    """Draws the crop's area as torchvision does, and resizes it with torch on uint8."""
    top, left, height, width = crop.get_params(pixels, crop.scale, crop.ratio)
    area = pixels[:, top : top + height, left : left + width]
    return functional.resize(area, list(crop.size), interpolation=crop.interpolation, antialias=True)


def pixels_needed(transform: Callable) -> int | None:
    """Returns the length in pixels to which an image's short side may be reduced before a transform.

    For open_clip's random crop this is twice the length that the smallest crop needs; for a transform without
    randomness, twice the length of the output. Returns None for a transform with another random crop.
    """
    steps = getattr(transform, "transforms", [])
    crops = [s for s in steps if isinstance(s, transforms.RandomResizedCrop)]
    if crops:
        return math.ceil(2 * max(crops[0].size) / math.sqrt(min(crops[0].scale)))
    if not steps or any("random" in type(step).__name__.lower() for step in steps):
        return None
    made = transform(Image.new("RGB", (64, 64)))
    return 2 * max(made.size if isinstance(made, Image.Image) else made.shape[-2:])


def parse_augmentation(words: Sequence[str]) -> dict[str, object]:
    """Parses ``--aug-cfg``: ``scale=0.4,1.0`` -> {"scale": (0.4, 1.0)}; ``none`` -> {}.

    Raises:
        ValueError: open_clip's AugmentationCfg has no such name, or a value is not a Python literal.
    """
    known = [field.name for field in fields(AugmentationCfg)]
    config = {}
    for word in words if list(words) != ["none"] else ():
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"--aug-cfg {word}: expected one of {', '.join(known)}")
        try:
            config[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"--aug-cfg {word}: expected a number, a list of numbers, True or False") from error
    return config


def strong_augmentation(size: int | tuple[int, int], mean: list[float], std: list[float]) -> Callable:
    """Returns a transform from PIL image to [3, H, W].

    It crops 0.2 to 1.0 of the image, and applies colour jitter, greyscale, blur, a flip and two random operations of
    magnitude 7. Source: the published training flags name these operations. They don't give the strengths of jitter,
    greyscale and blur; these are our choice, taken from SimCLR (arXiv 2002.05709).
    """
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    blur = transforms.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))
    return transforms.Compose(
        [
            images.to_rgb,
            transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(num_ops=2, magnitude=7),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def without_normalisation(transform: Callable) -> Callable:
    """Returns a transform from PIL image to [3, H, W] uint8, without the final conversion to floats and normalisation.

    These steps are left to `normalise_pixels` on the device. A transform that doesn't end in them, for example with
    timm's random erasing, is returned unchanged.
    """
    steps = getattr(transform, "transforms", [])
    last = [type(step) for step in steps[-2:]]
    # open_clip's own conversion is a subclass of ToTensor.
    if len(last) < 2 or not issubclass(last[0], transforms.ToTensor) or last[1] is not transforms.Normalize:
        return transform
    return transforms.Compose([*steps[:-2], transforms.PILToTensor()])


def normalise_pixels(
    pixels: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """Converts and normalises pixels after `without_normalisation`.

    On a GPU in a single kernel, within 5e-7 of torchvision's values; on a CPU, where that takes twice as long, in place
    and bit-equal to them.

    Args:
        pixels: [n, 3, H, W] uint8.
        mean, std: [3, 1, 1], for pixels in [0, 1].
        dtype, memory_format: of the result.

    Returns:
        [n, 3, H, W].
    """
    if pixels.is_cuda:
        out = torch.empty_like(pixels, dtype=dtype, memory_format=memory_format)
        return torch.addcmul(-mean / std, pixels, 1 / (255 * std), out=out)
    return pixels.float().div_(255).sub_(mean).div_(std).to(dtype, memory_format=memory_format)
