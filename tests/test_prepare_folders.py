"""Folders of shards know what they are made from, one command at a time writes them, arrays cover every shard."""

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
from training.prepare.work import my_share
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
            orders.append(my_share(range(64), None, environ))
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
