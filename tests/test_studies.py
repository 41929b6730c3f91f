"""A grid of arms and seeds is run with the normal commands, resumed after a stop, and tabulated."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import SMALL_LOTLIP, read_results
from training.eval.npz import read_ranks

RUN = Path(__file__).parents[1] / "scripts" / "studies" / "run.py"
STUDY = """
title: drawn scenes
model: {model: "{small}", workers: 0}
extract: {train-data: "{data}/train"}
train: {epochs: 1, batch-size: 8, warmup: 1, lr: 1e-3, log-every-n-steps: 1, num-long-captions: 1}
seeds: [0]
baseline: short
arms:
  short: {title: short captions, model: {num-corner-tokens: 0}, flags: {captions: raw}}
  both: {model: {num-corner-tokens: 1}, seeds: [0, 4]}
diagnose: {evaluation: long, arms: [both], seeds: [0]}
evaluate:
  long: {urban1k-retrieval: "{data}/urban1k", retrieval-lengths: 20}
"""


def run(study: Path, data: Path, out: Path, *flags: str) -> tuple[int, str, str]:
    command = [sys.executable, str(RUN), str(study), "--data", str(data), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_grid_is_run_once_and_tabulated(scenes, tmp_path):
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY.replace("{small}", SMALL_LOTLIP[1]))
    code, printed, err = run(study, scenes, out, "--jobs", "2", "--seeds", "0")
    assert code == 0, err
    assert "short captions" in printed and "both" in printed and "HiMo@2" in printed
    with open(out / "table.csv", newline="") as file:
        table = {(row["arm"], row["direction"]): row for row in csv.DictReader(file)}
    assert set(table) == {(arm, direction) for arm in ("short", "both") for direction in ("i2t", "t2i")}
    ranks = {arm: read_ranks(out / f"{arm}-s0" / "long")["urban1k-retrieval"] for arm in ("short", "both")}
    for (arm, direction), row in table.items():
        own = read_results(out / f"{arm}-s0", "long")
        assert float(row["top1"]) == own[f"urban1k-retrieval-{direction}-top1"] and own["flags"]["pretrained"]
        if arm == "both":
            change = ranks["both"].top1[direction] - ranks["short"].top1[direction]
            assert float(row["difference"]) == pytest.approx(np.mean(change), abs=1e-5)
            assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
    recorded = json.loads((out / "study.json").read_text())
    assert [run["curves"]["step"] for run in recorded["runs"]] == [[1, 2, 3, 4, 5]] * 2
    assert all((out / f"study-{name}.png").stat().st_size > 1000 for name in ("r1", "main", "lengths"))

    # Finished runs are not touched; a run without its result gets the same result, and its training is not repeated.
    kept = (out / "short-s0" / "commands.log").read_text()
    result = (out / "both-s0" / "result.json").read_text()
    (out / "both-s0" / "result.json").unlink()
    weights = (out / "both-s0" / "checkpoints" / "epoch_1.pt").read_bytes()
    assert run(study, scenes, out, "--arms", "both,short", "--seeds", "0")[0] == 0
    assert (out / "short-s0" / "commands.log").read_text() == kept
    again, first = json.loads((out / "both-s0" / "result.json").read_text()), json.loads(result)
    assert again["evaluations"] == first["evaluations"] and again["curves"] == first["curves"]
    assert (out / "both-s0" / "checkpoints" / "epoch_1.pt").read_bytes() == weights


def test_intervals_cover_the_true_difference_over_images_and_seeds(monkeypatch):
    """Draws images of different difficulty and seeds of different quality many times."""
    monkeypatch.syspath_prepend(RUN.parent)
    import record

    rng, inside, images_alone = np.random.default_rng(0), 0, 0
    for _ in range(600):
        owner = np.repeat(np.arange(200), 3)
        ease = rng.uniform(0.1, 0.6, 200)[owner]

        def draw(number, gain):
            chance = ease + gain + rng.normal(0, 0.05, (number, 1))  # 5 points between seeds
            return (rng.uniform(size=(number, len(owner))) < chance).astype(float)

        first, second = draw(5, 0.0), draw(3, 0.04)
        found = record.compare_arms(first, second, owner)
        assert found["difference"] == pytest.approx(second.mean() - first.mean())
        inside += found["low"] <= 0.04 <= found["high"]
        found = record.compare_arms(first.mean(axis=0)[None], second.mean(axis=0)[None], owner)
        images_alone += found["low"] <= 0.04 <= found["high"]
    assert 0.92 < inside / 600 < 0.985 and images_alone / 600 < 0.8


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (("baseline: short", "baseline: tall"), [], "expected one of short, both"),
        (("title:", "tilte:"), [], "found tilte"),
        (("", ""), ["--arms", "tall"], "expected arms among short, both"),
    ],
)
def test_an_invalid_study_is_refused(change, flags, said, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.replace(*change))
    code, _, err = run(study, tmp_path, tmp_path / "out", *flags)
    assert code == 2 and said in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_the_tables_of_the_findings_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    import report

    root = RUN.parents[2]
    findings = (root / "docs" / "findings.md").read_text()
    for path in (root / "figures").glob("*.json"):
        recorded = json.loads(path.read_text())
        assert "baseline" not in recorded or report.markdown(recorded) in findings, path
    recorded = json.loads((root / "figures" / "flickr8k.json").read_text())
    for run in recorded["runs"]:  # with the mean computed by the test
        same = [r for r in recorded["runs"] if r["arm"] == run["arm"]]
        values = [
            r["evaluations"]["long"][k]["t2i"]["top1"]
            for r in same
            for k in r["evaluations"]["long"]
            if k.endswith("-retrieval")
        ]
        row = next(
            r
            for r in report.rows(recorded)
            if (r["arm"], r["evaluation"], r["direction"]) == (run["arm"], "long", "t2i")
        )
        assert row["seeds"] == len(same) and row["top1"] == pytest.approx(sum(values) / len(values))
