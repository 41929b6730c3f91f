"""Two evaluations side by side: differences, intervals against plain resampling, and flipped queries."""

import csv
import json

import numpy as np
import pytest

from eval_files import write_flickr30k
from training.eval import compare
from training.eval.metrics import paired_bootstrap
from training.main import main


def ranked_by(folder, name, noise, num=60, seed=0, captions=2):
    """Evaluates features; whether the right image of caption 0 is found depends on `noise`."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(num, 12)).astype(np.float32)
    owner = np.repeat(np.arange(num), captions)
    texts = images[owner] + noise * np.random.default_rng(1).normal(size=(len(owner), 12)).astype(np.float32)
    np.savez(
        folder / "set.npz",
        image_features=images,
        text_features=texts,
        image_of_caption=owner,
        captions=[f"text {n}" for n in range(len(owner))],
        image_paths=[f"{n}.jpg" for n in range(num)],
    )
    argv = ["--features", str(folder / "set.npz"), "--logs", str(folder), "--name", name, "--device", "cpu"]
    assert main(argv) == 0
    score = (texts / np.linalg.norm(texts, axis=1)[:, None]).astype(float) @ (
        images / np.linalg.norm(images, axis=1)[:, None]
    ).T.astype(float)
    return 1 + (score > score[np.arange(len(owner)), owner][:, None]).sum(1)


def test_differences_and_flips(tmp_path, capsys):
    good, bad = ranked_by(tmp_path, "good", 0.5), ranked_by(tmp_path, "bad", 1.2)
    capsys.readouterr()
    argv = [str(tmp_path / "good"), str(tmp_path / "bad"), "--flips", str(tmp_path / "f.csv")]
    assert compare.main([*argv, "--json", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    record = next(r for r in json.loads((tmp_path / "c.json").read_text()) if r["direction"] == "t2i" and "p" in r)
    assert record["difference"] == pytest.approx((bad == 1).mean() - (good == 1).mean())
    assert record["gained"] == ((bad == 1) & (good > 1)).sum() and record["lost"] == ((bad > 1) & (good == 1)).sum()
    assert record["low"] <= record["difference"] <= record["high"] < 0 and record["p"] < 0.01
    assert "good" in out and "*" in out
    with open(tmp_path / "f.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["direction"] == "t2i"]
    flipped = np.flatnonzero((good == 1) != (bad == 1))
    assert [int(row["query_number"]) - 1 for row in rows] == flipped.tolist()
    assert [float(row["rank in bad"]) for row in rows] == bad[flipped].tolist()
    assert [row["image"] for row in rows] == [f"{n // 2}.jpg" for n in flipped]


def test_a_run_equals_itself(tmp_path):
    ranked_by(tmp_path, "a", 1.0), ranked_by(tmp_path, "b", 1.0)
    records, notes = compare.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    others = [r for r in records if "p" in r]
    assert len(others) == 2 and notes == []
    assert all((r["difference"], r["low"], r["high"], r["p"], r["gained"]) == (0, 0, 0, 1, 0) for r in others)


def test_other_pairs_are_not_compared(tmp_path, capsys):
    ranked_by(tmp_path, "a", 1.0), ranked_by(tmp_path, "b", 1.0, num=50)
    for runs, said in (
        (["a", "b"], "not comparable"),
        (["a"], "two runs or more"),
        (["a", "nowhere"], "no ranks.npz in this folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            compare.main([str(tmp_path / run) for run in runs])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_models_are_compared_after_evaluations(tmp_path, tiny_clip, capsys):
    flickr = write_flickr30k(tmp_path / "flickr")
    for name, model in (("one", tiny_clip), ("two", "lotlip_tiny")):
        argv = ["--flickr30k-retrieval", str(flickr), "--model", model, "--workers", "0", "--device", "cpu"]
        assert main([*argv, "--logs", str(tmp_path), "--name", name]) == 0
    assert compare.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "Flickr30k" in capsys.readouterr().out
    assert (tmp_path / "one" / "ranks.npz").stat().st_size < 10_000


@pytest.mark.parametrize("clustered", [False, True])
def test_paired_bootstrap_equals_plain_resampling(clustered):
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(80), rng.integers(1, 5, 80)) if clustered else None
    size = len(clusters) if clustered else 200
    ease = rng.random(80)[clusters] if clustered else rng.random(size)
    first, second = (rng.random(size) < ease).astype(float), (rng.random(size) < ease + 0.12).astype(float)
    got = paired_bootstrap(first, second, clusters)
    members = [np.flatnonzero(clusters == c) for c in range(80)] if clustered else [[n] for n in range(size)]
    change, draws = second - first, []
    for _ in range(4000):
        picked = np.concatenate([members[c] for c in rng.integers(0, len(members), len(members))])
        draws.append(change[picked].mean())
    low, high = np.percentile(draws, [2.5, 97.5])
    assert got.difference == pytest.approx(change.mean())
    assert got.low == pytest.approx(low, abs=0.008) and got.high == pytest.approx(high, abs=0.008)
    assert got.p == pytest.approx(2 * np.mean(np.array(draws) <= 0), abs=0.02)
