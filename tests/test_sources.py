"""Every kind of table and folder that people have is trained on, evaluated and resumed; and all are read alike."""

import csv
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dataloaders.own import read_table_pairs
from eval_files import write_image
from support import SMALL_LOTLIP, read_results
from training.main import main
from training.readers.images import load_rgb
from training.readers.table_files import local_spec

NUM = 16


def rows(folder: Path, image: str = "filepath", caption: str = "caption") -> list[dict]:
    return [
        {image: write_image(folder / f"{n:02d}.png", n).name, caption: f'picture "{n}", of {NUM}'} for n in range(NUM)
    ]


def write_csv(path: Path, content: list[dict], separator: str = ",", encoding: str = "utf-8", **how) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(content[0]), delimiter=separator, lineterminator="\n", **how)
    writer.writeheader()
    writer.writerows(content)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def write_lines(path: Path, content: list[dict]) -> Path:
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n\n" for row in content), encoding="utf-8")
    return path


def write_arrow(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    return path


def inside(folder: Path, kind: pa.DataType = pa.binary()) -> pa.Table:
    content = rows(folder)
    images = [(folder / row["filepath"]).read_bytes() for row in content]
    names = [row["filepath"] for row in content]
    if kind == "struct":
        images = pa.array([{"bytes": data, "path": name} for data, name in zip(images, names)])
    else:
        images = pa.array(images, kind)
    for name in names:
        (folder / name).unlink()
    return pa.table({"image": images, "caption": [row["caption"] for row in content]})


def save_dataset(folder: Path) -> Path:
    """Writes what `datasets.DatasetDict.save_to_disk` writes."""
    for split in ("test", "train"):
        (folder / split).mkdir(parents=True)
        table = inside(folder / split, "struct")
        with pa.ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), table.schema) as out:
            out.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    return folder / "train"


def write_images_with_texts(folder: Path) -> Path:
    for row in rows(folder):
        (folder / row["filepath"]).with_suffix(".txt").write_text(row["caption"])
    return folder


def cached_repository(folder: Path, monkeypatch) -> str:
    """Writes a data set as `huggingface_hub` caches it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = folder / "cache" / "datasets--someone--pictures"
    data = repository / "snapshots" / ("0" * 40) / "data"
    data.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    table = inside(data, "struct")
    for number in range(2):
        pq.write_table(table.slice(8 * number, 8), data / f"train-{number:05d}-of-00002.parquet")
    pq.write_table(table.slice(0, 2), data / "test-00000-of-00001.parquet")
    return "hf:someone/pictures:train"


def conversations(content: list[dict]) -> list[dict]:
    return [
        {
            "id": row["image"],
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe."},
                {"from": "gpt", "value": row["caption"]},
            ],
        }
        for row in content
    ]


SOURCES = {
    "csv": lambda t, _: write_csv(t / "t.csv", rows(t)),
    "csv of Excel": lambda t, _: write_csv(t / "t.csv", rows(t), ";", "utf-8-sig", quoting=csv.QUOTE_ALL),
    "csv of open_clip": lambda t, _: write_csv(t / "t.csv", rows(t, caption="title"), "\t"),
    "tsv": lambda t, _: write_csv(t / "t.tsv", rows(t), "\t"),
    "json": lambda t, _: (t / "t.json").write_text(json.dumps(conversations(rows(t, "image")))) and t / "t.json",
    "jsonl": lambda t, _: write_lines(t / "t.jsonl", rows(t, "image_path", "text")),
    "parquet of paths": lambda t, _: pq.write_table(pa.Table.from_pylist(rows(t)), t / "t.parquet") or t / "t.parquet",
    "arrow with images": lambda t, _: write_arrow(t / "t.arrow", inside(t, pa.binary_view())),
    "folder of parts": lambda t, _: pq.write_table(inside(t, "struct"), t / "p.parquet", row_group_size=5) or t,
    "metadata": lambda t, _: write_lines(t / "metadata.jsonl", rows(t, "file_name", "text")).parent,
    "saved": lambda t, _: save_dataset(t / "saved"),
    "images with texts": lambda t, _: write_images_with_texts(t / "a"),
    "hub": cached_repository,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_source_is_evaluated_trained_on_and_resumed_bit_for_bit(source, tmp_path, monkeypatch):
    spec = str(source(tmp_path, monkeypatch))
    flags = [*SMALL_LOTLIP, "--device", "cpu", "--workers", "0", "--logs", str(tmp_path / "logs")]
    flags += ["--train-data", spec, "--batch-size", "8", "--epochs", "2", "--warmup", "0", "--num-long-captions", "1"]
    flags += ["--captions", "both", "--max-bad-samples", "0"]
    if not spec.endswith(".json"):
        flags += ["--long-caption-keys", "caption,title,text,txt"]
    assert main([*flags, "--retrieval-table", spec, "--name", "whole"]) == 0
    results = read_results(tmp_path / "logs", "whole")
    (images,) = [value for key, value in results.items() if key.endswith("num-images")]
    (pairs,) = [value for key, value in results.items() if key.endswith("num-pairs")]
    assert (images, pairs) == (NUM, NUM)
    whole = tmp_path / "logs" / "whole" / "checkpoints"
    assert main([*flags, "--resume", str(whole / "epoch_1.pt"), "--name", "resumed"]) == 0
    states = [
        torch.load(folder / "epoch_2.pt", weights_only=True)["state_dict"]
        for folder in (whole, tmp_path / "logs" / "resumed" / "checkpoints")
    ]
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states)))


def test_a_data_set_that_is_neither_on_the_hub_nor_cached_is_named(tmp_path, monkeypatch):
    cached_repository(tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match=r"hf:someone/other:train: no data set someone/other .*LocalEntryNotFoundError"
    ):
        local_spec("hf:someone/other:train")


def test_odd_files_of_a_folder_cost_at_most_themselves(tmp_path, capsys):
    """Names with several dots, commas, in both Unicode forms or not UTF-8; captions that are not UTF-8, or none."""
    names = ["a", "a.b", "c, d %20", "caf\u00e9", "cafe\u0301x", os.fsdecode(b"caf\xe9"), "JSON"]
    for number, name in enumerate(names):
        write_image(tmp_path / "d" / f"{name}.jpg", number)
        (tmp_path / "d" / f"{name}.txt").write_text(f"picture {number}")
    (tmp_path / "d" / "JSON.txt").rename(tmp_path / "d" / "JSON.TXT")
    (tmp_path / "d" / "a.txt").rename(tmp_path / "d" / "a.json")
    (tmp_path / "d" / "a.json").write_text('{"title": "picture 0", "caption": null}')
    evaluated = read_table_pairs(tmp_path / "d", "filepath")
    assert sorted(evaluated.captions) == [f"picture {number}" for number in range(len(names))]
    assert len({load_rgb(path).getpixel((3, 3)) for path in evaluated.image_paths}) == len(names)
    write_image(tmp_path / "d" / "bad.jpg", 0), (tmp_path / "d" / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="bad.jpg: text not UTF-8"):
        read_table_pairs(tmp_path / "d", "filepath")
    flags = ["--train-data", str(tmp_path / "d"), "--captions", "raw", "--batch-size", "2", "--epochs", "1"]
    flags += [*SMALL_LOTLIP, "--device", "cpu", "--workers", "0", "--logs", str(tmp_path), "--name", "run"]
    assert main(flags) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "8 samples of 8 there are" in log and "1 skipped (1 text not UTF-8)" in log


FORMS = {
    "one pattern": ("data_files: data/train-*.csv", "", ["data/train-0.csv"]),
    "a list": ("data_files: [data/train-*.csv, data/test-*.csv]", "", ["data/test-0.csv", "data/train-0.csv"]),
    "splits": (
        "data_files: [{split: train, path: data/train-*.csv}, {split: test, path: [data/test-*.csv]}]",
        ":test",
        ["data/test-0.csv"],
    ),
    "a dict": ("data_files: {train: data/train-*.csv, test: data/test-0.csv}", ":all:test", ["data/test-0.csv"]),
    "no files": ("data_files: other-*.csv", "", "none of its files is called other-\\*.csv"),
    "no path": ("data_files: [{split: train}]", "", "README.md: configs in another form"),
    "two splits": ("data_files: {train: a.csv, test: b.csv}", "", "has the splits train, test; name one of them"),
}


@pytest.mark.parametrize(("form", "words", "expected"), FORMS.values(), ids=FORMS)
def test_the_files_of_a_hub_data_set_are_those_that_its_readme_lists(form, words, expected, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  {form}\n---\n")
    (tmp_path / "data").mkdir()
    for name in ("train-0.csv", "test-0.csv"):
        write_csv(tmp_path / "data" / name, rows(tmp_path))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            local_spec(f"hf:{tmp_path}{words}")
    else:
        assert local_spec(f"hf:{tmp_path}{words}").split("::") == [str(tmp_path / name) for name in expected]


def test_a_split_of_a_hub_data_set_of_images_alone_is_its_folder(tmp_path):
    for split in ("train", "test"):
        write_images_with_texts(tmp_path / split)
    assert local_spec(f"hf:{tmp_path}:test") == str(tmp_path / "test")
    with pytest.raises(ValueError, match="nothing called dev among its files"):
        local_spec(f"hf:{tmp_path}:dev")
