"""Several processes train like one process: the same losses, gradient norms and weights, step by step."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_train_data import good, write_shard

from support import SMALL_LOTLIP, end_ranks, free_ports, run_ranks, set_rank, start_ranks
from training.main import main

# Each step takes all 40 scenes, so that every number of processes compares the same captions; AdamW's eps is large, or
# rounding errors in near-zero gradients would become steps of full size.
WHOLE_SET = "--workers 0 --log-every-n-steps 1 --warmup 0 --epochs 4 --lr 0.001 --eps 0.01".split()
# Buckets hold a rank's own captions, whose features are then rounded differently: what is compared is padded alike,
# but for one way.
WHOLE_SET += ["--text-packing", "padded"]
BUCKETS = "buckets"
WAYS = {
    BUCKETS: ["--text-packing", "buckets"],
    "plain": [],
    "local-loss": ["--local-loss"],
    "accumulated": ["--accum-freq", "2"],
    "accumulated-local": ["--accum-freq", "2", "--local-loss"],
    "locked": ["--lock-image", "--grad-clip-norm", "0.1"],
    "accumulated-locked": ["--lock-image", "--grad-clip-norm", "0.1", "--accum-freq", "2", "--local-loss"],
    "sigmoid": ["--siglip", "--local-loss"],
}
SAME_AS = {"locked": "locked", "accumulated-locked": "locked", "sigmoid": "sigmoid"}  # others: plain


def train_all(rank: int, work: list[tuple[int, list[str]]], world_size: int) -> None:
    """Runs all trainings one after another, in one process per rank."""
    for port, words in work:
        set_rank(rank, world_size, port)
        if code := main(words):
            sys.exit(code)


def argv(way: str, data: Path, logs: Path, world_size: int) -> list[str]:
    flags = WAYS[way]
    batch_size = 40 // world_size // (2 if "--accum-freq" in flags else 1)
    places = ["--train-data", str(data), "--logs", str(logs), "--name", f"{way}-{world_size}"]
    if way == "plain":
        places += ["--val-data", str(logs / "val.tar"), "--val-frequency", "4"]
    return [*SMALL_LOTLIP, *WHOLE_SET, *places, "--batch-size", str(batch_size), *flags]


def train_with(world_size: int, data: Path, logs: Path) -> None:
    work = [(port, argv(way, data, logs, world_size)) for port, way in zip(free_ports(len(WAYS)), WAYS)]
    assert end_ranks(start_ranks(train_all, world_size, work, world_size)) == [0] * world_size


def outcome(logs: Path, name: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]
    checkpoint = torch.load(logs / name / "checkpoints" / "epoch_4.pt", weights_only=True)
    return [line for line in lines if "train/loss" in line], checkpoint["state_dict"]


def validation(logs: Path, name: str) -> dict[str, float]:
    lines = [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]
    (measured,) = [line for line in lines if "val/loss" in line]
    return {name: value for name, value in measured.items() if name.startswith("val/")}


@pytest.fixture(scope="module")
def logs(scenes, tmp_path_factory) -> Path:
    """Trains on one process without accumulation: accumulation over two batches of 20 is compared with one of 40."""
    folder = tmp_path_factory.mktemp("processes")
    samples = {f"{n:02d}": good(n) if n < 25 else {"txt": b"no image"} for n in range(30)}
    write_shard(folder / "val.tar", samples)
    for way in ("plain", "locked", "sigmoid"):
        assert main(argv(way, scenes / "train", folder, 1)) == 0
    return folder


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_processes_train_as_one(world_size, scenes, logs):
    train_with(world_size, scenes / "train", logs)
    for way in WAYS:
        steps, weights = outcome(logs, f"{way}-{world_size}")
        expected_steps, expected_weights = outcome(logs, f"{SAME_AS.get(way, 'plain')}-1")
        assert len(steps) == 4 and abs(steps[3]["train/loss"] - steps[0]["train/loss"]) > 0.01
        for step, expected in zip(steps, expected_steps):
            for name in ("loss", "short_caption_loss", "long_caption_loss", "logit_scale", "grad_norm"):
                wanted = expected[f"train/{name}"]
                bound = 1e-5 if way == BUCKETS else 2e-6  # fp32 rounds at 1e-7, sums over ranks a little coarser
                assert step[f"train/{name}"] == pytest.approx(wanted, rel=bound, abs=1e-6), (way, name)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-6, msg=f"{way} {name}")

    measured = validation(logs, f"plain-{world_size}")
    for name, value in validation(logs, "plain-1").items():
        assert measured[name] == pytest.approx(value, rel=1e-5), name
    assert (measured["val/num_samples"], measured["val/skipped"]) == (25, 5)


def test_one_process_accumulates_as_one_batch(scenes, logs):
    name = "accumulated-1"
    assert main(argv("accumulated", scenes / "train", logs, 1)) == 0
    steps, weights = outcome(logs, name)
    expected_steps, expected_weights = outcome(logs, "plain-1")
    for step, expected in zip(steps, expected_steps):
        assert step["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--train-data", "{here}/none.tar"], 2, "1 of 1 shards are missing"),
        (["--train-data", "{set}", "--batch-size", "21"], 2, "a step takes 42 samples, but an epoch has 40"),
        (["--train-data", "{here}/t.csv", "--batch-size", "1"], 1, "no usable sample"),
    ],
)
def test_no_rank_waits_for_one_that_stopped(flags, code, said, scenes, tmp_path):
    rows = [f"{scenes}/{i}.jpg,a" for i in range(3)]
    photo = next((scenes / "dci").rglob("*.jpg"))
    (tmp_path / "t.csv").write_text("\n".join(["filepath,txt", f"{photo},a", *rows]) + "\n")
    argv = [word.format(here=tmp_path, set=scenes / "train") for word in flags]
    done = run_ranks([*SMALL_LOTLIP, *WHOLE_SET, "--logs", str(tmp_path), "--captions", "raw", *argv], 2, timeout=100)
    assert done.returncode == code and said in done.stderr
    if code == 2:
        assert done.stderr.count("error: ") == 1
