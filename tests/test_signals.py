"""Signals at named places: a run is halted at a place, gets a signal, and is released.

A marked place writes a file with the process's id and waits until another file exists. So nothing depends on the speed
of the machine.
"""

import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from support import SMALL_LOTLIP, end_ranks, free_ports, set_rank, speak_to_files, start_ranks
from training.main import main

FLAGS = ("--device cpu --log-every-n-steps 1 --warmup 2 --epochs 2 --num-long-captions 1 --batch-size 10").split()
PATIENCE = 120.0


def halt(folder: Path, place: str) -> None:
    """Reports once that a place is reached, and waits until the test lets it continue; with PLACE.pipe for ever."""
    mark = folder / f"{place}.reached"
    try:
        file = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(file, str(os.getpid()).encode())
    os.close(file)
    if (folder / f"{place}.pipe").exists():
        (folder / f"{place}.pipe").read_bytes()  # nothing ever writes to it
    while not (folder / f"{place}.go").exists():
        time.sleep(0.01)


def mark_places(folder: Path, rank: int) -> None:
    """Adds a `halt` to each place of a run that a test may name; only places with a file PLACE.wanted halt."""
    import training.data.reader as reader
    import training.eval.encode as encode
    import training.train.extract as extract
    import training.train.run as run
    from training.train.step_log import StepFlags

    def marked(owner: object, name: str, place: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapper(*args: object, **kwargs: object) -> object:
            named = place(*args)
            if (folder / f"{named}.wanted").exists():
                halt(folder, named)
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    images = itertools.count(1)
    marked(encode.Batches, "__getitem__", lambda *_: "evaluating")
    marked(
        reader, "read_image", lambda raw, *_: "validating" if raw.source == "val.tar" else f"training {next(images)}"
    )
    marked(StepFlags, "add", lambda _, step, *__: f"step {step}")
    marked(run, "open_source", lambda *_: f"opening on rank {rank}")
    marked(extract.ImageReader, "decode", lambda *_: "extracting")


def rank_of_run(rank: int, argv: list[str], world_size: int, port: int, folder: str) -> None:
    from training.runtime.processes import end_process

    os.setsid()
    speak_to_files(rank, folder)
    torch.set_num_threads(1)
    if world_size > 1:
        set_rank(rank, world_size, port)
    # Set in both cases, because the tests themselves may run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if (Path(folder) / "nohup").exists() else signal.SIG_DFL)
    mark_places(Path(folder), rank)
    end_process(main(argv))


class Halted:
    """A run that is halted at a place; if `stuck` names a second place, the run halts there for ever."""

    def __init__(self, argv: list[str], place: str, folder: Path, world_size: int = 1, stuck: str | None = None):
        folder.mkdir(exist_ok=True)
        self.folder, self.place = folder, place
        places = [place, stuck] if stuck else [place]
        for each in places:
            (folder / f"{each}.wanted").touch()
        if stuck:
            os.mkfifo(folder / f"{stuck}.pipe")
        self.ranks = start_ranks(rank_of_run, world_size, argv, world_size, free_ports(1)[0], str(folder))
        self.halted = [self._process_at(each) for each in places]

    def _process_at(self, place: str) -> int:
        mark, deadline = self.folder / f"{place}.reached", time.monotonic() + PATIENCE
        while not mark.exists() or not mark.read_text():
            assert time.monotonic() < deadline and all(rank.is_alive() for rank in self.ranks), self.log
            time.sleep(0.01)
        return int(mark.read_text())

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.err")))

    def signal(self, number: int, rank: int = 0) -> None:
        """Sends a signal to all processes of a rank, as SLURM does."""
        with suppress(ProcessLookupError):  # a test may send a second kill
            os.killpg(self.ranks[rank].pid, number)

    def let_go(self) -> None:
        (self.folder / f"{self.place}.go").touch()

    def end(self) -> list[int]:
        return end_ranks(self.ranks, PATIENCE)


def command(scenes: Path, logs: Path, name: str, *flags: object) -> list[str]:
    return [
        *SMALL_LOTLIP,
        *FLAGS,
        "--train-data",
        str(scenes / "train"),
        "--logs",
        str(logs),
        "--name",
        name,
        *map(str, flags),
    ]


def last_weights(logs: Path) -> dict:
    return torch.load(logs / "run" / "checkpoints" / "epoch_2.pt", weights_only=True)["state_dict"]


def wait_for_end(pid: int) -> None:
    """Waits until a process that is not our child has ended."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


@pytest.fixture(scope="module")
def evaluations(scenes, tmp_path_factory) -> list[object]:
    """Returns the flags of a training that evaluates after each epoch."""
    val = tmp_path_factory.mktemp("val") / "val.tar"
    val.write_bytes(next((scenes / "train").glob("*.tar")).read_bytes())
    return ["--urban1k-retrieval", scenes / "urban1k", "--val-data", val, "--workers", 1]


@pytest.fixture(scope="module")
def whole(evaluations, scenes, tmp_path_factory) -> Path:
    """Runs that training without interruption; returns its folder."""
    logs = tmp_path_factory.mktemp("whole")
    assert main(command(scenes, logs, "run", *evaluations)) == 0
    return logs


@pytest.mark.parametrize(("place", "number"), [("evaluating", signal.SIGTERM), ("validating", signal.SIGUSR1)])
def test_a_signal_in_the_middle_of_an_evaluation(place, number, evaluations, whole, scenes, tmp_path):
    """The run exits with 75 between two batches and saves its state; resuming repeats the evaluation."""
    run = Halted(command(scenes, tmp_path, "run", *evaluations), place, tmp_path / "marks")
    run.signal(number)
    run.let_go()
    assert run.end() == [75], run.log
    assert "while evaluating after epoch 1; resuming repeats the evaluation" in run.log
    assert main(command(scenes, tmp_path, "run", *evaluations, "--resume", "latest")) == 0
    results = [(logs / "run/checkpoints/results.jsonl").read_text().splitlines() for logs in (tmp_path, whole)]
    assert [len(lines) for lines in results] == [2, 2]
    keys = [{k: v for k, v in json.loads(lines[0]).items() if k.startswith("urban1k")} for lines in results]
    assert keys[0] == keys[1]
    expected = last_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in last_weights(tmp_path).items())


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_a_killed_run_leaves_no_loader_process(scenes, tmp_path):
    argv = command(scenes, tmp_path, "run", "--workers", "1", "--urban1k-retrieval", scenes / "urban1k")
    run = Halted(argv, "evaluating", tmp_path / "marks")
    os.kill(run.ranks[0].pid, signal.SIGKILL)
    assert run.end() == [-signal.SIGKILL]
    wait_for_end(run.halted[0])


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_a_stuck_loader_process_does_not_keep_a_run_from_ending(scenes, tmp_path):
    """It reads from a pipe without a writer, like a hanging mount, while the run takes its first step."""
    argv = command(scenes, tmp_path, "run", "--workers", "1")
    run = Halted(argv, "step 1", tmp_path / "marks", stuck="training 25")
    run.signal(signal.SIGTERM)
    run.let_go()
    assert run.end() == [75], run.log
    assert "stopped after step 2 by a signal" in run.log  # it came after the update of step 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2.pt"]
    wait_for_end(run.halted[1])


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_stops_and_saves_a_run_without_nohup(nohup, scenes, tmp_path):
    (tmp_path / "marks").mkdir()
    if nohup:
        (tmp_path / "marks" / "nohup").touch()
    run = Halted(command(scenes, tmp_path, "run", "--workers", "1"), "step 1", tmp_path / "marks")
    run.signal(signal.SIGHUP)
    run.let_go()
    assert run.end() == [0 if nohup else 75], run.log
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == ({"epoch_1.pt", "epoch_2.pt"} if nohup else {"step_2.pt"})


def test_a_signal_while_no_data_come(scenes, tmp_path):
    """The state can't be saved, but every rank exits with the code for SLURM."""
    argv = command(scenes, tmp_path, "run", "--workers", "1", "--timeout-minutes", "0.1", "--batch-size", "4")
    run = Halted(argv, "training 1", tmp_path / "marks", world_size=2)
    run.signal(signal.SIGTERM, rank=1)
    assert run.end() == [75, 75], run.log
    assert "stopped by SIGTERM; the state could not be saved, because rank " in run.log and "got no data" in run.log
    wait_for_end(run.halted[0])


@pytest.mark.parametrize(("place", "number"), [("opening on rank 0", signal.SIGTERM), ("extracting", signal.SIGUSR2)])
def test_a_signal_where_nothing_can_be_lost_ends_the_run_immediately(place, number, scenes, tmp_path):
    """The process is halted and never released."""
    argv = command(scenes, tmp_path, "run", "--workers", "0")
    if place == "extracting":
        argv += ["--lock-image", "--extract-image-features", str(tmp_path / "features")]
    run = Halted(argv, place, tmp_path / "marks")
    run.signal(number)
    assert run.end() == [75]
    assert f"stopped by {number.name}; nothing is lost: start the same command again" in run.log
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("number", "rank", "expected"),
    [
        (signal.SIGSTOP, 1, r"no progress for 6 s \(--timeout-minutes\): rank 1"),
        (signal.SIGKILL, 1, r"rank 1( on \S+)? has ended or does not answer"),
        (signal.SIGKILL, 0, r"rank 0 has ended or does not answer"),
    ],
)
def test_a_rank_that_halts_or_dies_at_the_start_is_named(number, rank, expected, scenes, tmp_path):
    argv = command(scenes, tmp_path, "run", "--workers", "0", "--timeout-minutes", "0.1", "--batch-size", "4")
    run = Halted(argv, f"opening on rank {rank}", tmp_path / "marks", world_size=2)
    run.signal(number, rank)
    run.ranks[1 - rank].join(PATIENCE)
    assert run.ranks[1 - rank].exitcode == 70, run.log
    assert re.search(expected, run.log), run.log
    run.signal(signal.SIGKILL, rank)
    run.end()


def test_a_signal_to_one_rank_at_the_start_ends_all(scenes, tmp_path):
    argv = command(scenes, tmp_path, "run", "--workers", "0", "--timeout-minutes", "0.2", "--batch-size", "4")
    run = Halted(argv, "opening on rank 1", tmp_path / "marks", world_size=2)
    run.signal(signal.SIGTERM, rank=0)
    assert run.end() == [75, 75], run.log


def test_an_unreadable_benchmark_image_does_not_end_a_training(scenes, tmp_path, capsys):
    shutil.copytree(scenes / "urban1k", tmp_path / "urban1k")
    image = sorted(path for path in (tmp_path / "urban1k").rglob("*") if path.suffix in (".jpg", ".png"))[0]
    image.write_bytes(b"no image")
    flags = ["--urban1k-retrieval", tmp_path / "urban1k", "--workers", "0"]
    assert main(command(scenes, tmp_path, "run", *flags)) == 0
    said = capsys.readouterr().err
    assert "1 pairs with images that can't be read are skipped" in said and image.name in said
    assert main(["--device", "cpu", "--model", "lotlip_tiny", "--logs", str(tmp_path), *map(str, flags)]) == 1
