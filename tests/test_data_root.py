"""--data-root: every benchmark at its documented location is found; missing ones are listed once."""

import json
import re
import shutil
from pathlib import Path

import pytest

from eval_files import write_coco, write_docci, write_flickr30k, write_image, write_imagenet, write_imagenet_v2
from support import LAYOUTS, evaluate
from training.flags.parser import parse_args

DOCUMENT = (Path(__file__).parents[1] / "EVAL_DATASETS.md").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Writes all benchmarks, each in the layout that EVAL_DATASETS.md shows."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(LAYOUTS / "dci", root / "dci")
    shutil.copytree(LAYOUTS / "iiw", root / "iiw")
    shutil.copytree(LAYOUTS / "iiw_annotations", root / "iiw", dirs_exist_ok=True)
    shutil.copytree(LAYOUTS / "share4v", root / "share4v")
    shutil.copy(LAYOUTS / "share4v_sam.json", root / "share4v" / "anno.json")
    shutil.copytree(LAYOUTS / "urban1k", root / "Urban1k")
    write_docci((root / "docci").absolute())
    write_coco(root / "coco")
    write_flickr30k(root / "flickr30k")
    write_imagenet(root / "imagenet" / "val")
    write_imagenet_v2(root / "imagenetv2")
    return root


def test_the_document_shows_the_folders_that_are_searched():
    from dataloaders.registry import benchmarks

    for benchmark in benchmarks():
        if benchmark.folder:
            assert re.search(rf"^data/{benchmark.folder}/", DOCUMENT, re.MULTILINE), benchmark.name


def test_all_are_found_and_suites_choose(root, capsys):
    args = parse_args(["--data-root", str(root)])
    found = {name: value for name, value in vars(args).items() if str(value).startswith(str(root))}
    names = "dci iiw share4v urban1k docci coco flickr30k".split()
    wanted = {f"{name}_retrieval" for name in names} | {"share4v_anno", "imagenet_val", "imagenet_v2", "data_root"}
    assert found.keys() == wanted and capsys.readouterr().err == ""
    args = parse_args(["--data-root", str(root), "--suite", "long", "--urban1k-retrieval", "elsewhere"])
    assert (args.docci_retrieval, args.coco_retrieval, args.urban1k_retrieval) == (None, None, "elsewhere")
    assert args.iiw_retrieval == str(root / "iiw")


def test_missing_benchmarks_are_listed_once_and_the_others_evaluated(tmp_path, tiny_clip, capsys):
    for number in range(4):
        write_image(tmp_path / "d" / "urban1k" / "image" / f"{number}.jpg", number)
        caption = tmp_path / "d" / "urban1k" / "caption" / f"{number}.txt"
        caption.parent.mkdir(exist_ok=True)
        caption.write_text(f"Street {number}.")
    (tmp_path / "d" / "iiw").mkdir()  # an incomplete folder
    result = evaluate(tmp_path, tiny_clip, "--data-root", tmp_path / "d", "--suite", "long")
    said = capsys.readouterr().err
    assert result["urban1k-retrieval-num-pairs"] == 4 and result["flags"]["dci_retrieval"] is None
    assert [said.count(f"--{name}-retrieval") for name in ("dci", "iiw", "share4v", "urban1k", "docci")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert "see IIW in EVAL_DATASETS.md" in said and "sa_000138" in said
    assert json.dumps(result["flags"]["suite"]) == '"long"'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data-root", "none"], "--data-root none: no such folder"),
        (["--data-root", "."], "found no benchmark; looked for"),
        (["--dci-retrieval", "D", "--suite", "long"], "--suite: no effect without --data-root"),
    ],
)
def test_usage_errors(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        parse_args(words)
    except SystemExit as stop:
        assert stop.code == 2
    assert said in capsys.readouterr().err
