"""Columns of tables: which types hold captions and images, equal images, and what is said about rows left out."""

import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_tables import pairs, trained

from dataloaders.own import read_table_pairs
from eval_files import write_image
from support import SMALL_LOTLIP
from training.data.open import caption_rule, open_source
from training.data.sizes import count_samples
from training.data.tables import embedded_sources, read_rows, read_tables
from training.flags.parser import parse_args
from training.main import main
from training.prepare.columns import open_large
from training.readers.images import load_rgb
from training.runtime.distributed import DistEnv

TEXTS = ["a red cube", "two dogs"]


def write_arrow(path, columns: dict) -> str:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    return str(path)


def images(folder, num: int) -> list[bytes]:
    return [write_image(folder / f"{n}.png", n).read_bytes() for n in range(num)]


KINDS = {
    "large_string": (pa.large_string(), TEXTS),
    "string_view": (pa.string_view(), TEXTS),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), TEXTS),
    "list": (pa.list_(pa.string()), [[text] for text in TEXTS]),
    "list_view": (pa.list_view(pa.large_string()), [[text] for text in TEXTS]),
    "list of lists": (pa.list_(pa.list_(pa.string())), [[[text]] for text in TEXTS]),
}


def test_half_a_surrogate_pair_is_no_caption(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"filepath": "a.jpg", "caption": "one"}\n{"filepath": "b.jpg", "caption": "\\ud83d"}\n')
    with pytest.raises(ValueError, match="row 2, caption: half a surrogate pair"):
        read_table_pairs(path, "filepath", ["caption"], "raw")


def test_images_in_bytes_of_one_length_are_read_alike(tmp_path):
    content = [data.ljust(4000, b"\0") for data in images(tmp_path, 2)]
    path = write_arrow(tmp_path / "i.arrow", {"image": pa.array(content, pa.binary(4000)), "caption": TEXTS})
    assert read_table_pairs(path, "filepath", ["caption"], "raw").captions == tuple(TEXTS)
    assert embedded_sources(path, "filepath") == [[path]] and [row.image for row in read_rows(path)] == content


@pytest.mark.parametrize(("kind", "values"), KINDS.values(), ids=KINDS)
def test_captions_of_every_type_of_text_are_read_alike(kind, values, tmp_path):
    captions = pa.array(values, pa.string()).cast(kind) if isinstance(values[0], str) else pa.array(values, kind)
    # A column that can't hold captions is no obstacle.
    others = {"map": pa.array([[("a", "b")], []], pa.map_(pa.string(), pa.string())), "none": pa.nulls(2)}
    content = images(tmp_path, 2)
    inside = write_arrow(tmp_path / "i.arrow", {"image": content, "caption": captions, **others})
    beside = write_arrow(tmp_path / "p.arrow", {"filepath": ["0.png", "1.png"], "caption": captions, **others})
    for path in (inside, beside):
        assert list(read_table_pairs(path, "filepath", ["caption"], "raw").captions) == TEXTS
    (rows,) = read_tables([tmp_path / "p.arrow"], None, ["caption"], None, 0).parts()
    for found in (read_rows(inside), rows.read()):
        assert [sample.record["caption"] for sample in found] == values


@pytest.mark.parametrize("kind", [pa.decimal128(5, 2), pa.null(), pa.int64(), pa.map_(pa.string(), pa.string())])
def test_columns_that_hold_no_text_are_refused_by_name_and_type(kind, tmp_path, capsys):
    path = write_arrow(tmp_path / "t.arrow", {"filepath": ["0.png"], "caption": pa.nulls(1, kind)})
    flags = [*SMALL_LOTLIP, "--device", "cpu", "--logs", str(tmp_path), "--workers", "0"]
    for argv in (["--retrieval-table", path], ["--train-data", path, "--captions", "raw"]):
        assert main([*flags, *argv]) == 2
        said = capsys.readouterr().err
        assert f"{argv[0]} {path}: no texts or lists of texts in caption ({kind})" in said


def test_of_several_image_columns_one_has_to_be_named(tmp_path):
    content = images(tmp_path, 4)
    columns = {"left": content[:2], "right": content[2:], "caption": TEXTS}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    asked = "several columns hold images: left, right; name one with --csv-img-key"
    with pytest.raises(ValueError, match=asked):
        read_table_pairs(tmp_path / "t.parquet", "filepath", ["caption"], "raw")
    with pytest.raises(ValueError, match=asked):
        embedded_sources(str(tmp_path / "t.parquet"), "filepath")
    found = read_table_pairs(tmp_path / "t.parquet", "right", ["caption"], "raw")
    assert load_rgb(found.image_paths[1]).tobytes() == load_rgb(content[3]).tobytes()
    ((name,),) = embedded_sources(str(tmp_path / "t.parquet"), "right")
    assert [sample.image for sample in read_rows(name)] == content[2:]


def test_rows_of_equal_images_are_one_image_with_several_captions_and_this_is_said(tmp_path, caplog, capsys):
    red, blue = images(tmp_path, 2)
    rows = {"image": [red, blue, red], "caption": ["red", "blue", "crimson"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    with caplog.at_level(logging.WARNING):
        found = read_table_pairs(tmp_path / "t.parquet", "image", ["caption"], "raw")
    assert found.captions == ("red", "crimson", "blue") and found.image_of_caption == (0, 0, 1)
    assert "1 rows hold the same bytes as the image of an earlier row" in caplog.text
    argv = [*SMALL_LOTLIP, "--train-data", str(tmp_path / "t.parquet"), "--captions", "raw"]
    argv += ["--batch-size", "3", "--epochs", "1", "--warmup", "0", "--workers", "0", "--device", "cpu"]
    assert main([*argv, "--logs", str(tmp_path / "logs")]) == 0
    assert "1 of the first 3 rows hold the image of an earlier row" in capsys.readouterr().err


def test_training_says_how_many_of_the_rows_it_reads(tmp_path, capsys):
    for n in range(4):
        write_image(tmp_path / f"a b {n}.png", n)
    lines = [f"a b {n}.png,picture {n}" for n in range(4)] + ["c.png,one, two", "d.png"]
    (tmp_path / "t.csv").write_text("filepath,caption\n" + "\n".join(lines) + "\n")
    argv = [*SMALL_LOTLIP, "--train-data", str(tmp_path / "t.csv"), "--captions", "raw"]
    argv += ["--batch-size", "4", "--epochs", "1", "--warmup", "0", "--workers", "0", "--device", "cpu"]
    assert main([*argv, "--logs", str(tmp_path / "logs")]) == 0
    said = capsys.readouterr().err
    assert "4 samples of 6 there are" in said and "2 of 6 rows left out: line 6: 3 cells, the header has 2" in said
    assert "4 samples read, 0 skipped" in said


def test_samples_of_shards_are_counted_in_the_log(scenes, caplog):
    spec = str(scenes / "train")
    args = parse_args(["--train-data", spec])
    with caplog.at_level(logging.INFO):
        source = open_source(args, "--train-data", spec, caption_rule(args), DistEnv(0, 1, torch.device("cpu")))
    assert f"--train-data {spec}: {source.num_samples} samples of {source.num_samples} there are" in caplog.text


def test_each_line_of_a_text_beside_an_image_may_be_a_caption(tmp_path):
    write_image(tmp_path / "a" / "0.png", 0).with_suffix(".txt").write_text("one\ntwo\n")
    assert read_table_pairs(tmp_path / "a", "filepath", ["txt"], "raw").captions == ("one\ntwo",)
    assert read_table_pairs(tmp_path / "a", "filepath", ["txt"], "raw", lines=True).captions == ("one", "two")


def test_variables_in_the_names_of_tables(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text(json.dumps({"filepath": "x.png", "caption": "one"}))
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    for spec in ("${MY_DATA}/t.jsonl", f"file://{tmp_path}/t.jsonl", "$MY_DATA/{t..t}.jsonl"):
        found = read_table_pairs(spec, "filepath", ["caption"], "raw")
        assert [os.fspath(path) for path in found.image_paths] == [f"{tmp_path}/x.png"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet", "t.arrow", "0.tar"])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"{name}: a Git LFS pointer, not the file itself; fetch it with git lfs pull"):
        if name == "0.tar":
            count_samples([str(path)])
        else:
            read_tables([path], "filepath", ["caption"], None, 0)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_object_around_the_list_of_rows_is_read_however_it_is_written(indent, tmp_path):
    path = tmp_path / "t.json"
    rows = [{"filepath": "a.jpg", "caption": "one"}, {"filepath": "b.jpg", "caption": "two"}]
    path.write_text(json.dumps({"info": {}, "images": rows}, indent=indent))
    assert pairs(path) == trained(path) == [("a.jpg", "one"), ("b.jpg", "two")]


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.jpg", "conversations": [{"from": "gpt", "value": "one"}]},
        {"url": "http://a", "conversations": [{"from": "gpt", "value": "one"}]},
        {"image": "a.jpg", "caption": "one", "regions": [{"box": [1, 2, 3, 4]}]},
        {"url": "http://a", "caption": "one"},
    ],
)
def test_a_json_file_of_one_line_may_be_one_row(row, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(row))
    assert list(open_large(tmp_path / "t.json").stream(list(row))) == [(list(row.values()), False)]
