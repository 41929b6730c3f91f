"""Preparation commands on small folders in the published layouts."""

import json

import pytest

from dataloaders import prepare
from dataloaders.iiw import read_iiw
from dataloaders.share4v import read_items
from support import LAYOUTS


def sv_item(image: str) -> dict:
    return {
        "id": image,
        "image": image,
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": image}],
    }


def test_share4v_keeps_the_first_sa1b_items_in_order(tmp_path, capsys):
    images = [
        "coco/train2017/000000000009.jpg",
        "sam/images/sa_5.jpg",
        "llava/x/sa_pretrain.jpg",
        "sam/images/sa_2.jpg",
    ]
    images += ["sam/images/sa_9.jpg"]
    (tmp_path / "all.json").write_text(json.dumps([sv_item(i) for i in images]))
    argv = ["share4v", str(tmp_path / "all.json"), str(tmp_path / "new" / "anno.json"), "--num", "2"]
    assert prepare.main(argv) == 0
    assert [i for i, _ in read_items(tmp_path / "new" / "anno.json")] == ["sam/images/sa_5.jpg", "sam/images/sa_2.jpg"]
    with pytest.raises(SystemExit) as stop:
        prepare.main([*argv[:-1], "4"])
    assert stop.value.code == 2 and "only 3 of 5 items" in capsys.readouterr().err


@pytest.mark.parametrize("copy", [False, True])
def test_iiw_brings_annotations_and_images_into_place(tmp_path, copy, capsys):
    clone = tmp_path / "imageinwords" / "datasets"
    for subset in ("DOCCI_Test", "IIW-400", "DCI_Test"):
        (clone / subset).mkdir(parents=True)
        (clone / subset / "data.jsonl").write_bytes((LAYOUTS / "iiw_annotations" / subset / "data.jsonl").read_bytes())
    argv = ["iiw", str(tmp_path / "iiw"), "--annotations", str(clone.parent), "--docci", str(LAYOUTS / "iiw")]
    argv += ["--dci", str(LAYOUTS / "iiw" / "dci")] + ["--copy"] * copy
    for _ in range(2):  # a second run changes nothing
        assert prepare.main(argv) == 0
    assert "4 of 4 images" in capsys.readouterr().out
    got, expected = read_iiw(tmp_path / "iiw"), read_iiw(LAYOUTS / "iiw", LAYOUTS / "iiw_annotations")
    assert got.captions == expected.captions
    assert [p.read_bytes() for p in got.image_paths] == [p.read_bytes() for p in expected.image_paths]
    assert got.image_paths[0].is_symlink() != copy


def test_iiw_notes_the_use_of_train_names_and_reports_missing_images(tmp_path, capsys):
    sources = tmp_path / "docci"
    sources.mkdir()
    (sources / "train_00001.jpg").write_bytes(b"1")
    (sources / "aar_test_00003.jpg").write_bytes(b"3")
    rows = {
        "DOCCI_Test": {"image": "test_00001"},
        "IIW-400": {"image/key": "aar_test_00003"},
        "DCI_Test": {"image": "x.jpg"},
    }
    for subset, row in rows.items():
        (tmp_path / "anno" / subset).mkdir(parents=True)
        (tmp_path / "anno" / subset / "data.jsonl").write_text(json.dumps(row | {"IIW": "text"}))
    (tmp_path / "dci").mkdir()
    argv = ["iiw", str(tmp_path / "iiw"), "--annotations", str(tmp_path / "anno"), "--docci", str(sources)]
    assert prepare.main([*argv, "--dci", str(tmp_path / "dci")]) == 1
    out = capsys.readouterr().out
    assert "1 of them were found only under their train_ name" in out
    assert "missing: x.jpg" in out
    assert (tmp_path / "iiw" / "docci" / "test_00001.jpg").read_bytes() == b"1"


def test_iiw_image_in_two_folders_is_an_error(tmp_path, capsys):
    sources = tmp_path / "docci"
    for folder in ("a", "b"):
        (sources / folder).mkdir(parents=True)
        (sources / folder / "docci_test_00000.jpg").write_bytes(b"1")
    argv = ["iiw", str(tmp_path / "iiw"), "--annotations", str(LAYOUTS / "iiw_annotations"), "--docci", str(sources)]
    with pytest.raises(SystemExit) as stop:
        prepare.main([*argv, "--dci", str(LAYOUTS / "iiw" / "dci")])
    assert stop.value.code == 2 and "docci_test_00000.jpg is in" in capsys.readouterr().err
