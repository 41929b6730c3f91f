"""Pictures on their way to the tower: bytes instead of floats change nothing, fast decoding next to nothing."""

import io

import pytest
import torch
from PIL import Image

import training
from dataloaders.images import load_rgb
from support import REFERENCE
from training.data.augment import normalise_pixels, pixels_needed, strong_augmentation, without_normalisation
from training.data.loader import seed_augmentation

PHOTO = REFERENCE / "preprocess" / "preprocess_images" / "rgb_2250x1500.png"


@pytest.fixture(scope="module")
def transforms() -> dict:
    model, train, evaluation = training.create_model_and_transforms("lotlip_tiny", pretrained_text=False)
    cfg = model.visual.preprocess_cfg
    return {"train": train, "evaluation": evaluation, "strong": strong_augmentation(64, cfg["mean"], cfg["std"])}


@pytest.mark.parametrize("kind", ["train", "evaluation", "strong"])
def test_normalising_bytes_on_the_device_is_the_same_bit_for_bit(kind, transforms):
    image, whole = load_rgb(PHOTO), transforms[kind]
    seed_augmentation("x")
    expected = whole(image)
    seed_augmentation("x")
    pixels = without_normalisation(whole)(image)
    assert pixels.dtype == torch.uint8
    norm = whole.transforms[-1]
    mean, std = (torch.tensor(values)[:, None, None] for values in (norm.mean, norm.std))
    assert torch.equal(normalise_pixels(pixels[None], mean, std)[0], expected)


def test_fast_decoding_for_evaluation_changes_pixels_by_little(transforms):
    """A picture that is resized whole is decoded with at least twice the pixels that come out."""
    buffer = io.BytesIO()
    load_rgb(PHOTO).save(buffer, "JPEG", quality=90)
    whole = transforms["evaluation"]
    at_least = pixels_needed(whole)
    assert at_least == 2 * whole(Image.new("RGB", (9, 7))).shape[-1]
    fast = load_rgb(io.BytesIO(buffer.getvalue()), at_least)
    assert at_least <= min(fast.size) < 1500
    pair = [without_normalisation(whole)(image).float() for image in (load_rgb(io.BytesIO(buffer.getvalue())), fast)]
    assert 0 < float((pair[0] - pair[1]).abs().mean()) < 3.0  # a chart, sharper than photographs


def test_a_transform_that_ends_otherwise_is_left_alone():
    from torchvision import transforms as tv

    erasing = tv.Compose([tv.ToTensor(), tv.Normalize((0.5,), (0.5,)), tv.RandomErasing()])
    assert without_normalisation(erasing) is erasing and without_normalisation(len) is len


@pytest.mark.parametrize("kind", ["train", "strong"])
def test_fast_decoding_changes_pixels_by_little(kind, transforms):
    """On average over the picture at most 2 of 255 levels; crops, flips and colours are drawn alike."""
    buffer = io.BytesIO()
    load_rgb(PHOTO).save(buffer, "JPEG", quality=90)
    transform = transforms[kind]
    at_least = pixels_needed(transform)
    assert at_least >= 128
    fast = load_rgb(io.BytesIO(buffer.getvalue()), at_least)
    assert at_least <= min(fast.size) < 1500 and abs(fast.size[0] / fast.size[1] - 1.5) < 0.01
    differences = []
    for number in range(5):
        pair = []
        for image in (load_rgb(io.BytesIO(buffer.getvalue())), fast):
            seed_augmentation(str(number))
            pair.append(without_normalisation(transforms["train"])(image).float())
        differences.append(float((pair[0] - pair[1]).abs().mean()))
    assert max(differences) < 2.0
    assert load_rgb(PHOTO, at_least).size == Image.open(PHOTO).size  # a PNG has no such way
