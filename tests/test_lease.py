"""One live process writes to a folder: a second one is refused and told who does; a crashed one keeps nobody out."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from test_safety import command
from test_signals import Halted

from support import end_ranks, speak_to_files, start_ranks
from training.main import main
from training.runtime import lease
from training.runtime.lease import FILE, Lease
from training.search.__main__ import main as search_main


def test_a_second_run_with_the_same_name_is_refused(scenes, tmp_path, capsys):
    first = Halted(command(scenes, tmp_path, "run"), "step 1", tmp_path / "marks")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    holder = f"process {first.ranks[0].pid} on {os.uname().nodename}"
    for flags in ([], ["--resume", "latest"]):
        assert main(command(scenes, tmp_path, "run", *flags)) == 2
        assert f"--name run: {tmp_path / 'run'} is in use by {holder}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    first.signal(signal.SIGKILL)
    assert first.end() == [-signal.SIGKILL]
    assert main(command(scenes, tmp_path, "run", "--resume", "latest")) == 0
    assert not (tmp_path / "run" / FILE).exists()


def test_a_second_extraction_into_a_folder_is_refused(scenes, tmp_path, capsys):
    features = str(tmp_path / "features")
    argv = command(scenes, tmp_path, "run", "--lock-image", "--extract-image-features", features)
    first = Halted(argv, "extracting", tmp_path / "marks")
    assert main(argv) == 2
    assert f"--extract-image-features: {features} is in use by process {first.ranks[0].pid}" in capsys.readouterr().err
    first.signal(signal.SIGKILL)
    first.end()
    assert main(argv) == 0


def test_an_index_is_updated_by_one_process(scenes, tmp_path, capsys):
    def search(images: Path) -> int:
        argv = [images, "--index", tmp_path / "index", "--model", "lotlip_tiny", "--workers", "0", "--device", "cpu"]
        return search_main(list(map(str, argv)))

    images = Path(shutil.copytree(scenes / "urban1k" / "image", tmp_path / "images"))
    assert search(images) == 0
    (folder,) = (tmp_path / "index").iterdir()
    with Lease() as other:
        other.take(folder, "--index")
        assert search(images) == 0  # nothing has changed
        next(images.iterdir()).unlink()
        with pytest.raises(SystemExit, match="2"):
            search(images)
    assert f"--index: {folder} is in use by process {os.getpid()}" in capsys.readouterr().err


def other_machine(folder: Path) -> dict:
    """Writes the lease of a process on another machine."""
    owner = {"token": "t", "host": "node7", "pid": 1, "machine": "another", "started": "1", "since": "Monday"}
    (folder / FILE).write_text(json.dumps(owner))
    return owner


def test_a_process_on_another_machine_that_still_touches_the_file_has_the_folder(tmp_path):
    """Its clock may be wrong by years."""
    other_machine(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        for second in iter(int, None):
            os.utime(tmp_path / FILE, (1_000_000 + second, 1_000_000 + time.monotonic()))
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="in use by process 1 on node7, since Monday"), Lease() as mine:
            mine.take(tmp_path, "--name run")
    finally:
        ended.set()
        thread.join()
    assert json.loads((tmp_path / FILE).read_text())["host"] == "node7"


def take_over(rank: int, folder: str) -> None:
    """Takes a folder whose holder on another machine is silent; of several, one may go on."""
    lease.PATIENCE_S = 2.0
    speak_to_files(rank, folder)
    with Lease() as mine:
        try:
            mine.take(Path(folder, "run"), "--name run")
        except ValueError as error:
            assert "in use by process" in str(error)
            return
        Path(folder, f"{rank}.took").touch()
        while len(list(Path(folder).glob("*.err"))) < 3 or Path(folder, "wait").exists():
            time.sleep(0.05)


def test_a_silent_process_on_another_machine_is_replaced_by_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "wait").touch()
    other_machine(tmp_path / "run")
    ranks = start_ranks(take_over, 3, str(tmp_path))
    deadline = time.monotonic() + 100
    while sum(rank.is_alive() for rank in ranks) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    (tmp_path / "wait").unlink()
    assert end_ranks(ranks, 60) == [0, 0, 0]
    assert len(list(tmp_path.glob("*.took"))) == 1 and not (tmp_path / "run" / FILE).exists()


def holder(rank: int, folder: str) -> None:
    lease.BEAT_S = 0.1
    speak_to_files(rank, folder)
    with Lease() as mine:
        mine.take(Path(folder), "--name run")
        time.sleep(100)


def test_a_process_that_lost_its_folder_ends_without_touching_it(tmp_path):
    ranks = start_ranks(holder, 1, str(tmp_path))
    while not (tmp_path / FILE).exists():
        time.sleep(0.05)
    new = other_machine(tmp_path)
    assert end_ranks(ranks, 60) == [1]
    assert "was taken over by process 1 on node7" in (tmp_path / "0.err").read_text()
    assert json.loads((tmp_path / FILE).read_text()) == new
