"""Output of the length analysis: tables for the terminal, a figure, and the list of truncated captions."""

import csv
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from training.eval.record import DIRECTIONS
from training.eval.report.curves import plain
from training.eval.retrieval import RankedSet

KINDS = {"tokens": "R@1 by tokens", "sentences": "R@1 by sentences", "sensitivity": "R@1 after changes"}


def format_lengths(result: dict) -> str:
    """Returns one table per kind of change, R@1 in percent, and the effective lengths."""
    tables = []
    for kind, heading in KINDS.items():
        sets = {title: found[kind] for title, found in result["sets"].items() if kind in found}
        if not sets:
            continue
        columns = list(next(iter(sets.values())))
        rows = [
            [title, name, *(f"{100 * found[column][direction]:.2f}" for column in columns)]
            for title, found in sets.items()
            for direction, name in DIRECTIONS.items()
        ]
        if kind == "sensitivity":
            rows += [[t, "cosine", *(f"{found[c]['similarity']:.3f}" for c in columns)] for t, found in sets.items()]
        align = ["left", "left"] + ["right"] * len(columns)
        tables.append(tabulate(rows, headers=[heading, "", *columns], colalign=align, disable_numparse=True))
    return "\n\n".join(tables + [describe_effective_length(result)] * ("effective_length" in result))


def describe_effective_length(result: dict) -> str:
    """Returns a line such as ``Effective length: 61 (95%: 55 to 70) tokens of 128 (DCI 58, IIW 64)``."""
    lengths = {title: "none" if n is None else f"{n:.0f}" for title, n in result["effective_length"].items()}
    overall = lengths.pop("all")
    interval = result["effective_length_ci95"]["all"]
    overall += " (95%: {:.0f} to {:.0f})".format(*interval) if interval else ""
    each = ", ".join(f"{title} {length}" for title, length in lengths.items())
    return f"Effective length: {overall} tokens of {result['context_length']} ({each})"


def draw_lengths(result: dict) -> object:
    """Draws R@1 (mean of both directions) over tokens and sentences, one curve per benchmark; returns the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [k for k in ("tokens", "sentences") if any(k in found for found in result["sets"].values())]
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(5 * len(kinds) + 1, 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, kind in zip(panels[0], kinds):
        for title, found in result["sets"].items():
            names = list(found[kind])
            places = [int(n) for n in names] if kind == "tokens" else range(len(names))
            recall = [50 * (found[kind][n]["i2t"] + found[kind][n]["t2i"]) for n in names]
            (line,) = axes.plot(places, recall, marker="o", label=plain(title))
            if kind == "tokens" and result["effective_length"][title] is not None:
                axes.axvline(result["effective_length"][title], color=line.get_color(), linestyle=":", alpha=0.7)
        axes.set_xticks(list(places), names, rotation=45 if kind == "tokens" else 0)
        axes.set(xlabel=f"{kind} of each caption that are used", ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("R@1 in percent, mean of both directions")
    panels[0][-1].legend()
    return figure


def write_cut_captions(ranked: Sequence[RankedSet], path: Path) -> int:
    """Writes a CSV of the captions that the tokenizer truncates, in the order of the benchmarks.

    Args:
        ranked: benchmarks.
        path: the file.

    Returns:
        The number of captions written.
    """
    rows = []
    for r in ranked:
        for row in (r.lost_tokens > 0).nonzero()[:, 0].tolist():
            name = r.pairs.image_paths[r.pairs.image_of_caption[row]].name
            rows.append([r.pairs.title, row + 1, name, int(r.lost_tokens[row]), r.pairs.captions[row]])
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["benchmark", "caption_number", "image", "lost_tokens", "caption"], *rows])
    return len(rows)
