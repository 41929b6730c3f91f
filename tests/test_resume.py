"""A training that is killed at named places and resumed equals an uninterrupted one."""

import io
import json
import signal
import tarfile
from pathlib import Path

import pytest
import torch

from support import SMALL_LOTLIP, run_lab

TRAINING = (
    "--log-every-n-steps 1 --warmup 2 --save-every-steps 2 --save-frequency 2 --epochs 5 "
    "--num-long-captions 1 --shuffle-window 7 --max-bad-samples 1 --timeout-minutes 0.5"
).split()


def samples_by_step(folder: Path, world_size: int) -> list[dict[int, list[str]]]:
    """Returns for each rank: step -> the samples of the last time that it was taken."""
    ranks = [(folder / f"rank{rank}.jsonl").read_text().splitlines() for rank in range(world_size)]
    return [dict(json.loads(line) for line in lines) for lines in ranks]


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def last_state(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "epoch_5.pt", weights_only=True)


def kills(world_size: int) -> list[list]:
    """Returns a kill for each training: signal, place, number of times the place is reached, rank."""
    last = world_size - 1
    return [
        [int(signal.SIGKILL), "step", 4, last],
        [int(signal.SIGTERM), "step", 3, last],
        [int(signal.SIGKILL), "save", 2, 0],
        [int(signal.SIGTERM), "build", 1, 0],
    ]


@pytest.fixture(scope="module")
def shards(scenes, tmp_path_factory) -> Path:
    """Writes 40 scenes and 5 unusable samples in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "00.tar").write_bytes((scenes / "train" / "00000.tar").read_bytes())
    with tarfile.open(folder / "01.tar", "w") as tar:
        for number in range(5):
            member = tarfile.TarInfo(f"bad{number}.txt")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    return folder


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, ["--workers", "2", "--batch-size", "5"]),
        (2, ["--workers", "1", "--batch-size", "2", "--accum-freq", "2", "--local-loss"]),
        (1, ["--workers", "0", "--batch-size", "5", "--dataset-resampled", "--train-num-samples", "45"]),
    ],
    ids=["workers", "processes", "resampled"],
)
def test_killed_and_resumed_equals_uninterrupted(world_size, flags, shards, tmp_path):
    argv = [
        *SMALL_LOTLIP,
        *TRAINING,
        *flags,
        "--train-data",
        str(shards),
        "--logs",
        str(tmp_path),
        "--resume",
        "latest",
        "--name",
    ]
    assert run_lab([*argv, "quiet"], world_size, tmp_path / "samples").codes == [[0] * world_size]
    *killed, end = run_lab([*argv, "killed"], world_size, tmp_path / "samples-killed", kills(world_size)).codes
    assert end == [0] * world_size
    for codes, (number, _, _, rank) in zip(killed, kills(world_size)):
        alone = [code for other, code in enumerate(codes) if other != rank]
        if number == signal.SIGKILL:
            assert codes[rank] == -number and set(alone) <= {70}, "a rank that is left alone says so"
        else:
            assert codes == [75] * world_size, "all ranks stop together"

    assert samples_by_step(tmp_path / "samples", world_size) == samples_by_step(tmp_path / "samples-killed", world_size)
    assert losses(tmp_path / "quiet") == losses(tmp_path / "killed")
    expected, got = last_state(tmp_path / "quiet"), last_state(tmp_path / "killed")
    assert expected["totals"] == got["totals"] and (world_size == 2 or expected["totals"]["skipped"])
    for part in ("state_dict", "optimizer"):
        assert_equal(expected[part], got[part], part)


def assert_equal(a: object, b: object, where: object) -> None:
    """Asserts that nested dicts and lists of tensors and numbers are bit-equal."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, (dict, list)):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        assert len(a) == len(b)
        for key in keys:
            assert_equal(a[key], b[key], (where, key))
    else:
        assert a == b, where
