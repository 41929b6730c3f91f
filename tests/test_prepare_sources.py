"""Preparation reads what training reads: tables, folders, hub data sets, compressed shards, URLs and loose files."""

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_faults import GOOD
from test_train_data import jpeg, write_shard

from training.prepare.__main__ import main
from training.readers.samples import read_samples

NUM = 6


def texts(number: int) -> list[str]:
    return [f"A dog {number} runs.", f"A dog {number} on grass."]


def inspect(data: object, out: Path, *flags: str) -> dict:
    words = ["inspect", str(data), "--out", str(out), "--model", "lotlip_tiny", "--workers", "1", *flags]
    assert main(words) == 0
    return json.loads((out / "inspect.json").read_text())


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(NUM):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


def write_data(folder: Path, form: str) -> object:
    """Writes the same images, each with two alternative captions, in one of the forms that training reads."""
    images = write_images(folder / "images")
    if form == "folder":
        for number in range(NUM):
            (images / f"{number}.json").write_text(json.dumps({"caption": texts(number)}))
        return images
    if form == "jsonl":
        rows = [{"filepath": f"images/{n}.jpg", "caption": texts(n)} for n in range(NUM)]
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "t.jsonl"
    rows = [{"image": {"bytes": jpeg(n), "path": None}, "caption": texts(n)} for n in range(NUM)]
    (folder / "hub" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "hub" / "data" / "train-00000-of-00001.parquet")
    return f"hf:{folder / 'hub'}"


@pytest.mark.parametrize(("form", "place"), [("jsonl", "1 tables"), ("folder", "1 folders"), ("hub", "1 tables")])
def test_inspect_reads_tables_and_folders_as_training_does(tmp_path, form, place, capsys):
    counted = inspect(write_data(tmp_path, form), tmp_path / "out")
    assert capsys.readouterr().out.startswith(f"{NUM} samples in {place}, {NUM} usable\n")
    assert counted["samples"] == counted["usable"] == counted["with_short_caption"] == NUM
    caption = counted["captions"]["caption"]
    assert (caption["samples"], caption["captions"]) == (NUM, 2 * NUM)
    assert counted["image_width"] == counted["image_height"] != {}
    assert all(text in (tmp_path / "out" / "samples.html").read_text() for n in range(NUM) for text in texts(n))
    joined = inspect(write_data(tmp_path / "again", form), tmp_path / "out", "--caption-lists", "sentences")
    assert joined["captions"]["caption"]["captions"] == NUM


def test_inspect_counts_the_bad_rows_of_a_table(tmp_path):
    write_images(tmp_path / "images")
    rows = [{"filepath": f"images/{n}.jpg", "caption": "A dog."} for n in (0, 1, 99)]
    (tmp_path / "t.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    counted = inspect(tmp_path / "t.jsonl", tmp_path / "out")
    assert counted["samples"] == 4 and counted["usable"] == 2
    assert counted["bad"] == {"broken JSON": 1, "broken image": 1}


def write_shards(folder: Path, form: str) -> str:
    """Writes two shards of three samples; returns the name by which a command reads them."""
    folder.mkdir()
    for shard in range(2):
        samples = {f"{n:04d}": {"jpg": GOOD["jpg"], "json": b'{"n": %d}' % n} for n in range(3 * shard, 3 * shard + 3)}
        path = Path(write_shard(folder / f"{shard:05d}.tar", samples))
        if form == "gz":
            (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        elif form == "files":  # as img2dataset writes them
            with tarfile.open(path) as tar:
                (folder / path.stem).mkdir()
                for member in tar:  # extractall's `filter` is missing from Python 3.11.2
                    (folder / path.stem / member.name).write_bytes(tar.extractfile(member).read())
            (folder / f"{path.stem}.parquet").write_bytes(b"")
            (folder / f"{path.stem}_stats.json").write_text("{}")
            path.unlink()
    return f"local://{folder}/{{00000..00001}}.tar" if form == "url" else str(folder)


def records(folder: Path) -> dict[str, dict]:
    return {
        sample.key: json.loads(sample.files["json"])
        for path in sorted(folder.glob("*.tar"))
        for sample in read_samples(str(path))
    }


@pytest.mark.parametrize("form", ["gz", "url", "files"])
def test_join_reads_compressed_remote_and_loose_shards(tmp_path, form, capsys):
    rows = [{"key": f"{n:04d}", "long_caption": texts(n)[0]} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    shards, out = write_shards(tmp_path / "a", form), tmp_path / "out"
    for _ in range(2):
        assert main(["join", str(tmp_path / "t.parquet"), "--shards", shards, "--out", str(out), "--workers", "1"]) == 0
    assert "2 shards, 2 of them before\n6 samples by key: 5 matched, 1 unmatched" in capsys.readouterr().out
    expected = {f"{n:04d}": {"n": n} | ({"long_caption": texts(n)[0]} if n < 5 else {}) for n in range(6)}
    assert records(out) == expected
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3}
    assert all(sample.files["jpg"] == GOOD["jpg"] for sample in read_samples(str(out / "00001.tar")))
    assert not list(out.rglob("*.tmp"))
    if form == "files":  # folders have no times: the same content gives the same bytes
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        words = ["join", str(tmp_path / "t.parquet"), "--shards", str(tmp_path / "b"), "--out", str(tmp_path / "new")]
        assert main([*words, "--workers", "1"]) == 0
        assert (tmp_path / "new" / "00000.tar").read_bytes() == (out / "00000.tar").read_bytes()


def test_a_broken_compressed_shard_is_named(tmp_path, capsys):
    pq.write_table(pa.table({"key": ["0000"], "long_caption": ["A."]}), tmp_path / "t.parquet")
    shards = write_shards(tmp_path / "a", "gz")
    broken = tmp_path / "a" / "00001.tar.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    words = ["join", str(tmp_path / "t.parquet"), "--shards", shards, "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 1
    assert f"not done: {broken}: " in capsys.readouterr().out
    assert list(records(tmp_path / "out")) == ["0000", "0001", "0002"]


@pytest.mark.parametrize("lists", ["alternatives", "sentences"])
def test_lists_stay_alternatives_when_joined(tmp_path, lists):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A cat sleeps."}]
    rows = [{"key": "0000", "long_caption": ["A dog.", "It runs."], "conversations": turns, "width": 3}]
    (tmp_path / "t.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    words = ["join", str(tmp_path / "t.jsonl"), "--shards", write_shards(tmp_path / "a", "tar"), "--workers", "1"]
    summary = tmp_path / "s.json"
    flags = ["--out", str(tmp_path / "out"), "--caption-lists", lists, "--summary", str(summary)]
    assert main([*words, *flags]) == 0
    text = ["A dog.", "It runs."] if lists == "alternatives" else "A dog. It runs."
    assert records(tmp_path / "out")["0000"] == {"n": 0, "long_caption": text, "conversations": "A cat sleeps."}
    counts = json.loads(summary.read_text())
    assert (counts["table_rows"], counts["malformed_rows"], counts["matched"]) == (2, 1, 1)


def test_quotes_of_spark_and_backslashes_in_names(tmp_path):
    lines = ["file_name,long_caption"]
    lines += [rf'photos\000{n}.jpg,"A sign says \"stop, {n}\", in red."' for n in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    shards = write_shards(tmp_path / "a", "tar")
    words = ["join", str(tmp_path / "t.csv"), "--shards", shards, "--key-column", "file_name", "--workers", "1"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    found = records(tmp_path / "out")
    assert [found[f"{n:04d}"]["long_caption"] for n in range(6)] == [
        f'A sign says "stop, {n}", in red.' for n in range(6)
    ]


def test_tables_reads_keys_that_are_numbers_and_half_surrogate_pairs(tmp_path):
    rows = [{"key": n, "long_caption": "A dog \ud83d runs. It is day."} for n in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["tables", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    written = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["key"] for row in written] == ["0", "1", "2"]
    assert written[0]["long_caption"] == "A dog ? runs. It is day."


def test_a_data_set_that_is_not_on_the_hub_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "hf:no-one/nothing:train", "--out", str(tmp_path), "--model", "lotlip_tiny"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "hf:no-one/nothing:train: no data set no-one/nothing on the hub or in its cache (LocalEntry" in said
