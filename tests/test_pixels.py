"""Pixels from files to the tower: bytes instead of floats change nothing, faster decoding almost nothing."""

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

import training
from support import REFERENCE
from training.data.images import (
    MODES,
    ImageReader,
    decode_bytes,
    normalise_pixels,
    pixels_needed,
    strong_augmentation,
    without_normalisation,
)
from training.data.reader import seed_augmentation
from training.readers.images import BrokenImageError, load_rgb

PHOTO = REFERENCE / "preprocess" / "preprocess_images" / "rgb_2250x1500.png"


@pytest.fixture(scope="module")
def transforms() -> dict:
    model, train, evaluation = training.create_model_and_transforms("lotlip_tiny", pretrained_text=False)
    cfg = model.visual.preprocess_cfg
    return {"train": train, "evaluation": evaluation, "strong": strong_augmentation(64, cfg["mean"], cfg["std"])}


def as_jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90} | options)
    return buffer.getvalue()


def grain(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Returns an image with soft colours and grain, like a photograph; seeded by its size."""
    stream = np.random.default_rng(width * height)
    coarse = Image.fromarray(stream.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse, dtype=np.float32) + stream.normal(0, 5, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def levels(transform: object, mode: str, source: object, seed: int = 0) -> torch.Tensor:
    """Returns the output of a transform for a file, as levels of 0 to 255."""
    seed_augmentation(str(seed))
    return ImageReader(without_normalisation(transform), mode)(source).float()


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


def test_a_transform_that_ends_otherwise_is_left_alone():
    erasing = tv.Compose([tv.ToTensor(), tv.Normalize((0.5,), (0.5,)), tv.RandomErasing()])
    assert without_normalisation(erasing) is erasing and without_normalisation(len) is len


@pytest.mark.parametrize("size", [(1500, 1000), (700, 1111), (384, 384), (100, 60)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("how", ["shortest", "squash", "train"])
def test_fast_reading_is_a_level_off_at_a_few_pixels_in_a_hundred(how, form, size):
    transform = open_clip.image_transform(224, how == "train", resize_mode=None if how == "train" else how)
    buffer = io.BytesIO()
    grain(*size).save(buffer, form)
    exact, fast = (levels(transform, mode, buffer.getvalue()) for mode in ("exact", "fast"))
    difference = (exact - fast).abs()
    assert fast.shape == (3, 224, 224) and 0 < difference.max() <= 4
    assert float((difference > 0).float().mean()) < 0.02 and float(difference.mean()) < 0.02


@pytest.mark.parametrize("kind", ["train", "evaluation", "strong"])
def test_a_chart_gives_the_same_pixels(kind, transforms):
    """A chart is sharper than photographs. Random colours and crops are equal, except crops of scaled images."""
    data, transform = as_jpeg(load_rgb(PHOTO)), transforms[kind]
    for seed in range(3):
        exact, fast, scaled = (levels(transform, mode, data, seed) for mode in MODES)
        assert float((exact - fast).abs().mean()) < 0.1
        assert kind == "strong" or float((exact - scaled).abs().mean()) < 3.0
    assert torch.equal(levels(transform, "fast", PHOTO), levels(transform, "fast", PHOTO.read_bytes()))


def test_exact_reading_is_the_transform_of_pillows_image(transforms):
    data = as_jpeg(grain(900, 600))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert torch.equal(ImageReader(transforms["evaluation"])(data), transforms["evaluation"](image))


def test_scaled_reading_keeps_twice_the_pixels_needed(transforms):
    data = as_jpeg(load_rgb(PHOTO))
    for kind, smallest in (("evaluation", 128), ("train", 128), ("strong", 256)):
        reader = ImageReader(transforms[kind], "scaled")
        assert reader.at_least == pixels_needed(transforms[kind]) >= smallest
        height, width = reader.decode(data).shape[1:]
        assert reader.at_least <= height < 1500 and abs(width / height - 1.5) < 0.01
    assert pixels_needed(transforms["evaluation"]) == 2 * transforms["evaluation"](Image.new("RGB", (9, 7))).shape[-1]
    assert load_rgb(PHOTO, 128).size == Image.open(PHOTO).size  # PNGs can't be decoded at a reduced size


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_jpegs_of_all_kinds_have_the_pixels_that_pillow_gives(mode, options):
    data = as_jpeg(grain(333, 217, mode), **options)
    expected = torch.from_numpy(np.array(load_rgb(data))).permute(2, 0, 1)
    assert torch.equal(decode_bytes(data), expected)


def test_what_pillow_refuses_is_refused(transforms, tmp_path, monkeypatch):
    whole = as_jpeg(grain(640, 480))
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    for mode in MODES:
        reader = ImageReader(transforms["evaluation"], mode)
        for source in (whole[: len(whole) // 2], whole[:100], b"", b"\xff\xd8\xff\xe0" + bytes(3000)):
            with pytest.raises(BrokenImageError, match="not a readable image"):
                reader(source)
        with pytest.raises(BrokenImageError, match="x.jpg: not a readable image"):
            reader(tmp_path / "x.jpg")
        with pytest.raises(BrokenImageError, match="gone.jpg"):
            reader(tmp_path / "gone.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BrokenImageError, match="decompression bomb"):
        ImageReader(transforms["evaluation"], "fast")(whole)


def test_another_first_step_gets_pillows_image():
    timm_like = tv.Compose([tv.Pad(3), tv.Resize(40), tv.ToTensor()])
    data = as_jpeg(grain(90, 70))
    exact, fast = (ImageReader(timm_like, mode)(data) for mode in ("exact", "fast"))
    assert torch.equal(exact, fast)
