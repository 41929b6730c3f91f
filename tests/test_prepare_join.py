"""Captions from tables are added to existing shards: to the right samples, and nothing else changes."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_train_data import jpeg, write_shard

from support import run_command
from training.prepare import shards as shard_files
from training.prepare.__main__ import main
from training.prepare.work import items_of_job
from training.readers.samples import index_shard, read_samples

NUM = 40


def url(number: int) -> str:
    return f"https://example.com/{number}.jpg"


def captions(number: int) -> dict:
    return {"raw_caption": f"raw {number}", "longSV_captions": f"Long {number}. \u00e4\u00f6.", "longIB_captions": None}


def write_tables(folder: Path, numbers: list[int]) -> Path:
    """Writes captions in several files of small row groups, in another order than the shards."""
    folder.mkdir()
    rows = [{"url": url(n), "key": f"{n:06d}", **captions(n)} for n in numbers]
    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    for part in range(3):
        table = pa.Table.from_pylist(rows[part::3], schema)
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=4)
    return folder


def sample(number: int) -> dict[str, bytes]:
    record = {"url": url(number), "width": 8, "raw_caption": "old"}
    return {"jpg": jpeg(number), "json": json.dumps(record, indent=4).encode(), "npy": b"\x93NUMPY" + bytes(number)}


def write_set(folder: Path, form: int = tarfile.PAX_FORMAT) -> dict[str, dict[str, bytes]]:
    """Writes four shards of ten samples; returns their files by name."""
    folder.mkdir()
    for s in range(4):
        samples = {f"{n:06d}": sample(n) for n in range(10 * s, 10 * s + 10)}
        write_shard(folder / f"{s}.tar", samples, form)
    return {path.name: members(path) for path in sorted(folder.glob("*.tar"))}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


def headers(path: Path) -> list[tuple]:
    with tarfile.open(path) as tar:
        return [(m.name, m.type, m.mode, m.mtime, m.uid, m.uname, m.linkname) for m in tar]


def join(*words: object) -> int:
    return main(["join", *map(str, words), "--workers", "1"])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_sample_gets_its_own_captions_and_all_else_stays(tmp_path, form):
    numbers = [n for n in range(NUM + 5) if n % 7 != 3][::-1]
    tables, before = write_tables(tmp_path / "tables", numbers), write_set(tmp_path / "set", form)
    words = [tables, "--shards", tmp_path / "set", "--out", tmp_path / "new"]
    assert join(*words, "--summary", tmp_path / "s.json") == 0
    for name, files in before.items():
        after = members(tmp_path / "new" / name)
        assert list(after) == list(files)
        assert headers(tmp_path / "new" / name) == headers(tmp_path / "set" / name)
        for member, content in files.items():
            number = int(member[:6])
            if not member.endswith("json") or number not in numbers:
                assert after[member] == content
                continue
            added = {k: v for k, v in captions(number).items() if v}
            assert json.loads(after[member]) == json.loads(content) | added
        index = index_shard(tmp_path / "new" / name)  # as the loader sees it
        assert index.fault is None and len(index.offsets) == 10
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["samples"], summary["matched"]) == (40, 34) and summary["unmatched"] == 6
    assert json.loads((tmp_path / "new" / "sizes.json").read_text()) == dict.fromkeys(before, 10)


def test_by_key_into_shards_without_any_captions(tmp_path):
    long_name = "folder/" + "x" * 150 + "/000003"
    samples = {"000001": {"jpg": jpeg(1)}, "000002": {"jpg": jpeg(2), "json": b"{broken"}, long_name: {"jpg": jpeg(3)}}
    samples |= {"other": {"jpg": jpeg(4), "json": b'{"key": "000004"}'}, "nobody": {"jpg": jpeg(5), "json": b"[1]"}}
    (tmp_path / "set").mkdir()
    write_shard(tmp_path / "set" / "0.tar", samples)
    tables = write_tables(tmp_path / "tables", list(range(9)))
    assert join(tables, "--shards", tmp_path / "set", "--in-place", "--summary", tmp_path / "s.json") == 0
    read = {s.key: s.files for s in read_samples(str(tmp_path / "set" / "0.tar"))}
    assert list(read) == list(samples)
    for key, number in (("000001", 1), (long_name, 3), ("other", 4)):
        assert json.loads(read[key]["json"])["longSV_captions"] == captions(number)["longSV_captions"]
        assert read[key]["jpg"] == samples[key]["jpg"]
    assert read["000002"] == samples["000002"] and read["nobody"] == samples["nobody"]
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["matched"], summary["broken JSON"], summary["JSON not an object"]) == (3, 1, 1)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_files_with_holes_keep_their_content(tmp_path, form):
    (tmp_path / "set").mkdir()
    content = bytes(3_000_000) + jpeg(1)
    with open(tmp_path / "1.bin", "wb") as file:
        file.seek(3_000_000)
        file.write(jpeg(1))
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    shard = tmp_path / "set" / "0.tar"
    subprocess.run(["tar", "-S", f"--format={form}", "-cf", shard, "-C", tmp_path, "1.bin", "1.jpg"], check=True)
    pq.write_table(pa.table({"key": ["1"], "long_caption": ["Long."]}), tmp_path / "t.parquet")
    assert join(tmp_path / "t.parquet", "--shards", shard, "--in-place") == 0
    assert members(shard) == {"1.bin": content, "1.jpg": jpeg(1), "1.json": b'{"long_caption": "Long."}'}


def test_existing_captions_stay_if_asked(tmp_path):
    write_set(tmp_path / "set")
    tables = write_tables(tmp_path / "tables", list(range(NUM)))
    assert join(tables, "--shards", tmp_path / "set", "--in-place", "--keep-existing") == 0
    record = json.loads(members(tmp_path / "set" / "0.tar")["000000.json"])
    assert record["raw_caption"] == "old" and record["longSV_captions"] == captions(0)["longSV_captions"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_stopped_join_continues_and_gives_the_same_bytes(tmp_path, in_place, monkeypatch, capsys):
    tables = write_tables(tmp_path / "tables", list(range(NUM)))
    for name in ("a", "b"):
        write_set(tmp_path / name)

    def words(name: str) -> list:
        target = ["--in-place"] if in_place else ["--out", tmp_path / f"{name}-new"]
        return [tables, "--shards", tmp_path / name, *target]

    assert join(*words("a")) == 0
    real, left = shard_files.atomic_write, [3]

    def stopping(target):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(target)

    monkeypatch.setattr(shard_files, "atomic_write", stopping)
    assert join(*words("b")) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert join(*words("b")) == 0
    assert "4 shards, 2 of them before" in capsys.readouterr().out
    folders = [tmp_path / (name if in_place else f"{name}-new") for name in "ab"]
    for path in folders[0].glob("*.tar"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
    # A table with other captions is joined again in place; a folder made from the old one is not overwritten.
    pq.write_table(pa.table({"url": [url(0)], "longSV_captions": ["New."]}), tmp_path / "more.parquet")
    if not in_place:
        with pytest.raises(SystemExit):
            join(tmp_path / "more.parquet", *words("b")[1:])
        return
    assert join(tmp_path / "more.parquet", *words("b")[1:]) == 0
    assert json.loads(members(folders[1] / "0.tar")["000000.json"])["longSV_captions"] == "New."


def test_jobs_of_an_array_share_the_shards(tmp_path, monkeypatch, capsys):
    tables = write_tables(tmp_path / "tables", list(range(NUM)))
    write_set(tmp_path / "set")
    words = [tables, "--shards", tmp_path / "set", "--out", tmp_path / "new"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    done = []
    for task in (1, 2, 3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert join(*words) == 0
        done.append(capsys.readouterr().out.split("\n")[0])
    assert [line[:13] for line in done] == ["2 of 4 shards", "1 of 4 shards", "1 of 4 shards"]
    assert json.loads((tmp_path / "new" / "sizes.json").read_text()) == {f"{s}.tar": 10 for s in range(4)}


def test_shares_are_disjoint_and_whole():
    items = list(range(103))
    for environ in ({}, {"WORLD_SIZE": "4"}, {"SLURM_STEP_NUM_TASKS": "3"}, {"SLURM_NTASKS": "3", "SLURM_PROCID": "0"}):
        ranks = int(environ.get("WORLD_SIZE", environ.get("SLURM_STEP_NUM_TASKS", 1)))
        name = "RANK" if "WORLD_SIZE" in environ else "SLURM_PROCID"
        for tasks in (1, 5):
            array = {"SLURM_ARRAY_TASK_COUNT": str(tasks), "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2"}
            got = []
            for task in range(tasks):
                for rank in range(ranks):
                    where = environ | array | {"SLURM_ARRAY_TASK_ID": str(10 + 2 * task), name: str(rank)}
                    got += items_of_job(items, None, where)
            assert sorted(got) == items
    assert items_of_job(items, "5:8", {}) == [5, 6, 7] and items_of_job(items, "100:", {}) == [100, 101, 102]


def test_broken_shards_are_named_and_the_others_done(tmp_path, capsys):
    tables = write_tables(tmp_path / "tables", list(range(NUM)))
    before = write_set(tmp_path / "set")
    broken = tmp_path / "set" / "1.tar"
    broken.write_bytes(broken.read_bytes()[:5000])
    assert join(tables, "--shards", tmp_path / "set", "--in-place") == 1
    out = capsys.readouterr().out
    assert f"not done: {broken}: truncated" in out and "30 samples by url: 30 matched" in out
    assert broken.stat().st_size == 5000
    assert members(tmp_path / "set" / "2.tar") != before["2.tar"]


def test_processes_write_what_one_writes(tmp_path):
    tables = write_tables(tmp_path / "tables", list(range(NUM)))
    write_set(tmp_path / "set")
    words = [str(tables), "--shards", str(tmp_path / "set")]
    assert join(*words, "--out", tmp_path / "one") == 0
    done = run_command("training.prepare", ["join", *words, "--out", str(tmp_path / "two"), "--workers", "2"])
    assert done.returncode == 0 and "40 matched" in done.stdout, done.stderr
    for path in (tmp_path / "one").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{t}", "--shards", "{s}"], "one of the arguments --out --in-place is required"),
        (["{t}", "--shards", "{s}", "--out", "{s}"], "this is the folder of the shards"),
        (["{t}", "--shards", "{s}::{s2}", "--out", "{o}"], "have the same name"),
        (["{t}", "--shards", "https://a/0.tar", "--in-place"], "is not a plain tar file on a disk"),
        (["{t}", "--shards", "pipe:cat 0.tar", "--out", "{o}"], "a command has no name under which to write"),
        (["{t}", "--shards", "{o}/no.tar", "--out", "{o}"], "1 of 1 shards are missing"),
        (["{s}", "--shards", "{s}", "--out", "{o}"], "no .csv, .tsv, .parquet"),
        (["no.parquet", "--shards", "{s}", "--out", "{o}"], "no.parquet: no such file"),
        (["{csv}", "--shards", "{s}", "--out", "{o}"], "t.csv: no column url; it has a, b"),
        (["{t}", "--shards", "{s}", "--out", "{o}", "--columns", "x"], "no column x"),
        (["{t}", "--shards", "{s}", "--out", "{o}", "--shard-range", "3"], "expected A:B"),
    ],
)
def test_usage_errors(tmp_path, words, said, capsys):
    write_tables(tmp_path / "t", [1, 2, 3])
    write_set(tmp_path / "s")
    os.symlink(tmp_path / "s", tmp_path / "s2")
    (tmp_path / "t.csv").write_text("a,b\n")
    there = {name: tmp_path / name for name in ("t", "s", "s2", "o")} | {"csv": tmp_path / "t.csv"}
    with pytest.raises(SystemExit) as stop:
        join(*(word.format(**there) for word in words))
    assert stop.value.code == 2 and said in capsys.readouterr().err
