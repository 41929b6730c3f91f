"""The four readers against recorded output of the published loaders, and irregular files found in practice."""

import itertools
import json
import os
import shutil

import pytest
from PIL import Image

from dataloaders.dci import read_dci
from dataloaders.iiw import read_iiw
from dataloaders.pairs import find_images
from dataloaders.share4v import read_share4v
from dataloaders.urban1k import read_urban1k
from support import LAYOUTS, REFERENCE
from training.readers.captions import normalise_caption
from training.readers.images import BrokenImageError, load_rgb

EXPECTED = json.loads((LAYOUTS / "expected.json").read_text())


def read_all(root):
    sv8, sv12 = read_share4v(root / "share4v", root / "share4v_sam.json", [8, 12])
    return {
        "dci": read_dci(root / "dci"),
        "iiw": read_iiw(root / "iiw", root / "iiw_annotations"),
        "share4v_8": sv8,
        "share4v_12": sv12,
        "urban1k": read_urban1k(root / "urban1k"),
    }


@pytest.mark.parametrize("name", ["dci", "iiw", "share4v_8", "share4v_12", "urban1k"])
def test_pairs_captions_and_order_equal_the_published_loaders(name):
    got = read_all(LAYOUTS)[name]
    assert [str(p.relative_to(LAYOUTS)) for p in got.image_paths] == [row["image"] for row in EXPECTED[name]]
    assert list(got.captions) == [row["caption"] for row in EXPECTED[name]]
    assert list(got.image_of_caption) == list(range(len(EXPECTED[name])))
    assert [load_rgb(p).size for p in got.image_paths] == [tuple(row["size"]) for row in EXPECTED[name]]


def test_normalised_captions_equal_the_published_rule():
    raw = json.loads((REFERENCE / "captions.json").read_text())
    assert [normalise_caption(text) for text in raw] == json.loads((REFERENCE / "captions_normalised.json").read_text())


def test_decimal_points_split_as_published():
    assert normalise_caption("A 3.5 m pole.\n\nTwo birds</s> . ") == "A 3. 5 m pole. Two birds"


def test_dci_accepts_the_inner_folder_and_keeps_the_order_of_splits(layouts):
    base = layouts / "dci" / "densely_captioned_images"
    splits = json.loads((base / "splits.json").read_text())
    (base / "splits.json").write_text(json.dumps({k: splits[k][::-1] for k in ("test", "train", "valid")}))
    names = [n for k in ("test", "train", "valid") for n in splits[k][::-1]]
    images = [json.loads((base / "annotations" / n).read_text())["image"] for n in names]
    assert [p.name for p in read_dci(base).image_paths] == images


def test_iiw_keys_and_missing_suffixes(layouts):
    rows = {
        "DOCCI_Test": [{"image": "test_00001", "IIW": "One."}, {"image": "test_00002.jpg", "IIW": "Two."}],
        "IIW-400": [{"image/key": "aar_test_04600", "IIW": "Three."}],
        "DCI_Test": [{"image": "sa_7.jpg", "IIW": "Fünf Vögel 🐦."}],
    }
    for subset, content in rows.items():
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n\n"
        (layouts / "iiw_annotations" / subset / "data.jsonl").write_text(text, encoding="utf-8")
    got = read_iiw(layouts / "iiw", layouts / "iiw_annotations")
    folders = ["docci/test_00001.jpg", "docci/test_00002.jpg", "docci_aar/aar_test_04600.jpg", "dci/sa_7.jpg"]
    assert [str(p.relative_to(layouts / "iiw")) for p in got.image_paths] == folders
    assert got.captions == ("One", "Two", "Three", "Fünf Vögel 🐦")


def test_share4v_images_are_found_by_name_in_any_tree(layouts):
    root = layouts / "share4v"
    for i, path in enumerate(sorted(root.rglob("*.jpg"))):
        target = root / ("unpacked" if i % 2 else "other/deep") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    got = read_share4v(root, layouts / "share4v_sam.json", [12])[0]
    assert [p.name for p in got.image_paths] == [os.path.basename(row["image"]) for row in EXPECTED["share4v_12"]]
    assert all(p.is_file() for p in got.image_paths)


def test_share4v_name_in_two_folders_is_an_error_only_when_the_path_does_not_decide(layouts):
    root = layouts / "share4v"
    image = next(root.rglob("sa_3.jpg"))
    (root / "copy").mkdir()
    shutil.copy(image, root / "copy" / "sa_3.jpg")
    assert read_share4v(root, layouts / "share4v_sam.json", [12])[0].image_paths.count(image) == 1
    image.rename(root / "sa_3.jpg")
    with pytest.raises(ValueError, match="sa_3.jpg is in 2 folders"):
        read_share4v(root, layouts / "share4v_sam.json", [12])


def test_urban1k_reads_both_public_forms_alike(layouts):
    first = read_urban1k(layouts / "urban1k")
    other = layouts / "other"
    shutil.copytree(layouts / "urban1k" / "image", other / "images")
    rows = [
        {"image_id": i, "image": p.name, "caption": (layouts / "urban1k/caption" / f"{p.stem}.txt").read_text()}
        for i, p in enumerate(reversed(first.image_paths))
    ]
    (other / "annotations").mkdir()
    (other / "annotations" / "annotations.json").write_text(json.dumps({"annotations": rows}))
    second = read_urban1k(other)
    assert second.captions == first.captions
    assert [p.name for p in second.image_paths] == [p.name for p in first.image_paths]


def test_urban1k_takes_the_first_line_sorts_numbers_and_reads_unicode_names(tmp_path):
    (tmp_path / "caption").mkdir()
    for name in ("10", "9", "straße", "._9"):
        (tmp_path / "caption" / f"{name}.txt").write_text(f"Caption {name}.\nsecond line", encoding="utf-8")
    got = read_urban1k(tmp_path)
    assert got.captions == ("Caption 9", "Caption 10", "Caption straße")
    assert [p.name for p in got.image_paths] == ["9.jpg", "10.jpg", "straße.jpg"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_image_mode_becomes_rgb(mode, tmp_path):
    grey = Image.new("L", (6, 4), 128)
    if mode == "I;16":
        image = Image.new("I;16", (6, 4), 128 * 257)
    else:
        image = grey.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "RGBA") else grey.convert(mode)
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "F": "tiff", "LA": "png", "PA": "tiff", "I": "tiff"}.get(mode, "png")
    image.save(tmp_path / f"x.{suffix}")
    got = load_rgb(tmp_path / f"x.{suffix}")
    assert got.mode == "RGB" and got.size == (6, 4)
    if mode == "1":  # conversion to black and white dithers
        assert {got.getpixel((x, y)) for x in range(6) for y in range(4)} == {(0,) * 3, (255,) * 3}
    else:
        assert all(abs(value - 128) <= 2 for value in got.getpixel((3, 2)))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n\x00\x00", None])
def test_broken_images_are_named(content, tmp_path):
    path = tmp_path / "bild ü.jpg"
    if content is None:  # a JPEG that ends in the middle
        Image.effect_noise((64, 64), 90).convert("RGB").save(path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(BrokenImageError, match="bild ü.jpg"):
        load_rgb(path)


def test_files_shared_by_links_are_one_image(layouts):
    sets = list(read_all(layouts).values())
    target = sets[-1].image_paths[0]
    target.unlink()
    os.link(sets[0].image_paths[0], target)
    found_sets, identity = find_images(sets)
    assert [len(s.captions) for s in found_sets] == [12, 12, 8, 12, 12]
    assert identity[target] == identity[sets[0].image_paths[0]]
    assert len(set(identity.values())) == 12 + 12 + 12 + 12 - 1  # the 8 images of share4v are among its 12
    for first, second in itertools.combinations(identity, 2):
        assert os.path.samefile(first, second) == (identity[first] == identity[second])
