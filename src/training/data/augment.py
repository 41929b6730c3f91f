"""Image augmentation by flag: open_clip's own, or the strong one of the published project."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from open_clip import AugmentationCfg
from torchvision import transforms

from dataloaders.images import to_rgb


def parse_augmentation(words: Sequence[str]) -> dict[str, object]:
    """Reads ``--aug-cfg``: ``scale=0.4,1.0`` -> {"scale": (0.4, 1.0)}; ``none`` -> {}.

    Raises:
        ValueError: a name that open_clip's AugmentationCfg does not have, or a value that is no Python literal.
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
    """Returns PIL image -> [3, H, W]: crop 0.2-1.0, colour jitter, grey, blur, flip, two random ops of magnitude 7.

    Source: the published training flags name these operations; the strengths of jitter, grey and blur are SimCLR's
    (arXiv 2002.05709), ours to choose.
    """
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    blur = transforms.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))
    return transforms.Compose(
        [
            to_rgb,
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
    """Returns PIL image -> [3, H, W] uint8: a transform whose last steps, on floats, are left to the device.

    A transform that does not end in conversion and normalisation (timm's random erasing, ..) stays as it is.
    """
    steps = getattr(transform, "transforms", [])
    last = [type(step) for step in steps[-2:]]
    # open_clip's own conversion is a ToTensor, too.
    if len(last) < 2 or not issubclass(last[0], transforms.ToTensor) or last[1] is not transforms.Normalize:
        return transform
    return transforms.Compose([*steps[:-2], transforms.PILToTensor()])


def normalise_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Does what `without_normalisation` left to do: [n, 3, H, W] uint8 -> float32, bit for bit as torchvision.

    Args:
        pixels: bytes.
        mean, std: [3, 1, 1], of pixels in [0, 1].
    """
    return (pixels.float() / 255 - mean) / std
