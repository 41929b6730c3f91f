"""Which checkpoint is the newest, which flags of the command line apply on resuming, and no metrics lost by a kill."""

import json
import os
from pathlib import Path

import pytest
import torch
from test_safety import command

from support import end_ranks, free_ports, set_rank, speak_to_files, start_ranks
from training.main import main
from training.runtime.tracking import Tracker, run_id
from training.train.checkpoint import newest_checkpoint, remove_old_checkpoints


def checkpoint(folder: Path, name: str, epoch: int, step: int) -> None:
    torch.save({"epoch": epoch, "step": step, "state_dict": {}, "optimizer": {}}, folder / name)


def test_the_newest_checkpoint_is_the_one_with_the_most_steps(tmp_path):
    # In a copied or downloaded folder, the newest file may be the oldest checkpoint.
    for age, (name, epoch, step) in enumerate(
        [("step_3000.pt", 3, 3000), ("epoch_2.pt", 2, 2000), ("step_999.pt", 0, 999), ("epoch_1.pt", 1, 1000)]
    ):
        checkpoint(tmp_path, name, epoch, step)
        os.utime(tmp_path / name, (1_000_000 + age, 1_000_000 + age))
    (tmp_path / "step_500.pt").write_bytes(b"no checkpoint")
    assert newest_checkpoint(tmp_path).name == "step_3000.pt"
    remove_old_checkpoints(tmp_path, keep_steps=1, only_last_epoch=True)
    assert {path.name for path in tmp_path.iterdir()} == {"step_3000.pt", "epoch_2.pt", "step_500.pt"}
    (tmp_path / "step_3000.pt").unlink()
    assert newest_checkpoint(tmp_path).name == "epoch_2.pt"


def test_flags_of_the_command_line_win_when_a_run_is_resumed(scenes, tmp_path, caplog):
    first = ["--epochs", "1", "--wd", "0.2", "--text-lr", "1e-3"]
    assert main(command(scenes, tmp_path, "run", *first)) == 0
    again = ["--epochs", "2", "--wd", "0.05", "--beta2", "0.999", "--text-lr", "1e-4", "--resume", "latest"]
    assert main(command(scenes, tmp_path, "run", *again)) == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "epoch_2.pt", weights_only=True)
    groups = saved["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.999)}
    assert any(group["lr_scale"] == pytest.approx(0.2) for group in groups)
    (line,) = (line for line in (tmp_path / "run" / "out.log").read_text().splitlines() if "flags that differ" in line)
    for change in ("--epochs 1 -> 2", "--wd 0.2 -> 0.05", "--beta2 0.98 -> 0.999", "--text-lr 0.001 -> 0.0001"):
        assert change in line, line
    assert "--seed" not in line and "--batch-size" not in line


@pytest.mark.parametrize("name", ["epoch_1.pt", "step_5.pt", "epoch_latest.pt"])
def test_a_new_run_does_not_overwrite_checkpoints(name, scenes, tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint(folder, name, 1, 5)
    assert main(command(scenes, tmp_path, "run")) == 2
    assert f"{folder} contains checkpoints; add --resume latest or use another name" in capsys.readouterr().err


def test_a_kill_while_metrics_are_cut_back_loses_nothing(tmp_path, monkeypatch):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"step": 6, "lo')  # the last line was cut when the run was killed

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Tracker(tmp_path, (), {}, first_step=3)
    assert path.read_text().startswith("".join(lines))
    Tracker(tmp_path, (), {}, first_step=3).close()
    assert path.read_text() == "".join(lines[:3])


def test_runs_of_one_name_have_their_own_ids(tmp_path):
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert run_id(first) == run_id(first) != run_id(second)


def test_a_warm_up_that_never_ends_is_warned_of(scenes, tmp_path):
    assert main(command(scenes, tmp_path, "run", "--epochs", "1", "--warmup", "2000")) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "--warmup 2000: the run has only 10 steps, so the learning rate never reaches" in log


def resume(rank: int, argv: list[str], port: int, folder: str) -> None:
    """Runs one of two ranks; writes how many bytes it has read from files, memory maps excepted."""
    speak_to_files(rank, folder)
    set_rank(rank, 2, port)
    assert main(argv) == 0
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    Path(folder, f"{rank}.read").write_text(counts["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
def test_resuming_reads_the_checkpoint_once(scenes, tmp_path):
    """Rank 0 verifies it; what the processes load is mapped into memory, which those of a machine share."""
    argv = command(scenes, tmp_path, "run", "--epochs", "1")
    assert main(argv) == 0
    size = (tmp_path / "run" / "checkpoints" / "epoch_1.pt").stat().st_size
    again = [*argv, "--resume", "latest", "--batch-size", "2", "--device", "cpu"]
    assert end_ranks(start_ranks(resume, 2, again, free_ports(1)[0], str(tmp_path))) == [0, 0]
    read = [int((tmp_path / f"{rank}.read").read_text()) for rank in range(2)]
    assert size <= read[0] < 1.7 * size and read[1] < 0.6 * size, (read, size)
