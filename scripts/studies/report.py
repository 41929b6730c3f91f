"""Tables and figures of a study, from its recorded results: what `run.py` calls at its end.

    python scripts/studies/report.py OUT/study.json --out DIR     draw the figures of a recorded study, print its tables

A mean over an arm's seeds stands with its standard deviation over seeds. A difference from the baseline is taken query
by query, averaged over the seeds of both arms; its 95% interval holds the variation over images and over seeds.
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

import numpy as np

DIRECTIONS = {"i2t": "I2T", "t2i": "T2I"}
KEPT = ("num-images", "num-pairs", "fingerprint", "truncated-share")
MAX_POINTS = 40  # of a recorded curve


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run's last epoch."""
    return max((folder / "checkpoints").glob("epoch_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))


def collect(folder: Path, study: dict) -> dict:
    """Returns what is worth keeping of a run: results of its evaluations, and its training's curves."""
    evaluations = {name: _evaluation(folder / name) for name in study["evaluate"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    names = [n for n in steps[-1] if n.endswith("loss") or "corner" in n or n == "train/logit_scale"]
    every = max(1, -(-len(steps) // MAX_POINTS))
    kept = steps[::-1][::every][::-1]  # the last one among them
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
    if "lengths" in line:
        found["lengths"] = line["lengths"]
    return found


def _benchmarks(evaluation: dict) -> list[str]:
    return [key for key in evaluation if key != "lengths"]


def one_line(result: dict) -> str:
    """R@1 of all evaluations of a run."""
    parts = []
    for name, evaluation in result["evaluations"].items():
        for key in _benchmarks(evaluation):
            values = " / ".join(f"{100 * evaluation[key][d]['top1']:.1f}" for d in DIRECTIONS)
            parts.append(f"{name} {values}")
    return ", ".join(parts)


def record(study: dict, out: Path) -> dict:
    """Gathers all finished runs below OUT, compares the arms, and writes OUT/study.json; returns its content."""
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
    """Gives the same pairs the same name in all runs, whatever their file was called; fingerprint -> name."""
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
    return run | ({"corners": json.loads(corners.read_text())} if corners.exists() else {})


def _differences(study: dict, runs: list[dict], out: Path, benchmarks: dict[str, str]) -> list[dict]:
    """Every arm against the baseline, per evaluation, benchmark and direction."""
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
    """Compares the R@1 of two arms on the same queries, with images and seeds as random.

    The variance over images is that of the mean difference of an image's queries, the variance over seeds that of the
    arms' own R@1, each divided by their number; the interval is Welch's, with Satterthwaite's degrees of freedom. An
    arm with one seed adds no variance over seeds, because none is known.

    Args:
        first, second: 1 where the right answer came first, [num_seeds, num_queries]; the numbers of seeds may differ.
        owner: each query's image, [num_queries]; None if each query is one.

    Returns:
        ``difference`` of second and first, ``low`` and ``high`` of its 95% interval, and ``p`` of there being none.
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
    """(pairs, direction) -> whether the right answer came first, [num_seeds, num_queries], and the queries' images."""
    from training.eval.report.ranks import read_ranks

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
    """The table: a row per arm, evaluation, benchmark and direction; fractions."""
    found = []
    for name, arm in recorded["arms"].items():
        own = [run for run in recorded["runs"] if run["arm"] == name]
        for evaluation in own[0]["evaluations"] if own else ():
            for key in _benchmarks(own[0]["evaluations"][evaluation]):
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


def markdown(recorded: dict) -> str:
    """R@1 in percent, a table per evaluation and a row per arm: mean over seeds, and difference from the baseline."""
    from tabulate import tabulate

    tables: dict[str, dict[str, dict]] = {}
    for row in rows(recorded):
        table = tables.setdefault(f"{row['evaluation']} captions", {})
        cells = table.setdefault(row["arm"], {"arm": row["title"], "seeds": row["seeds"]})
        spread = "" if row["sd_over_seeds"] is None else f" ({100 * row['sd_over_seeds']:.1f})"
        name = DIRECTIONS[row["direction"]]
        cells[name] = f"{100 * row['top1']:.1f}{spread}"
        cells[f"{name}, difference"] = _interval(row)
    return "\n\n".join(
        f"{title}:\n\n{tabulate(list(table.values()), headers='keys', tablefmt='github', disable_numparse=True)}"
        for title, table in tables.items()
    )


def _interval(row: dict) -> str:
    if row["difference"] is None:
        return ""
    return f"{100 * row['difference']:+.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def write_tables(recorded: dict, folder: Path) -> None:
    """Writes FOLDER/table.csv and FOLDER/table.md."""
    found = rows(recorded)
    with open(folder / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    (folder / "table.md").write_text(markdown(recorded) + "\n", encoding="utf-8")


def draw(recorded: dict, folder: Path, stem: str = "study") -> list[Path]:
    """Writes the figures: R@1 of all arms, and where recorded R@1 by tokens and the corners' cosine with [CLS]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, figure in (
        ("r1", _draw_recall(recorded)),
        ("lengths", _draw_lengths(recorded)),
        ("corners", _draw_corners(recorded)),
    ):
        if figure is not None:
            path = folder / f"{stem}-{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            pyplot.close(figure)
            written.append(path)
    return written


def _draw_recall(recorded: dict) -> object:
    """A panel per evaluation; bars are means over seeds, dots single seeds."""
    from matplotlib import pyplot

    found = rows(recorded)
    panels = list(dict.fromkeys((row["evaluation"], row["benchmark"]) for row in found))
    titles = list(dict.fromkeys(row["title"] for row in found))
    height = 1.2 + 0.42 * len(titles)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels) + 2, height), layout="constrained", sharey=True, squeeze=False
    )
    for panel, (evaluation, key) in zip(axes[0], panels):
        for number, direction in enumerate(DIRECTIONS):
            own = [
                r for r in found if (r["evaluation"], r["benchmark"], r["direction"]) == (evaluation, key, direction)
            ]
            places = [titles.index(r["title"]) + 0.38 * (number - 0.5) for r in own]
            bars = panel.barh(places, [100 * r["top1"] for r in own], 0.36, label=DIRECTIONS[direction], alpha=0.75)
            panel.bar_label(bars, fmt="%.1f", label_type="center", fontsize=8)
            for place, row in zip(places, own):
                runs = [r for r in recorded["runs"] if r["arm"] == row["arm"]]
                dots = [100 * r["evaluations"][evaluation][key][direction]["top1"] for r in runs]
                panel.plot(dots, [place] * len(dots), "k.", markersize=4)
        panel.set(title=f"{evaluation} captions", xlabel="R@1 in percent")
        panel.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(titles)), titles)
    axes[0][0].invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(recorded["title"])
    return figure


def _draw_lengths(recorded: dict) -> object:
    """R@1 by tokens that are read, mean over seeds and directions; None if no evaluation asked for it."""
    from matplotlib import pyplot

    curves = {}
    for run in recorded["runs"]:
        for evaluation in run["evaluations"].values():
            for own in evaluation.get("lengths", {}).get("sets", {}).values():
                for tokens, value in own.get("tokens", {}).items():
                    points = curves.setdefault(recorded["arms"][run["arm"]]["title"], {})
                    points.setdefault(int(tokens), []).append(50 * (value["i2t"] + value["t2i"]))
    if not curves:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for title, points in curves.items():
        axes.plot(points.keys(), [statistics.mean(values) for values in points.values()], marker="o", label=title)
    axes.set(xlabel="tokens of each caption that are read", ylabel="R@1 in percent, mean of both directions")
    axes.set(title=recorded["title"], xscale="log")
    axes.set_xticks(list(next(iter(curves.values()))), list(next(iter(curves.values()))))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _draw_corners(recorded: dict) -> object:
    """The corners' mean cosine with [CLS] over steps; None if no run logged it."""
    from matplotlib import pyplot

    figure, drawn = None, set()
    for run in recorded["runs"]:
        curves = run["curves"]
        for name in (n for n in curves if "corner" in n and "cosine" in n):
            if figure is None:
                figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            title = recorded["arms"][run["arm"]]["title"]
            colour = f"C{list(recorded['arms']).index(run['arm']) % 10}"
            axes.plot(curves["step"], curves[name], color=colour, label=None if title in drawn else title)
            drawn.add(title)
    if figure is not None:
        axes.set(xlabel="step", ylabel="mean cosine of the corners with [CLS]", title=recorded["title"], ylim=(None, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def main() -> int:
    """Returns 0, or 2 for a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recorded", type=Path, nargs="+", help="study.json, or a copy under another name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the figures and tables")
    args = parser.parse_args()
    try:
        for path in args.recorded:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            print(markdown(recorded), *draw(recorded, args.out, path.stem), sep="\n")
    except (ValueError, KeyError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
