"""Preparation commands on small folders in the published layouts."""

import json
import shutil

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


def test_iiw_is_read_through_links_to_the_folders_of_its_images(tmp_path):
    """The commands of EVAL_DATASETS.md."""
    root = tmp_path / "iiw"
    shutil.copytree(LAYOUTS / "iiw_annotations", root)
    for folder in ("docci", "docci_aar", "dci"):
        (root / folder).symlink_to(LAYOUTS / "iiw" / folder)
    found, expected = read_iiw(root), read_iiw(LAYOUTS / "iiw", LAYOUTS / "iiw_annotations")
    assert found.fingerprint() == expected.fingerprint() and all(path.is_file() for path in found.image_paths)
