"""Makes tables and figures of a study from its recorded results; `run.py` calls it at the end.

    python scripts/studies/report.py OUT/study.json --out DIR     draw the figures of a recorded study, print its tables

Means over an arm's seeds are shown with the standard deviation over seeds.
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

from record import DIRECTIONS, benchmarks_of, rows

# Change of captions -> heading in the table.
CHANGES = {
    "first sentence dropped": "first dropped",
    "sentences shuffled": "shuffled",
    "one sentence dropped at random": "one dropped",
}


def one_line(result: dict) -> str:
    """Returns R@1 of all evaluations of a run in one line."""
    parts = []
    for name, evaluation in result["evaluations"].items():
        for key in benchmarks_of(evaluation):
            values = " / ".join(f"{100 * evaluation[key][d]['top1']:.1f}" for d in DIRECTIONS)
            parts.append(f"{name} {values}")
    return ", ".join(parts)


def markdown(recorded: dict) -> str:
    """Returns a table per evaluation with a row per arm: mean R@1 in percent, and difference from the baseline."""
    from tabulate import tabulate

    tables: dict[str, dict[str, dict]] = {}
    for row in rows(recorded):
        table = tables.setdefault(f"{row['evaluation']} captions", {})
        cells = table.setdefault(row["arm"], {"arm": row["title"], "seeds": row["seeds"]})
        spread = "" if row["sd_over_seeds"] is None else f" ({100 * row['sd_over_seeds']:.1f})"
        name = DIRECTIONS[row["direction"]]
        cells[name] = f"{100 * row['top1']:.1f}{spread}"
        cells[f"{name}, difference"] = _interval(row)
    if found := _diagnostics(recorded):
        tables["diagnostics of long text"] = found
    return "\n\n".join(
        f"{title}:\n\n{tabulate(list(table.values()), headers='keys', tablefmt='github', disable_numparse=True)}"
        for title, table in tables.items()
    )


def _diagnostics(recorded: dict) -> dict[str, dict]:
    """Returns a row for each arm with diagnostics: HiMo, and changes of R@1 in points (I2T / T2I), means over seeds."""
    table = {}
    for name, arm in recorded["arms"].items():
        runs = [run for run in recorded["runs"] if run["arm"] == name]
        found = [own for run in runs for own in run.get("diagnostics", {}).values()]
        if not found:
            continue
        cells = {"arm": arm["title"], "seeds": len(found)}
        for which, factor in (("2", 100), ("3", 100), ("K", 1)):
            score = factor * statistics.mean(own["himo"][which]["score"] for own in found)
            cells[f"HiMo@{which}"] = f"{score:.{1 if factor > 1 else 2}f}"
        for change, heading in CHANGES.items():
            moved = [
                100 * statistics.mean(own["changes"][change][d]["difference"] for own in found) for d in DIRECTIONS
            ]
            cells[heading] = " / ".join(f"{value:+.1f}" for value in moved)
        table[name] = cells
    return table


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
    """Draws R@1 of all arms, differences of the main ones and, if recorded, R@1 by tokens and the corners' cosine.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, figure in (
        ("r1", _draw_recall(recorded)),
        ("main", _draw_differences(recorded)),
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
    """Draws a panel per evaluation; bars are means over seeds, dots are single seeds."""
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


def _draw_differences(recorded: dict) -> object:
    """Draws differences from the baseline with their intervals, for the arms with as many seeds as the baseline."""
    from matplotlib import pyplot

    found = rows(recorded)
    seeds = next(row["seeds"] for row in found if row["arm"] == recorded["baseline"])
    found = [row for row in found if row["seeds"] == seeds and row["low"] is not None]
    if not found:
        return None
    panels = list(dict.fromkeys((row["evaluation"], row["benchmark"]) for row in found))
    titles = list(dict.fromkeys(row["title"] for row in found))
    size = (4.5 * len(panels) + 2, 1.6 + 0.6 * len(titles))
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for panel, (evaluation, key) in zip(axes[0], panels):
        for number, direction in enumerate(DIRECTIONS):
            these = [
                r for r in found if (r["evaluation"], r["benchmark"], r["direction"]) == (evaluation, key, direction)
            ]
            heights = [titles.index(row["title"]) + 0.25 * (number - 0.5) for row in these]
            points = [100 * row["difference"] for row in these]
            ends = [[100 * abs(row["difference"] - row[end]) for row in these] for end in ("low", "high")]
            panel.errorbar(points, heights, xerr=ends, fmt="o", capsize=3, label=DIRECTIONS[direction])
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(title=f"{evaluation} captions", xlabel="R@1, difference in points")
        panel.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(titles)), titles)
    axes[0][0].set_ylim(len(titles) - 0.5, -0.5)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    baseline = recorded["arms"][recorded["baseline"]]["title"]
    figure.suptitle(f"{recorded['title']}, {seeds} seeds: difference from {baseline}, with 95% intervals", fontsize=10)
    return figure


def _draw_lengths(recorded: dict) -> object:
    """Draws R@1 by number of tokens read, mean over seeds and directions; returns None if it was not recorded."""
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
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    for number, (title, points) in enumerate(curves.items()):
        means = [statistics.mean(values) for values in points.values()]
        axes.plot(points.keys(), means, marker="o", linestyle="--" if number > 9 else "-", label=title)
    axes.set(xlabel="tokens of each caption that are read", ylabel="R@1 in percent, mean of both directions")
    axes.set(title=recorded["title"], xscale="log")
    axes.set_xticks(list(next(iter(curves.values()))), list(next(iter(curves.values()))))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right center")
    return figure


def _draw_corners(recorded: dict) -> object:
    """Draws the corners' mean cosine with [CLS] over steps; returns None if no run logged it."""
    from matplotlib import pyplot

    figure, drawn = None, set()
    for run in recorded["runs"]:
        curves = run["curves"]
        for name in (n for n in curves if "corner" in n and "cosine" in n):
            if figure is None:
                figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
            title = recorded["arms"][run["arm"]]["title"]
            colour = f"C{list(recorded['arms']).index(run['arm']) % 10}"
            axes.plot(curves["step"], curves[name], color=colour, label=None if title in drawn else title)
            drawn.add(title)
    if figure is not None:
        axes.set(xlabel="step", ylabel="mean cosine of the corners with [CLS]", title=recorded["title"], ylim=(None, 1))
        axes.grid(alpha=0.3)
        figure.legend(fontsize=7, loc="outside right center")
    return figure


def main() -> int:
    """Runs the command line; returns 0, or exits with 2 on a usage error."""
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
