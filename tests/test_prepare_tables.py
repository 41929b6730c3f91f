"""Caption tables become clean parts: every row is kept or counted, whatever its faults, even after many stops."""

import csv
import io
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import run_command
from training.data.captions import CaptionRule, choose_captions
from training.prepare import tables as parts_module
from training.prepare.__main__ import main
from training.prepare.clean import is_repetitive
from training.prepare.tables import first_of_each
from training.readers import csv_rows

LONG = ("longIB_captions", "longSV_captions", "longLLA_captions")
SHORT = ("shortIB_captions", "shortSV_captions", "shortLLA_captions")
HEADER = ["Image Path", "raw_caption", *(name for pair in zip(SHORT, LONG) for name in pair)]
SORRY = "I'm sorry, I cannot help with identifying people in this image."


def row(number: int, **changes: str) -> dict[str, str]:
    """Returns one row in the published format."""
    texts = {name: f'Number {number} in {name}, "quoted". It goes on,\nover lines.' for name in LONG}
    base = {"Image Path": f"https://example.com/{number}.jpg", "raw_caption": f"raw {number}"}
    return base | {name: f"A short {number}." for name in SHORT} | texts | changes


def write_csv(path: Path, rows: list[dict[str, str]], header: list[str] = HEADER) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(out: Path, *words: object) -> dict:
    assert main(["tables", *map(str, words), "--out", str(out), "--workers", "1"]) == 0
    return json.loads((out / "_summary.json").read_text())


def parts(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("[!.]*")}


def sizes(summary: dict) -> dict[str, int]:
    return {kind: summary[kind] for kind in parts_module.ROW_KINDS}


def test_every_row_is_kept_or_counted_by_kind(tmp_path):
    refused, empty = dict.fromkeys(LONG, SORRY), dict.fromkeys(LONG, " ")
    rows = [row(0), row(1, **{LONG[0]: SORRY}), row(2, **refused), row(3, **empty), row(1), row(4), row(4), row(5)]
    rows += [row(6, **{"Image Path": ""}), row(7, **refused), row(7)]  # repeating a refused row is no duplicate
    path = write_csv(tmp_path / "t.csv", rows)
    with open(path, "a") as file:
        file.write("https://example.com/8.jpg,too,few\n\n")
    summary = run(tmp_path / "out", path, "--rows-per-part", "3", "--summary", tmp_path / "s.json")
    expected = {"rows": 12, "kept": 5, "duplicates": 2, "empty": 1, "refused": 2, "malformed": 2, "bad_url": 0}
    assert sizes(summary) == expected
    assert json.loads((tmp_path / "s.json").read_text()) == summary
    written = parts(tmp_path / "out")
    assert list(written[0]) == ["url", "key", "raw_caption", *LONG, *SHORT]
    assert [Path(r["url"]).stem for r in written] == ["0", "1", "4", "5", "7"]
    assert written[1][LONG[0]] is None and written[1][LONG[1]] == row(1)[LONG[1]]
    assert summary["captions"][LONG[0]]["refused"] == 3
    assert len({r["key"] for r in written}) == 5
    # training finds these under its default keys
    assert len(set(choose_captions(written[0], CaptionRule(), random.Random(0)))) == 4


def test_parts_are_the_same_bytes_however_often_a_run_is_stopped(tmp_path, monkeypatch):
    rng = random.Random(0)
    path = write_csv(tmp_path / "a.csv", [row(rng.randrange(60)) for _ in range(90)])
    second = write_csv(tmp_path / "b.csv", [row(rng.randrange(90)) for _ in range(40)])
    words = [path, second, "--rows-per-part", "8"]
    whole = run(tmp_path / "whole", *words)
    assert whole["kept"] == len({r["url"] for r in parts(tmp_path / "whole")})

    # Stop before the first write, then before the second, and so on, until a run completes.
    real, num_stops = parts_module.atomic_write, 0
    from training.prepare import work

    for count in range(1, 200):
        left = [count]

        def stopping(target, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return real(target)

        for module in (parts_module, work):
            monkeypatch.setattr(module, "atomic_write", stopping)
        code = main(["tables", *map(str, words), "--out", str(tmp_path / "stopped"), "--workers", "1"])
        num_stops += code == 130
        if code == 0:
            break
    assert num_stops > 5
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_processes_give_the_same_bytes_as_one(tmp_path):
    path = write_csv(tmp_path / "a.csv", [row(n % 50) for n in range(70)])
    run(tmp_path / "one", path, "--rows-per-part", "10")
    done = run_command(
        "training.prepare",
        ["tables", str(path), "--out", str(tmp_path / "two"), "--workers", "2", "--rows-per-part", "10"],
    )
    assert done.returncode == 0, done.stderr
    assert "50 of 70 rows kept in 5 parts" in done.stdout and "Traceback" not in done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_killed_run_leaves_no_processes_and_continues(tmp_path):
    path = write_csv(tmp_path / "a.csv", [row(n % 900) for n in range(2000)])
    words = ["tables", str(path), "--out", str(tmp_path / "out"), "--workers", "2", "--rows-per-part", "100"]
    command = [sys.executable, "-m", "training.prepare", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob("out/part-*.parquet")):
        time.sleep(0.01)
    process.kill()
    process.communicate()  # returns when no process has the other end of the pipes
    assert not (tmp_path / "out" / "_summary.json").exists()
    run(tmp_path / "out", path, "--rows-per-part", "100")
    run(tmp_path / "whole", path, "--rows-per-part", "100")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_damaged_row_groups_are_counted(tmp_path, caplog):
    rows = [row(n) for n in range(60)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(3)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    summary = run(tmp_path / "out", path)
    assert (summary["rows"], summary["kept"], summary["malformed"]) == (60, 40, 20)
    assert "row group 1 is damaged, 20 rows lost" in caplog.text


def test_csv_and_parquet_and_other_column_names_give_the_same(tmp_path):
    rows = [row(n) for n in range(30)]
    run(tmp_path / "csv", write_csv(tmp_path / "t.csv", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=7)
    run(tmp_path / "parquet", tmp_path / "t.parquet")
    names = {name: f"c{i}" for i, name in enumerate(HEADER)}
    renamed = [{names[k]: v for k, v in r.items()} for r in rows]
    write_csv(tmp_path / "r.csv", renamed, list(names.values()))
    flags = ["--url-column", names["Image Path"], "--raw-column", names["raw_caption"]]
    flags += ["--long-columns", ",".join(f"{names[n]}={n}" for n in LONG)]
    flags += ["--short-columns", ",".join(f"{names[n]}={n}" for n in SHORT)]
    run(tmp_path / "renamed", tmp_path / "r.csv", *flags)
    assert parts(tmp_path / "csv") == parts(tmp_path / "parquet") == parts(tmp_path / "renamed")
    assert len(parts(tmp_path / "csv")) == 30


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_sentence_lists_and_other_published_tables(form, tmp_path, capsys):
    table = pa.table(
        {
            "url": ["http://a/1.jpg", "http://a/2.jpg"],
            "org_caption": ["one", None],
            "re_caption": [["A dog.", "It runs"], ["A cat."]],
        }
    )
    file = tmp_path / f"recap.{form}"
    if form == "csv":  # as pandas writes lists
        pd.DataFrame(table.to_pylist()).to_csv(file, index=False)
    else:
        pq.write_table(table, file)
    with pytest.raises(SystemExit):
        run(tmp_path / "refused", file)
    assert "a cell holds 2 captions ('A dog.', ..)" in capsys.readouterr().err
    run(tmp_path / "out", file, "--caption-lists", "sentences")
    written = parts(tmp_path / "out")
    assert [r["long_caption"] for r in written] == ["A dog. It runs.", "A cat."]
    assert [r["raw_caption"] for r in written] == ["one", None]


def test_an_unclosed_quote_costs_only_its_own_row(tmp_path, monkeypatch):
    good = io.StringIO(newline="")
    writer = csv.DictWriter(good, HEADER)
    writer.writerows([row(n) for n in range(400)])
    head = ",".join(HEADER) + "\r\n"
    broken = 'https://example.com/x.jpg,"never closed, a,b\r\n'
    for place, text in (("first", broken + good.getvalue()), ("last", good.getvalue() + broken.rstrip())):
        path = tmp_path / f"{place}.csv"
        path.write_bytes((head + text).encode())
        summary = run(tmp_path / place, path, "--rows-per-part", "100")
        assert (summary["kept"], summary["malformed"]) == (400, 1), place
    monkeypatch.setattr(csv_rows, "MAX_ROW_BYTES", 2000)
    path = tmp_path / "endless.csv"
    path.write_bytes((head + "https://example.com/y.jpg," + "word " * 2000 + "\r\n" + good.getvalue()).encode())
    assert run(tmp_path / "endless", path)["kept"] == 400


def test_quotes_may_be_plain_characters(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text(
        'url\tcaption\nhttp://a/1\t"Two" dogs\nhttp://a/2\t"a pipe of 5"\nhttp://a/3\t"open\nhttp://a/4\tx\n'
    )
    summary = run(tmp_path / "out", path, "--no-quotes")
    assert summary["kept"] == 4
    assert [r["raw_caption"] for r in parts(tmp_path / "out")] == ['"Two" dogs', '"a pipe of 5"', '"open', "x"]


def test_encodings_are_repaired_and_counted(tmp_path):
    path = tmp_path / "t.csv"
    lines = [
        "\ufeffurl,raw_caption,long_caption",
        "http://a/1,caf\u00c3\u00a9,Caf\u00e9 &amp; bar. It's open\\n2. Yes.</s>",
    ]
    path.write_bytes("\n".join(lines).encode() + b"\nhttp://a/2,caf\xe9,Na\xefve art.\nhttp://a/3,a\0b,Fine.\n")
    summary = run(tmp_path / "out", path)
    first, second, third = parts(tmp_path / "out")
    assert first["raw_caption"] == second["raw_caption"] == "caf\u00e9"
    assert first["long_caption"] == "Caf\u00e9 & bar. It's open\n2. Yes."
    assert second["long_caption"] == "Na\u00efve art." and third["raw_caption"] == "ab"
    assert summary["captions"]["raw_caption"]["repaired"] == 2


def test_repetitions():
    assert (
        is_repetitive("A dog " + "and a cat " * 6)
        and is_repetitive("no " * 5)
        and is_repetitive("x " * 3 + "a b c d " * 4 + "a b")
    )
    assert not is_repetitive("A dog and a cat and a bird and a tree stand on a hill, and a man and a woman look on.")


def test_duplicates_are_found_as_by_a_set(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 40, n) for n in (30, 0, 25, 1)]
    files = []
    for number, array in enumerate(arrays):
        files.append(tmp_path / f"{number}.parquet")
        names = [f"http://a/{value}" for value in array.tolist()]
        urls = [name if number % 2 else None for number, name in enumerate(names)]
        pq.write_table(pa.table({"url": pa.array(urls, pa.string()), "key": pa.array(names, pa.string())}), files[-1])
    seen: Counter = Counter()
    expected = []
    for array in arrays:
        expected.append([not seen[v] and not seen.update([v]) for v in array.tolist()])
    assert [keep.tolist() for keep in first_of_each(files)] == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.csv"], "no.csv: no such file"),
        (["{here}/empty"], "no .csv, .tsv, .parquet, .arrow, .jsonl, .json and no images"),
        (["{here}/a.zip"], "unpack or convert it"),
        (["{here}/t.csv", "{here}/t.csv"], "named twice"),
        (["{here}/bad.parquet"], "bad.parquet: not a readable table"),
        (["{here}/other.csv"], "no column of image URLs (--url-column)"),
        (["{here}/t.csv", "--url-column", "u"], "no column u (--url-column); it has 'url', 'a', 'b'"),
        (["{here}/t.csv"], "no captions; it has 'url', 'a', 'b'"),
        (["{here}/t.csv", "--long-columns", "a=x,b=x"], "two columns would be written as x"),
        (["{here}/utf16.csv"], "UTF-16"),
        (["{here}/nothing.csv"], "no header"),
    ],
)
def test_usage_errors_name_the_file_and_the_flag(tmp_path, words, said, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.csv").touch()
    (tmp_path / "a.zip").write_bytes(b"x")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "utf16.csv").write_text("url,caption\n", encoding="utf-16")
    (tmp_path / "t.csv").write_text("url,a,b\nx,y,z\n")
    (tmp_path / "other.csv").write_text("x,caption\n1,2\n")
    with pytest.raises(SystemExit) as stop:
        main(["tables", *(word.format(here=tmp_path) for word in words), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_of_other_parts_is_left_alone(tmp_path, capsys):
    path = write_csv(tmp_path / "t.csv", [row(n) for n in range(3)])
    run(tmp_path / "out", path)
    before = contents(tmp_path / "out")
    for extra in (["--keep-cut-off"], ["--rows-per-part", "2"]):
        with pytest.raises(SystemExit):
            main(["tables", str(path), "--out", str(tmp_path / "out"), *extra])
        assert "with other flags" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tables", str(path), "--out", str(tmp_path)])
    assert "holds something else" in capsys.readouterr().err
    assert run(tmp_path / "out", path)["kept"] == 3 and contents(tmp_path / "out") == before
