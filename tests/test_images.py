"""Image files of cameras and phones: EXIF rotation, 16 bits, other formats, files that only pretend to be images."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from support import evaluate, read_results
from training.data.images import MODES, ImageReader, decode_bytes
from training.data.reader import read_image
from training.main import main
from training.readers import images
from training.readers.faults import BadSample
from training.readers.files import IMAGE_SUFFIXES, upright
from training.readers.images import BrokenImageError, load_rgb
from training.readers.samples import RawSample


def picture(seed: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", orientation: int = 1, **options) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, form, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_of_photos_is_pillows(form, orientation, tmp_path):
    data = encoded(picture(), form, orientation)
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    path = tmp_path / "x"
    path.write_bytes(data)
    for source, flag in ((data, True), (path, True), (upright(path), False)):
        assert np.array_equal(np.asarray(load_rgb(source, upright=flag)), turned)
        assert np.array_equal(decode_bytes(source, upright=flag).permute(1, 2, 0).numpy(), turned)
    for read in (load_rgb(path), decode_bytes(path).permute(1, 2, 0)):  # as the published numbers were made
        assert np.array_equal(np.asarray(read), np.asarray(stored))
    for mode in MODES:
        reader = ImageReader(lambda image: torch.from_numpy(np.array(image)), mode, upright=True)
        assert reader(data).shape == turned.shape


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_cost_no_image():
    data = encoded(picture(), orientation=6)
    place = data.index(b"Exif\0\0") + 6
    broken = data[:place] + b"II*\0\xff\xff\xff\xff" + data[place + 8 :]
    assert load_rgb(broken, upright=True).size == (48, 32)


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Encodes [height, width, channels] uint16; Pillow can't write colours of 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_more_than_8_bits_keep_their_contrast(bits):
    grey = np.asarray(picture().convert("L"))
    values = (grey.astype(np.uint32) * ((1 << bits) - 1) // 255).astype(np.uint16)
    tiff = io.BytesIO()
    Image.fromarray(values).save(tiff, "TIFF")
    for data in (png_of_16_bits(values[:, :, None]), tiff.getvalue()):
        read = np.asarray(load_rgb(data))[:, :, 0].astype(int)
        assert np.abs(read - grey).max() <= 255 / grey.max() + 1


@pytest.mark.parametrize("peak", [1.0, 255.0, 65535.0, 1.02, 4095.0])
def test_floats_keep_their_contrast(peak):
    grey = np.asarray(ImageOps.autocontrast(picture().convert("L")))
    tiff = io.BytesIO()
    Image.fromarray((grey * (peak / 255)).astype(np.float32)).save(tiff, "TIFF")
    assert np.abs(np.asarray(load_rgb(tiff.getvalue()))[:, :, 0].astype(int) - grey).max() <= 2


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits(channels):
    colours = np.asarray(picture())
    pixels = np.concatenate([colours, colours[:, :, :1]], axis=2)[:, :, :channels].astype(np.uint16)
    shown = 1 if channels == 2 else 3  # two channels are grey and alpha
    read = np.asarray(load_rgb(png_of_16_bits(pixels * 257)))[:, :, :shown]
    assert np.array_equal(read, pixels[:, :, :shown])
    with pytest.raises(BrokenImageError, match="of which the upper 4 are not used") as caught:
        load_rgb(png_of_16_bits(pixels * 16))  # 12 bits: Pillow keeps 4 of them
    assert caught.value.kind == "image values of unknown range"


@pytest.mark.parametrize("values", [[-1024.0, 3000.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_numbers_that_are_no_brightness_are_named(values):
    tiff = io.BytesIO()
    Image.fromarray(np.array([values] * 2, dtype=np.float32)).save(tiff, "TIFF")
    with pytest.raises(BrokenImageError, match="values from .* save it with 8 bits"):
        load_rgb(tiff.getvalue())


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\necho 10.0\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%Page: 1 1\n%%EOF\n"
    (tmp_path / "x.jpg").write_bytes(eps)
    for source in (eps, tmp_path / "x.jpg"):
        for mode in MODES:
            with pytest.raises(BrokenImageError, match="not a readable image .none of JPEG, .*PNG"):
                ImageReader(lambda image: image, mode)(source)
    assert not ran.exists()


def test_photos_of_phones():
    pillow_heif = pytest.importorskip("pillow_heif")
    colours, buffer = picture(size=(64, 64)), io.BytesIO()
    pillow_heif.from_pillow(colours).save(buffer, quality=90)
    assert np.abs(np.asarray(load_rgb(buffer.getvalue())).astype(int) - np.asarray(colours)).mean() < 8
    avif = encoded(colours, "AVIF")
    assert np.abs(np.asarray(load_rgb(avif)).astype(int) - np.asarray(colours)).mean() < 8


def test_what_is_missing_for_a_format_is_named(monkeypatch):
    images._formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(50)
    try:
        with pytest.raises(BrokenImageError, match="HEIC needs pip install pillow-heif"):
            load_rgb(heic)
        with pytest.raises(BadSample) as error:
            read_image(RawSample("1", "0.tar", {"heic": heic}, {}))
        assert error.value.kind == "HEIC without pillow-heif"
    finally:
        images._formats.cache_clear()


def test_own_photos_are_evaluated_upright_and_benchmarks_as_published(tiny_clip, layouts, tmp_path):
    for number in range(3):
        turned = picture(number, (40, 64)).transpose(Image.Transpose.ROTATE_90)  # what orientation 6 undoes
        (tmp_path / f"{number}.png").write_bytes(encoded(turned, "PNG", 6))
        picture(number, (40, 64)).save(tmp_path / f"plain-{number}.png")
    for name in ("", "plain-"):
        rows = "".join(f"{name}{number}.png,picture {number}\n" for number in range(3))
        (tmp_path / f"{name}photos.csv").write_text(f"filepath,caption\n{rows}")

    def features(name: str, *flags: object) -> np.ndarray:
        evaluate(tmp_path, tiny_clip, *flags, "--save-features", name=name)
        return np.load(next((tmp_path / "logs" / name / "features").glob("*.npz")))["image_features"]

    photos, plain = tmp_path / "photos.csv", tmp_path / "plain-photos.csv"
    expected = features("plain", "--retrieval-csv", plain)
    assert np.array_equal(features("auto", "--retrieval-csv", photos), expected)
    assert not np.allclose(features("off", "--retrieval-csv", photos, "--exif-rotation", "off"), expected)
    prints = {read_results(tmp_path / "logs", name)["photos-retrieval-fingerprint"] for name in ("auto", "off")}
    assert len(prints) == 2
    target = next(Path(layouts / "urban1k" / "image").glob("*.jpg"))
    before = features("urban", "--urban1k-retrieval", layouts / "urban1k")
    exif = Image.Exif()
    exif[0x0112] = 6
    segment, content = exif.tobytes(), target.read_bytes()
    target.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:])
    assert np.array_equal(features("published", "--urban1k-retrieval", layouts / "urban1k"), before)
    turned = features("turned", "--urban1k-retrieval", layouts / "urban1k", "--exif-rotation", "on")
    assert not np.allclose(turned, before)


@pytest.mark.parametrize("suffix", [s for s in IMAGE_SUFFIXES if s not in ("heic", "heif")])
def test_every_suffix_is_an_image_everywhere(suffix, tmp_path):
    from training.search.index import list_images

    form = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    (tmp_path / f"x.{suffix.upper()}").write_bytes(encoded(picture(), form))
    assert len(list_images(tmp_path).images) == 1
    raw = RawSample("x", "0.tar", {suffix: encoded(picture(), form)}, {})
    assert read_image(raw).size == (48, 32)


def test_training_turns_photos(tmp_path):
    """A photo with a rotation is trained on like the same photo that was turned before."""
    losses = {}
    for name, flags in (("turned", []), ("plain", []), ("stored", ["--exif-rotation", "off"])):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(4):
            image = picture(number, (40, 64))
            if name != "plain":
                image = image.transpose(Image.Transpose.ROTATE_90)
            (folder / f"{number}.png").write_bytes(encoded(image, "PNG", 1 if name == "plain" else 6))
        rows = "".join(f"{number}.png,picture {number}\n" for number in range(4))
        (folder / "t.csv").write_text(f"filepath,caption\n{rows}")
        argv = (
            f"--train-data {folder / 't.csv'} --model lotlip_tiny --captions raw --batch-size 4 --epochs 1 --workers 0"
        )
        argv += f" --logs {tmp_path / 'logs'} --name {name} --no-pretrained-text --device cpu --log-every-n-steps 1"
        assert main([*argv.split(), *flags]) == 0
        lines = (tmp_path / "logs" / name / "metrics.jsonl").read_text()
        losses[name] = [line for line in lines.splitlines() if "train/loss" in line][0].split('"train/loss": ')[1][:12]
    assert losses["turned"] == losses["plain"] != losses["stored"]
