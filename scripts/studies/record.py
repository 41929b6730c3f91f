"""Records a study: results and curves of every run, and the difference of each arm from the baseline.

Differences are computed query by query and averaged over the seeds of both arms; the 95% interval includes the
variation over images and over seeds.
"""

import json
import statistics
from pathlib import Path

import numpy as np

DIRECTIONS = {"i2t": "I2T", "t2i": "T2I"}
KEPT = ("num-images", "num-pairs", "fingerprint", "truncated-share")
DIAGNOSTICS = Path("diagnostics", "checkpoints", "results.jsonl")  # in a run's folder
MAX_POINTS = 40  # points of a recorded curve


def last_checkpoint(folder: Path) -> Path:
    """Returns the checkpoint of a run's last epoch."""
    return max((folder / "checkpoints").glob("epoch_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))


def collect(folder: Path, study: dict) -> dict:
    """Returns the results of a run's evaluations and the curves of its training."""
    evaluations = {name: _evaluation(folder / name) for name in study["evaluate"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    names = [n for n in steps[-1] if n.endswith("loss") or "corner" in n or n == "train/logit_scale"]
    every = max(1, -(-len(steps) // MAX_POINTS))
    kept = steps[::-1][::every][::-1]  # always includes the last step
    curves = {name.removeprefix("train/"): [round(line[name], 4) for line in kept] for name in names}
    return {"evaluations": evaluations, "curves": {"step": [line["step"] for line in kept], **curves}}


def _evaluation(folder: Path) -> dict:
    line = json.loads((folder / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    keys = [key.removesuffix("-i2t-top1") for key in line if key.endswith("-i2t-top1")]
    found = {}
    for key in keys:
        own = {name: line[f"{key}-{name}"] for name in KEPT if f"{key}-{name}" in line}
        for direction in DIRECTIONS:
            own[direction] = {n: line[f"{key}-{direction}-{n}"] for n in ("top1", "top5", "top1-ci95")}
        found[key] = own
    return found | ({"lengths": line["lengths"]} if "lengths" in line else {})


def benchmarks_of(evaluation: dict) -> list[str]:
    """Returns the keys of an evaluation's benchmarks."""
    return [key for key in evaluation if key != "lengths"]


def record(study: dict, out: Path) -> dict:
    """Collects all finished runs below OUT, compares the arms, and writes OUT/study.json; returns its content."""
    runs = [_read_run(path.parent) for path in sorted(out.glob("*-s*/result.json"))]
    order = list(study["arms"])
    runs = sorted((r for r in runs if r["arm"] in order), key=lambda r: (order.index(r["arm"]), r["seed"]))
    names = _same_names(runs)
    arms = {name: {"title": arm.get("title", name)} for name, arm in study["arms"].items()}
    content = {"title": study["title"], "notes": study.get("notes", []), "baseline": study["baseline"], "arms": arms}
    content |= {"differences": _differences(study, runs, out, names), "runs": runs}
    (out / "study.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def _same_names(runs: list[dict]) -> dict[str, str]:
    """Renames benchmarks so that the same pairs have the same name in all runs; returns fingerprint -> name."""
    names: dict[str, str] = {}
    for run in runs:
        for which, evaluation in run["evaluations"].items():
            run["evaluations"][which] = {
                key if key == "lengths" else names.setdefault(own["fingerprint"], key): own
                for key, own in evaluation.items()
            }
    return names


def _read_run(folder: Path) -> dict:
    run, corners = json.loads((folder / "result.json").read_text()), folder / "corners.json"
    if corners.exists():
        run["corners"] = json.loads(corners.read_text())
    if (folder / DIAGNOSTICS).exists():
        run["diagnostics"] = json.loads((folder / DIAGNOSTICS).read_text().splitlines()[-1])["diagnostics"]
    return run


def _differences(study: dict, runs: list[dict], out: Path, benchmarks: dict[str, str]) -> list[dict]:
    """Compares every arm with the baseline, for each evaluation, benchmark and direction."""
    found, first = [], study["baseline"]
    names = [name for name in study["arms"] if name != first and any(r["arm"] == name for r in runs)]
    if not any(r["arm"] == first for r in runs):
        return []
    for evaluation in study["evaluate"]:
        hits = {name: _read_hits(out, name, runs, evaluation) for name in [first, *names]}
        for name in names:
            for (pairs, direction), (before, owner) in hits[first].items():
                change = compare_arms(before, hits[name][pairs, direction][0], owner)
                where = {"evaluation": evaluation, "benchmark": benchmarks[pairs], "direction": direction}
                found.append({"arm": name, **where, **{k: round(v, 5) for k, v in change.items()}})
    return found


def compare_arms(first: np.ndarray, second: np.ndarray, owner: np.ndarray | None = None) -> dict[str, float]:
    """Compares the R@1 of two arms on the same queries, treating images and seeds as random.

    The variance over images is the variance of the mean difference of an image's queries, and the variance over seeds
    is that of each arm's R@1; both are divided by their number. The interval is Welch's, with Satterthwaite's degrees
    of freedom. An arm with one seed adds no variance over seeds, because it is unknown.

    Args:
        first, second: 1 where the right answer has rank 1, else 0, [num_seeds, num_queries]; the numbers of seeds may
            differ.
        owner: the image of each query, [num_queries]; None if every query has its own image.

    Returns:
        ``difference``: second minus first; ``low`` and ``high``: its 95% interval; ``p``: the p-value of no difference.
    """
    from scipy.stats import t

    change = second.mean(axis=0) - first.mean(axis=0)
    owner = np.arange(len(change)) if owner is None else owner
    residuals = np.bincount(owner, change - change.mean()) / len(change)  # [num_images], sum to 0
    terms = [(float((residuals**2).sum()) * len(residuals) / (len(residuals) - 1), len(residuals) - 1)]
    for arm in (first, second):
        if len(arm) > 1:
            terms.append((float(arm.mean(axis=1).var(ddof=1)) / len(arm), len(arm) - 1))
    variance = sum(own for own, _ in terms)
    difference, error = float(change.mean()), variance**0.5
    if not variance:
        return {"difference": difference, "low": difference, "high": difference, "p": float(difference == 0)}
    freedom = variance**2 / sum(own**2 / number for own, number in terms)
    margin = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    return {"difference": difference, "low": difference - margin, "high": difference + margin, "p": p}


def _read_hits(out: Path, arm: str, runs: list[dict], evaluation: str) -> dict[tuple[str, str], tuple]:
    """Returns (pairs, direction) -> (whether the right answer has rank 1 [num_seeds, num_queries], queries' images)."""
    from training.eval.npz import read_ranks

    ranks = [read_ranks(out / f"{arm}-s{r['seed']}" / evaluation).values() for r in runs if r["arm"] == arm]
    by_pairs = [{own.digest: own for own in seed} for seed in ranks]
    return {
        (pairs, direction): (
            np.stack([seed[pairs].top1[direction] for seed in by_pairs]),
            own.owner if direction == "t2i" else None,
        )
        for pairs, own in by_pairs[0].items()
        for direction in DIRECTIONS
    }


def rows(recorded: dict) -> list[dict]:
    """Returns the table: one row for each arm, evaluation, benchmark and direction, with R@1 as fractions."""
    found = []
    for name, arm in recorded["arms"].items():
        own = [run for run in recorded["runs"] if run["arm"] == name]
        for evaluation in own[0]["evaluations"] if own else ():
            for key in benchmarks_of(own[0]["evaluations"][evaluation]):
                for direction in DIRECTIONS:
                    values = [run["evaluations"][evaluation][key][direction]["top1"] for run in own]
                    where = {"evaluation": evaluation, "benchmark": key, "direction": direction}
                    row = {"arm": name, "title": arm["title"], **where, "seeds": len(own)}
                    row |= {"top1": statistics.mean(values)}
                    row["sd_over_seeds"] = statistics.stdev(values) if len(own) > 1 else None
                    change = next((d for d in recorded["differences"] if _matches(d, name, where)), {})
                    row |= {k: change.get(k) for k in ("difference", "low", "high", "p")}
                    found.append(row)
    return found


def _matches(difference: dict, arm: str, where: dict) -> bool:
    return difference["arm"] == arm and all(difference[key] == value for key, value in where.items())
