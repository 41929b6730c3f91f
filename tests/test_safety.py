"""Other events of long runs: other machines on resuming, broken checkpoints, a full disk, bad numbers, hangs."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import stat
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from support import SMALL_LOTLIP, end_ranks, run_lab, run_ranks, speak_to_files, start_ranks
from training.main import main
from training.runtime.files import atomic_write
from training.runtime.processes import end_process
from training.train.step import Stepper
from training.train.step_log import StepFlags

FLAGS = ("--workers 0 --log-every-n-steps 1 --warmup 2 --epochs 2 --num-long-captions 1 --batch-size 4").split()


def command(scenes: Path, logs: Path, name: str, *flags: str) -> list[str]:
    return [*SMALL_LOTLIP, *FLAGS, "--train-data", str(scenes / "train"), "--logs", str(logs), "--name", name, *flags]


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.fixture
def steps(monkeypatch) -> dict[int, list[str]]:
    """Records step -> samples of the trainings in this process; before step "stop", sends SIGUSR1 as SLURM does."""
    taken: dict = {}
    original = StepFlags.add

    def add(self: StepFlags, step: int, flags: torch.Tensor, keys: list[str]) -> tuple[bool, bool]:
        taken[step] = keys
        if step + 1 == taken.get("stop"):
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, step, flags, keys)

    monkeypatch.setattr(StepFlags, "add", add)
    return taken


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [(1, ["--workers", "2"]), (1, ["--batch-size", "2", "--accum-freq", "2"]), (2, ["--batch-size", "2"])],
    ids=["workers", "accumulation", "processes"],
)
def test_other_processes_train_on_the_rest_of_an_epoch(world_size, flags, scenes, tmp_path, steps):
    """3 of 10 steps of 4 samples are done at the time of the signal: 28 samples of the first epoch remain."""
    steps["stop"] = 3
    assert main(command(scenes, tmp_path, "run")) == 75
    before = [key for step in (1, 2, 3) for key in steps[step]]
    steps.clear()
    argv = command(scenes, tmp_path, "run", "--resume", "latest", *flags)
    if world_size == 1:
        assert main(argv) == 0
        taken = list(steps.items())
    else:
        assert run_lab(argv, world_size, tmp_path / "samples").codes == [[0] * world_size]
        files = (tmp_path / "samples").iterdir()
        taken = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    left = [key for step, keys in taken if step <= 10 for key in keys]
    assert len(left) == 28 and Counter(before + left) == dict.fromkeys(before + left, 1)
    rest = [key for step, keys in taken if step > 10 for key in keys]
    assert sorted(rest) == sorted(before + left)  # the second epoch is complete
    log = (tmp_path / "run" / "out.log").read_text()
    assert "the remaining 28 samples of epoch 1 come in another order, in 7 steps" in log


def test_other_data_in_mid_epoch_are_refused(scenes, tmp_path, steps, capsys):
    steps["stop"] = 3
    assert main(command(scenes, tmp_path, "run")) == 75
    assert main(command(scenes, tmp_path, "run", "--resume", "latest", "--seed", "1")) == 2
    assert "saved within an epoch of other data or another order" in capsys.readouterr().err


def test_broken_checkpoints_are_skipped(scenes, tmp_path, steps):
    often = ["--save-every-steps", "1", "--keep-checkpoints", "9"]
    assert main(command(scenes, tmp_path, "whole", *often)) == 0
    steps["stop"] = 9
    assert main(command(scenes, tmp_path, "run", *often)) == 75
    folder = tmp_path / "run" / "checkpoints"
    saved = sorted(int(path.stem.removeprefix("step_")) for path in folder.iterdir())
    assert saved[-1] == 9 and len(saved) >= 3  # not at each step: while one is written, the next is postponed
    cut, flipped = (folder / f"step_{step}.pt" for step in (9, saved[-2]))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    os.utime(flipped, ns=(cut.stat().st_mtime_ns - 1,) * 2)
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    (folder / "step_10.tmp").write_bytes(b"as far as it came")
    steps.clear()
    assert main(command(scenes, tmp_path, "run", *often, "--resume", "latest")) == 0
    assert min(steps) == saved[-3] + 1
    log = (tmp_path / "run" / "out.log").read_text()
    assert log.count("skipped a checkpoint") == 2 and all(f"{p}: broken file (" in log for p in (cut, flipped))
    assert "removed" in log and "step_10.tmp" in log
    ends = [torch.load(tmp_path / run / "checkpoints" / "epoch_2.pt", weights_only=True) for run in ("whole", "run")]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())


def test_a_full_disk_stops_saving_but_not_training(scenes, tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))  # a checkpoint has about 12 MB
    try:
        code = main(command(scenes, tmp_path, "run", "--save-every-steps", "4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().err
    assert code == 1 and said.splitlines()[-1].startswith("python -m training.main: error: could not save"), said
    assert "epoch_2.pt: " in said.splitlines()[-1] and "the last good checkpoint is none; training continues" in said
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 21))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_loader_processes_of_the_next_epoch_start_before_the_last_step(scenes, tmp_path, monkeypatch):
    processes: dict[int, set[int]] = {}
    original = StepFlags.add

    def add(self: StepFlags, step: int, *args: object) -> tuple[bool, bool]:
        processes[step] = {process.pid for process in multiprocessing.active_children()}
        return original(self, step, *args)

    monkeypatch.setattr(StepFlags, "add", add)
    assert main(command(scenes, tmp_path, "run", "--workers", "1", "--epochs", "3")) == 0
    for last in (10, 20):
        assert processes[last] & processes[last + 1] and not processes[last - 5] & processes[last + 1]
    assert len(processes[30]) <= 1  # none for an epoch that does not come


def test_storage_that_refuses_to_flush_does_not_end_a_run(scenes, tmp_path, monkeypatch):
    """CIFS and FUSE refuse it for folders, some for files too; a full disk is still an error."""
    refusals = {True: errno.EINVAL, False: errno.ENOTSUP}  # is it a folder?

    def fsync(number: int) -> None:
        code = refusals[stat.S_ISDIR(os.fstat(number).st_mode)]
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(command(scenes, tmp_path, "run", "--epochs", "1")) == 0
    assert torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=True)["step"] == 10
    refusals[False] = errno.EPERM
    with atomic_write(tmp_path / "refused") as temporary:
        temporary.write_text("content")
    assert (tmp_path / "refused").read_text() == "content"
    refusals[False] = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert not list(tmp_path.glob("file*"))


def test_numbers_that_are_not_finite_end_training(scenes, tmp_path, steps, capsys):
    often = ["--save-every-steps", "1", "--max-skipped-steps", "3", "--lr", "1e38"]
    assert main(command(scenes, tmp_path, "run", *often)) == 1
    # A line about a checkpoint that is still being written may follow it.
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "python -m training.main: error:" in line]
    assert "not finite for 4 steps in a row (--max-skipped-steps 3); last good checkpoint: " in message
    named = Path(message.split("last good checkpoint: ")[1].split(";")[0])
    assert torch.load(named, weights_only=True)["step"] >= 1
    lines = (tmp_path / "run" / "skipped_steps_rank0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 4 and all(record["keys"] == steps[record["step"]] for record in records)
    skipped = {line["step"]: line["train/skipped_steps"] for line in metrics(tmp_path / "run")}
    assert [step for step, count in skipped.items() if count] == [record["step"] for record in records]


def test_records_of_skipped_steps_that_cannot_be_written_do_not_end_training(scenes, tmp_path, capsys):
    path = tmp_path / "run" / "skipped_steps_rank0.jsonl"
    path.mkdir(parents=True)
    assert main(command(scenes, tmp_path, "run", "--epochs", "1", "--max-skipped-steps", "99", "--lr", "1e38")) == 0
    assert f"{path} could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.logit_scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> dict:
            return {"image_features": x * self.weight, "logit_scale": self.logit_scale.exp()}

    class Loss(nn.Module):
        def forward(self, image_features, logit_scale, output_dict) -> dict:
            return {"contrastive_loss": (image_features * logit_scale).square().mean()}

    def weights_after(*inputs: float) -> tuple[list, list]:
        model = Model()
        fused = {"fused": True} if optimizer is torch.optim.AdamW else {}
        step = Stepper(model, model, Loss(), optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **fused))
        skipped = [float(step([{"x": torch.full((2, 3), x)}])["skipped_steps"]) for x in inputs]
        return [p.detach().tolist() for p in model.parameters()], skipped

    clean, _ = weights_after(1.0, 2.0, 3.0)
    poisoned, skipped = weights_after(1.0, float("nan"), 2.0, float("inf"), 1e30, 3.0)
    assert poisoned == clean and skipped == [0, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("halted", [0, 1])
def test_a_rank_that_hangs_is_named(halted, scenes, tmp_path):
    argv = command(scenes, tmp_path, "run", "--epochs", "500", "--timeout-minutes", "0.15")
    report = run_lab(argv, 2, tmp_path / "samples", [[int(signal.SIGSTOP), "step", 2, halted]], last=False)
    assert report.codes[0][1 - halted] == 70 and report.codes[0][halted] == -signal.SIGKILL
    last = report.said.splitlines()[-1]
    assert "error: no progress for 9 s (--timeout-minutes): rank " + str(halted) in last


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def launch(_: int, argv: list[str], folder: str) -> None:
    """Does what ``torchrun --standalone --nproc_per_node=2 --max-restarts=1 -m -- training.main`` does, by forking."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    speak_to_files(0, folder)
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test", "start_method": "fork"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, monitor_interval=0.1, **where)
    elastic_launch(config, rank_of_torchrun)(argv)


def rank_of_torchrun(argv: list[str]) -> None:
    end_process(main(argv))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_torchrun_restarts_killed_processes(scenes, tmp_path):
    argv = command(scenes, tmp_path, "run", "--resume", "latest", "--save-every-steps", "2", "--epochs", "3")
    (torchrun,) = start_ranks(launch, 1, argv, str(tmp_path))
    deadline = time.monotonic() + 100
    while not list((tmp_path / "run" / "checkpoints").glob("step_*.pt")):
        assert time.monotonic() < deadline and torchrun.is_alive()
        time.sleep(0.02)
    killed = children(torchrun.pid)
    os.kill(killed[1], signal.SIGKILL)
    assert end_ranks([torchrun], 200) == [0], (tmp_path / "0.err").read_text()[-3000:]
    assert len(killed) == 2
    losses = [(line["step"], line["train/loss"]) for line in metrics(tmp_path / "run")]
    assert [step for step, _ in losses] == list(range(1, 16))
    assert run_ranks(command(scenes, tmp_path, "quiet", "--epochs", "3"), 2).returncode == 0
    assert losses == [(line["step"], line["train/loss"]) for line in metrics(tmp_path / "quiet")]
