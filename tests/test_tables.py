"""Tables found in practice: open quotes, stray separators, images inside, several files, data sets from the hub."""

import base64
import csv
import io
import json
import logging
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataloaders.own import read_table_pairs
from eval_files import write_image
from support import SMALL_LOTLIP
from training.data.shards import ShardSource
from training.data.sizes import count_samples
from training.data.tables import embedded_sources, read_rows, read_tables
from training.flags.parser import parse_args
from training.main import main
from training.prepare.columns import open_large
from training.readers.csv_rows import CsvForm, CsvRecords
from training.readers.images import load_rgb
from training.readers.table_files import names_tables, table_files


def pairs(spec, image="filepath", captions=("caption",), separator=None):
    found = read_table_pairs(spec, image, captions, "raw", separator)
    return list(zip((found.image_paths[i].name for i in found.image_of_caption), found.captions))


def trained(path, image="filepath", captions=("caption",), separator=None):
    source = read_tables([path], image, captions, separator, seed=0)
    rows = [sample for part in source.parts() for sample in part.read()]
    return [(row.image_path.rsplit("/", 1)[-1], row.record[captions[0]]) for row in rows]


@pytest.mark.parametrize("quote_in", [3, 10, 19])
@pytest.mark.parametrize("order", ["image first", "caption first"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_quote_that_is_never_closed_costs_one_row_at_most(suffix, order, quote_in, tmp_path, caplog):
    separator = "," if suffix == "csv" else "\t"
    rows = [(f"{i}.jpg", f"picture number {i}") for i in range(20)]
    rows[quote_in] = (rows[quote_in][0], '"Best view of the bay')
    rows[5] = (rows[5][0], '"the fifth"')  # so that this file uses quoting
    header = ("filepath", "caption")
    lines = [separator.join(row if order == "image first" else row[::-1]) for row in (header, *rows)]
    path = tmp_path / f"t.{suffix}"
    path.write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING):
        found = trained(path)
    expected = [(name, text.strip('"') if name == "5.jpg" else text) for name, text in rows]
    assert found in (expected, expected[:quote_in] + expected[quote_in + 1 :])
    assert len(found) == 20 or f"1 of 20 rows left out: line {quote_in + 2}: a quotation mark" in caplog.text
    with pytest.raises(ValueError, match=f"line {quote_in + 2}: a quotation mark that is never closed"):
        pairs(path)


def test_unquoted_separators_stop_an_evaluation_and_are_counted_in_training(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_text("filepath,caption\na.jpg,one\nb.jpg,two, three, four\nc.jpg\nd.jpg,five\n")
    with pytest.raises(ValueError, match="line 3: 4 cells, the header has 2 .2 bad rows in all"):
        pairs(path)
    with caplog.at_level(logging.WARNING):
        assert trained(path) == [("a.jpg", "one"), ("d.jpg", "five")]
    assert "2 of 4 rows left out: line 3: 4 cells, the header has 2" in caplog.text


def test_a_file_written_without_quoting_is_read_completely(tmp_path, caplog):
    rows = [(f"{i}.jpg", f'a 5" ruler, number {i}' if i % 2 else f'"quoted" word {i}') for i in range(9)]
    rows[4] = ("4.jpg", '"open')
    path = tmp_path / "t.tsv"
    path.write_text("filepath\tcaption\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    with caplog.at_level(logging.WARNING):
        assert pairs(path) == rows == trained(path)
    assert caplog.text.count("quotation marks are read as plain characters") == 2


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_cells_of_several_lines_are_read_as_the_csv_module_does(end, mark, tmp_path):
    rows = [("a.jpg", f"line one{end}line two, with a comma"), ("b.jpg", 'a "word"'), ("c.jpg", "plain")]
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([("filepath", "caption"), *rows])
    path = tmp_path / "t.csv"
    path.write_bytes((mark + text.getvalue()).encode())
    assert pairs(path) == rows == trained(path)


def test_other_encodings_and_line_ends(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_bytes("filepath,caption\na.jpg,caf\xe9\nb.jpg,two\n".encode("cp1252"))
    assert pairs(path) == trained(path) == [("a.jpg", "caf\xe9"), ("b.jpg", "two")]
    assert caplog.text.count("1 rows are not UTF-8, and are read as Windows-1252") == 2
    path.write_bytes(b"filepath,caption\ra.jpg,one\r")
    for read in (pairs, trained):
        with pytest.raises(ValueError, match="CR alone"):
            read(path)
    path.write_text("filepath,caption,caption\na.jpg,one,two\n")
    for read in (pairs, trained):
        with pytest.raises(ValueError, match="two columns are called 'caption'"):
            read(path)


def test_a_separator_by_flag_is_that_of_every_reader(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("filepath;caption\na.jpg;one, two\n")
    assert pairs(path, separator=";") == trained(path, separator=";") == [("a.jpg", "one, two")]
    (tmp_path / "t.jsonl").write_text('{"filepath": "a.jpg", "caption": "one"}\n')
    for other in (hub_file(tmp_path / "h.parquet", 2), tmp_path / "t.jsonl"):
        for flag in ("--retrieval-table", "--train-data"):
            with pytest.raises(SystemExit) as stop:
                parse_args([flag, str(other), "--csv-separator", ";", "--captions", "raw"])
            assert stop.value.code == 2 and "--csv-separator: no effect without a .csv" in capsys.readouterr().err


def hub_file(path, num_rows, first=0, beside=None):
    """Writes a Parquet or Arrow file like those on the hub; `beside` is a row whose image is a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(first, first + num_rows):
        image = write_image(path.parent / "images" / f"{i}.png", i)
        inside = {"bytes": image.read_bytes(), "path": image.name}
        outside = {"bytes": None, "path": f"images/{i}.png"}
        rows.append({"image": outside if i == beside else inside, "caption": [f"short {i}", f"long {i}"], "label": i})
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=3)
    else:
        pq.write_table(table, path, row_group_size=3)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_inside_a_table_are_evaluated(suffix, tmp_path):
    path = hub_file(tmp_path / f"h.{suffix}", 70, beside=4)
    found = read_table_pairs(path, "filepath", ["caption"], "raw")
    assert len(found.image_paths) == 70 and found.captions[8:10] == ("short 4", "long 4")
    for i in (69, 0, 4, 66, 2):
        expected = load_rgb(tmp_path / "images" / f"{i}.png")
        assert load_rgb(found.image_paths[i]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_inside_tables_are_trained_on_as_shards(suffix, tmp_path):
    for number in range(3):
        hub_file(tmp_path / f"{number}.{suffix}", 7, first=7 * number, beside=4)
    (urls,) = embedded_sources(str(tmp_path), "filepath")
    source = ShardSource(urls, count_samples(urls), seed=0, window=5)
    whole = list(source.read(0, 0, 21))
    assert sorted(s.record["caption"][1] for s in whole) == sorted(f"long {i}" for i in range(21))
    for sample in whole:
        number = int(sample.record["caption"][0].split()[1])
        content = (tmp_path / "images" / f"{number}.png").read_bytes()
        assert sample.files.get("jpg") == (None if number == 4 else content) and set(sample.record) == {"caption"}
        assert (sample.image_path is not None) == (number == 4)
    keys = [(s.source, s.key) for s in whole]
    for skip in (1, 5, 13):
        assert [(s.source, s.key) for s in source.read(0, 0, 21, skip)] == keys[skip:]


def test_rows_of_a_stretch_are_those_of_the_whole_file(tmp_path):
    path = str(hub_file(tmp_path / "h.parquet", 11))
    whole = [s.record["caption"][0] for s in read_rows(path)]
    for first in range(12):
        for stop in range(first, 13):
            assert [s.record["caption"][0] for s in read_rows(path, first, stop)] == whole[first:stop]


def test_folders_of_data_sets(tmp_path):
    hub = tmp_path / "hub" / "data"
    files = [hub_file(hub / f"train-{i:05d}-of-00002.parquet", 2, first=2 * i) for i in range(2)]
    assert table_files(str(tmp_path / "hub")) == files and names_tables(str(tmp_path / "hub"))
    found = read_table_pairs(tmp_path / "hub", "image", ["caption"], "raw")
    assert len(found.image_paths) == 4 and found.key == "hub-retrieval"
    hub_file(hub / "test-00000-of-00001.parquet", 1)
    with pytest.raises(ValueError, match=r"splits test, train; name one of them, such as '.*/data/test-\*.parquet'"):
        table_files(str(tmp_path / "hub"))
    assert table_files(f"{hub}/train-*.parquet") == files
    (hub / "test-00000-of-00001.parquet").unlink()
    files[1].unlink()
    with pytest.raises(ValueError, match="found 1 of 2 files"):
        table_files(str(tmp_path / "hub"))

    saved = tmp_path / "saved"
    for split in ("train", "test"):
        name = hub_file(saved / split / "data-00000-of-00001.arrow", 2).name
        (saved / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        hub_file(saved / split / "cache-0123.arrow", 1)
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert names_tables(str(saved))
    with pytest.raises(ValueError, match=f"several splits; name one of them: {saved}/test, {saved}/train"):
        table_files(str(saved))
    assert [path.name for path in table_files(str(saved / "test"))] == ["data-00000-of-00001.arrow"]


def test_several_tables_are_one_set_and_one_source(tmp_path):
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text(f"filepath,caption\n{number}.jpg,caption {number}\nx.jpg,again\n")
    spec = f"{tmp_path}/one/t.csv::{tmp_path}/two/t.csv"
    assert pairs(spec) == [("0.jpg", "caption 0"), ("x.jpg", "again"), ("1.jpg", "caption 1"), ("x.jpg", "again")]
    source = read_tables(table_files(spec), "filepath", ("caption",), None, seed=0)
    found = {(s.image_path, s.record["caption"]) for s in source.read(0, 0, 4)}
    assert found == {
        (f"{tmp_path}/one/0.jpg", "caption 0"),
        (f"{tmp_path}/one/x.jpg", "again"),
        (f"{tmp_path}/two/1.jpg", "caption 1"),
        (f"{tmp_path}/two/x.jpg", "again"),
    }
    with pytest.raises(ValueError, match="named twice"):
        table_files(f"{tmp_path}/one/t.csv::{tmp_path}/one/*.csv")
    assert not names_tables(str(tmp_path)) and not names_tables("shards/{000..001}.tar")


NOT_PATHS = [
    (["https://x.org/1.jpg"], r"row 1: the image is a URL \(https://x.org/1.jpg\)"),
    (
        [base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(99)).decode()],
        "row 1: the image is a text of 140 characters.*bytes",
    ),
    ([[{"bytes": b"1", "path": None}]], "row 1: the image is a list"),
    ([7], "row 1: the image is a int. Expected a path"),
]


@pytest.mark.parametrize(("images", "said"), NOT_PATHS)
def test_images_that_are_no_paths_are_refused_with_what_was_found(images, said, tmp_path):
    pq.write_table(pa.table({"filepath": images, "caption": ["one"]}), tmp_path / "t.parquet")
    for read in (pairs, trained):
        with pytest.raises(ValueError, match=said):
            read(tmp_path / "t.parquet")


def test_a_column_may_hold_the_short_and_the_long_caption(tmp_path):
    (tmp_path / "t.csv").write_text("filepath,caption\na.jpg,one\n")
    assert trained(tmp_path / "t.csv", captions=("caption", "caption")) == [("a.jpg", "one")]
    pq.write_table(pa.table({"filepath": ["a.jpg"], "caption": [["one", "two"]]}), tmp_path / "t.parquet")
    assert trained(tmp_path / "t.parquet", captions=("caption", "caption")) == [("a.jpg", ["one", "two"])]


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
def test_tables_of_other_formats_are_refused_as_tables(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"x")
    for flag in ("--retrieval-table", "--train-data"):
        assert main([flag, str(tmp_path / name), "--device", "cpu", "--logs", str(tmp_path)]) == 2
        assert (
            f"{flag} {tmp_path / name}: expected .csv, .tsv, .parquet, .arrow, .jsonl, .json; unpack"
            in capsys.readouterr().err
        )


def test_training_and_evaluation_on_a_folder_of_the_hub(tmp_path, capsys):
    for number in range(2):
        hub_file(tmp_path / "hub" / "data" / f"train-{number:05d}-of-00002.parquet", 8, first=8 * number)
    hub = str(tmp_path / "hub")
    flags = [*SMALL_LOTLIP, "--device", "cpu", "--workers", "0", "--logs", str(tmp_path / "logs")]
    data = ["--train-data", hub, "--captions", "raw", "--batch-size", "8", "--epochs", "1", "--warmup", "0"]
    assert main([*flags, *data, "--retrieval-table", hub, "--name", "run"]) == 0
    assert "16 samples read, 0 skipped" in capsys.readouterr().err
    results = json.loads((tmp_path / "logs/run/checkpoints/results.jsonl").read_text().splitlines()[-1])
    assert results["hub-retrieval-num-images"] == 16


def test_tables_of_two_kinds_are_refused(tmp_path, capsys):
    hub_file(tmp_path / "h.parquet", 2)
    (tmp_path / "t.csv").write_text("filepath,caption\na.jpg,one\n")
    argv = ["--device", "cpu", "--logs", str(tmp_path), "--captions", "raw", "--train-data"]
    assert main([*argv, f"{tmp_path}/h.parquet::{tmp_path}/t.csv"]) == 2
    assert "t.csv beside tables that hold the images themselves" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "none" / "x.parquet")]) == 2
    assert "--train-data" in capsys.readouterr().err


MESSY = [
    "dog",
    " ",
    "\n",
    "\r\n",
    '"',
    ",",
    '""',
    ".",
    "caf\u00e9",
    "\t",
    "\r",
    "\0",
    "\x85",
    "\u2028",
    "\x0b",
    "x.jpg,",
    "http://a/b.jpg,",
]


def messy_table(rng):
    """Returns the bytes of a table without header, with a few bytes that don't belong there; and its form."""
    separator, quoted = rng.choice(",,\t;"), rng.random() < 0.85
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator=rng.choice(["\n", "\r\n"]))
    for number in range(rng.randint(1, 60)):
        writer.writerow([f"http://h/{number}.jpg", "A dog, a cat.", "".join(rng.choices(MESSY, k=rng.randint(0, 6)))])
    content = bytearray(text.getvalue().encode(rng.choice(["utf-8", "utf-8", "utf-8", "cp1252"]), "replace"))
    for _ in range(rng.choice([0, 0, 1, 4])):
        content.insert(rng.randrange(len(content)), rng.choice(b'""",\r\n\t\xe9\0'))
    return bytes(content), CsvForm(separator, quoted)


def test_a_messy_table_is_read_on_alike_from_the_end_of_any_row(tmp_path):
    rng, path = random.Random(1), tmp_path / "t.csv"
    for _ in range(150):
        content, form = messy_table(rng)
        path.write_bytes(form.separator.join("abc").encode() + b"\n" + content)
        records = CsvRecords(path, form)
        whole = list(records.read())
        number = rng.randrange(len(whole))
        assert list(records.read(whole[number].end)) == whole[number + 1 :], (content, form)
        assert list(records.read(end=whole[number].end)) == whole[: number + 1]
        assert all(first.end <= second.begin for first, second in zip(whole, whole[1:]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "filepath,caption\na.jpg,caf\xe9\n".encode("utf-16-le"), "UTF-16"),
        ("t.jsonl", '{"filepath": "a.jpg", "caption": "one"}\n'.encode("utf-16"), "lines without a JSON object"),
        ("t.jsonl", b"", "an empty file without a JSON object"),
        ("t.jsonl", b'{"caption": ' + b"[" * 9000 + b"]" * 9000 + b"}", "lines without a JSON object"),
    ],
)
def test_files_that_are_no_tables_are_named_by_every_reader(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    for read in (pairs, trained, open_large):
        with pytest.raises(ValueError, match=f"{name}: .*{said}"):
            read(tmp_path / name)


def test_lines_of_blanks_are_no_rows_and_a_lone_cr_is_named(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_text("filepath,caption\n  \na.jpg,one\n\t\nb.jpg,two\n ")
    assert pairs(path) == trained(path) == [("a.jpg", "one"), ("b.jpg", "two")] and not caplog.records
    path.write_bytes(b"filepath,caption\na.jpg,one\nb.jpg,t\rwo\n")
    with pytest.raises(ValueError, match="line 3: .*or a CR outside of quotes"):
        pairs(path)
