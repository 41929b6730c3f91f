"""Folders of shards know what they are made from, one command at a time writes them, arrays cover every shard."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_faults import GOOD
from test_train_data import write_shard

from training.prepare.__main__ import main
from training.prepare.work import items_of_job
from training.readers.samples import read_samples
from training.runtime.lease import Lease


def table(path: Path, word: str = "one") -> Path:
    columns = {"url": [f"http://a/{n}" for n in range(4)], "long_caption": [f"{word} {n}" for n in range(4)]}
    pq.write_table(pa.table(columns), path)
    return path


def shard(path: Path, numbers: range) -> Path:
    path.parent.mkdir(exist_ok=True)
    return Path(write_shard(path, {f"{n}": GOOD | {"json": b'{"url": "http://a/%d"}' % n} for n in numbers}))


def join(*argv: object) -> int:
    return main(["join", *map(str, argv), "--workers", "1"])


def refused(capsys, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        join(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_other_shards_or_tables_under_the_same_names_are_refused(tmp_path, capsys):
    rows, out = table(tmp_path / "t.parquet"), tmp_path / "out"
    first, second = shard(tmp_path / "a" / "0.tar", range(2)), shard(tmp_path / "b" / "0.tar", range(2, 4))
    assert join(rows, "--shards", first.parent, "--out", out) == 0
    before = (out / "0.tar").read_bytes()
    assert "0.tar is made from another shard than" in refused(capsys, rows, "--shards", second.parent, "--out", out)
    table(tmp_path / "t.parquet", "two")  # same name, same size
    assert "made from other tables" in refused(capsys, rows, "--shards", first.parent, "--out", out)
    assert (out / "0.tar").read_bytes() == before
    table(tmp_path / "t.parquet")
    first.parent.rename(tmp_path / "moved")
    assert join(rows, "--shards", tmp_path / "moved", "--out", out) == 0
    assert "1 of them before" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.tar").write_bytes(b"mine")
    said = refused(capsys, rows, "--shards", tmp_path / "moved", "--out", tmp_path / "other")
    assert "holds 0.tar, which this command did not write" in said
    assert (tmp_path / "other" / "0.tar").read_bytes() == b"mine"


def test_a_second_command_in_a_folder_is_refused(tmp_path, capsys):
    rows, path, out = table(tmp_path / "t.parquet"), shard(tmp_path / "a" / "0.tar", range(2)), tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out / ".jobs" / "all-0-of-1")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert "is in use by process" in refused(capsys, rows, "--shards", path.parent, "--out", out)
        # Jobs with other shares of the same folder are meant to run at the same time.
        assert join(rows, "--shards", path.parent, "--out", out, "--shard-range", "0:1") == 0
    finally:
        holder.kill()
        holder.wait()
    assert join(rows, "--shards", path.parent, "--out", out) == 0  # the holder has ended without returning it


HOLD = """import sys, pathlib, time
from training.runtime.lease import Lease
with Lease() as lease:
    lease.take(pathlib.Path(sys.argv[1]), "--out")
    print("held", flush=True)
    time.sleep(600)
"""


def test_links_to_shards_stay_links(tmp_path):
    rows, real = table(tmp_path / "t.parquet"), shard(tmp_path / "real" / "x.tar", range(2))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.tar").symlink_to(real)
    for _ in range(2):
        assert join(rows, "--shards", tmp_path / "links", "--in-place") == 0
    assert (tmp_path / "links" / "0.tar").is_symlink()
    assert all(b"long_caption" in sample.files["json"] for sample in read_samples(str(real)))
    with tarfile.open(real) as tar:
        assert len(tar.getmembers()) == 6


@pytest.mark.parametrize("tasks", [(3, 17), (1, 2, 5), (0, 10, 11, 40), (7,), (4, 5, 6), (2, 4, 6)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_arrays_of_any_numbers_cover_every_shard(tasks, ranks):
    steps = {b - a for a, b in zip(tasks, tasks[1:])}
    names = {"COUNT": len(tasks), "MIN": min(tasks), "MAX": max(tasks), "STEP": steps.pop() if len(steps) == 1 else 1}
    if tasks == (3, 17):
        names["STEP"] = 1  # what SLURM says for a list
    done, orders = set(), []
    for task in tasks:
        for rank in range(ranks):
            environ = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (names | {"ID": task}).items()}
            environ |= {"SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_PROCID": str(rank)}
            orders.append(items_of_job(range(64), None, environ))
            done |= set(orders[-1])
    assert done == set(range(64)) and len({order[0] for order in orders}) == len(orders)


def test_what_is_left_to_other_jobs_is_said(tmp_path, capsys):
    rows = table(tmp_path / "t.parquet")
    for number in range(3):
        shard(tmp_path / "a" / f"{number}.tar", range(2))
    assert join(rows, "--shards", tmp_path / "a", "--out", tmp_path / "out", "--shard-range", "0:1") == 0
    assert "left to other jobs: 2 shards (1.tar, 2.tar)" in capsys.readouterr().out


def test_a_lease_of_this_process_is_returned(tmp_path):
    with Lease() as lease:
        lease.take(tmp_path / "x", "--out")
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("name", "keys"), [("photos/{}.jpg", "{}"), ("{}.JPG", "d/{}"), ("{}", "./d/{}"), ("d/{}.png", "d/{}")]
)
def test_tables_of_image_names_are_joined_by_stem(tmp_path, form, name, keys, capsys):
    rows = [{"file_name": name.format(n), "text": f"photo {n}"} for n in range(4)]
    target = tmp_path / f"t.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), target)
    elif form == "jsonl":
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        target.write_text("file_name,text\n" + "".join(f"{row['file_name']},{row['text']}\n" for row in rows))
    (tmp_path / "a").mkdir()
    write_shard(tmp_path / "a" / "0.tar", {keys.format(n): {"jpg": GOOD["jpg"]} for n in range(5)})
    assert join(target, "--shards", tmp_path / "a", "--key-column", "file_name", "--out", tmp_path / "out") == 0
    assert "5 samples by key: 4 matched, 1 unmatched" in capsys.readouterr().out
    found = [json.loads(s.files.get("json", b"{}")) for s in read_samples(str(tmp_path / "out" / "0.tar"))]
    assert [record.get("text") for record in found] == [*(f"photo {n}" for n in range(4)), None]


def test_a_name_in_several_folders_matches_none(tmp_path, capsys):
    rows = [{"key": "a/1.jpg", "text": "a"}, {"key": "b/1.jpg", "text": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for folder, keys, said in (("s", ["1"], "1 unmatched"), ("t", ["a/1", "c/1"], "1 matched, 1 unmatched")):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", {key: {"jpg": GOOD["jpg"]} for key in keys})
        out = tmp_path / f"{folder}-new"
        assert join(tmp_path / "t.parquet", "--shards", tmp_path / folder, "--out", out, "--match", "key") == 0
        assert said in capsys.readouterr().out


def test_only_public_addresses_are_kept(tmp_path):
    bad = [
        "file:///etc/hostname",
        "ftp://x.org/1",
        "http://169.254.169.254/latest/",
        "http://localhost/1",
        "http://[::1]/1",
    ]
    bad += ["https://10.0.0.1/1", "http://127.1/1", "http://2130706433/1", "https://a.internal/1"]
    good = ["http://x.org/1.jpg", "HTTPS://a.b.example.com:8080/x?y=1", "http://8.8.8.8/1"]
    lines = "".join(f"{url},A wall. It is day.\n" for url in (*bad, *good))
    (tmp_path / "t.csv").write_text(f"url,long_caption\n{lines}")
    assert main(["tables", str(tmp_path / "t.csv"), "--out", str(tmp_path / "parts"), "--workers", "1"]) == 0
    assert pq.read_table(tmp_path / "parts").column("url").to_pylist() == good
    summary = json.loads((tmp_path / "parts" / "_summary.json").read_text())
    assert (summary["rows"], summary["bad_url"], summary["kept"]) == (12, 9, 3)
