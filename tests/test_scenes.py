"""The drawn scenes: the same seed gives the same bytes, readers accept every layout, captions are true."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from dataloaders import scenes
from dataloaders.dci import read_dci
from dataloaders.iiw import read_iiw
from dataloaders.scene_drawing import BACKGROUNDS, COLOURS, draw_scene, large_object_prompts, make_scene
from dataloaders.share4v import read_share4v
from dataloaders.urban1k import read_urban1k
from support import run_command


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_and_a_second_call_replaces_the_first(tmp_path):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        scenes.write_scenes(tmp_path / out, num_train=5, num_test=7, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["train/00000.tar"] != digests(tmp_path / "c")["train/00000.tar"]
    scenes.write_scenes(
        tmp_path / "b", num_train=2, num_test=3, seed=3
    )  # a smaller set: no file of the larger one may remain
    scenes.write_scenes(tmp_path / "b", num_train=5, num_test=7, seed=3)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_all_four_readers_find_every_scene(scenes):
    sets = [read_dci(scenes / "dci"), read_iiw(scenes / "iiw"), read_urban1k(scenes / "urban1k")]
    sets += read_share4v(scenes / "share4v", scenes / "share4v" / "anno.json", [25])
    labels = json.loads((scenes / "test_labels.json").read_text())
    assert labels["prompts"] == large_object_prompts() and len(labels["prompts"]) == 48
    for s in sets:
        pixels = [p.read_bytes() for p in s.image_paths]
        assert pixels == [(scenes / name).read_bytes() for name in labels["images"]]
        for caption, label in zip(s.captions, labels["labels"]):
            assert labels["prompts"][label].removeprefix("a ") in caption
    assert len({c for s in sets for c in s.captions}) == 100  # each benchmark has its own wording


def test_shards_hold_the_published_keys(scenes):
    with tarfile.open(scenes / "train" / "00000.tar") as tar:
        names = tar.getnames()
        row = json.load(tar.extractfile("000000007.json"))
        text = tar.extractfile("000000007.txt").read().decode()
    assert names == [f"{i:09d}.{suffix}" for i in range(40) for suffix in ("jpg", "txt", "json")]
    assert row["raw_caption"] == text
    longs = [row[key] for key in ("longIB_captions", "longSV_captions", "longLLA_captions")]
    assert all(text.removeprefix("a ") in caption for caption in longs) and len(set(longs)) == 3


def test_captions_say_what_is_drawn():
    for index in range(200):
        scene = make_scene(0, "train", index)
        assert 3 <= len(scene.objects) <= 6
        sentences = scene.long_caption(index % 3)
        assert len(sentences) == len(scene.objects) + 1
        image = draw_scene(scene, 128)
        for o in scene.objects:
            sentence = next(s for s in sentences if f"{o.size} {o.colour} {o.shape}" in s)
            assert o.place in sentence
            if o.shape != "ring":  # the middle of a ring shows the background
                assert image.getpixel((round(o.x * 128), round(o.y * 128))) == COLOURS[o.colour]
        assert image.getpixel((0, 0)) in (BACKGROUNDS[scene.background], *COLOURS.values())
        assert sum(scene.background in s for s in sentences) == 1


@pytest.mark.parametrize("argv", [["OUT", "--test", "0"], ["OUT", "--train", "x"], ["OUT", "--train", "-1"], []])
def test_usage_errors_exit_2(argv, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        scenes.main([str(tmp_path / word) if word == "OUT" else word for word in argv])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_folder_with_other_content_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        scenes.main([str(tmp_path)])
    assert stop.value.code == 2 and "holds other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_runs_as_a_command(tmp_path):
    done = run_command("dataloaders.scenes", [str(tmp_path / "s"), "--train", "3", "--test", "2", "--seed", "5"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "train" / "00000.tar").is_file()
