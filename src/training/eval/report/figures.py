"""Figures of a report, and the diagnostics' tables for the terminal: recall curves and the long-text card."""

import io
import itertools
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from training.eval.lengths import MIN_RIGHT
from training.eval.metrics import hit_probability
from training.eval.record import DIRECTIONS, format_rows, interval, percent, points
from training.eval.retrieval import RankedSet

KS = (1, 2, 3, 5, 10, 20, 50, 100)
CARD = "Long-text card"
_COLUMNS = ["captions", "changed"]
_COLUMNS += [f"{name}\n{column}" for name in DIRECTIONS.values() for column in ("R@1", "change", "95% interval")]
_COLUMNS += ["cosine"]
_SCORES = {
    ("himo", "2"): "HiMo@2, percent",
    ("himo", "3"): "HiMo@3, percent",
    ("himo", "K"): "HiMo@K, correlation",
    ("wrong_sentence", "after the first sentence"): "correct text preferred, percent: wrong sentence after the first",
    ("wrong_sentence", "after the whole caption"): "the same: wrong sentence after the caption",
}


def recall_curves(ranked: Sequence[RankedSet]) -> list[dict[str, Any]]:
    """Returns for each benchmark and direction ``title``, ``direction`` and ``recall``, fractions at each of `KS`."""
    curves = []
    for r, (direction, name) in itertools.product(ranked, DIRECTIONS.items()):
        recall = [float(hit_probability(getattr(r, direction), k).mean()) for k in KS]
        curves.append({"title": r.pairs.title, "direction": name, "recall": recall})
    return curves


def draw_recall(curves: Sequence[dict[str, Any]]) -> str:
    """Draws recall at k over k, one panel per direction; returns SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none", "font.size": 11}):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
        for axes, direction in zip(panels, DIRECTIONS.values()):
            for curve in (c for c in curves if c["direction"] == direction):
                axes.plot(KS, [100 * value for value in curve["recall"]], marker="o", label=plain(curve["title"]))
            axes.set(xscale="log", xlabel="k", title=f"{direction}: recall at k, percent", ylim=(0, 101))
            axes.set_xticks(KS, [str(k) for k in KS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[1].legend(loc="lower right")
        return to_svg(figure)


def plain(text: str) -> str:
    """Escapes a label so that matplotlib does not interpret it as a formula."""
    return text.replace("$", r"\$")


def to_svg(figure: Any) -> str:
    """Returns a matplotlib figure as SVG without a date, and closes it."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def format_diagnostics(found: dict[str, dict]) -> str:
    """Returns the tables of all benchmarks for a terminal.

    Args:
        found: result of `diagnostics.diagnose`.
    """
    lengths, diagnostics = found.get("lengths", {}), found.get("diagnostics", {})
    tables = []
    for title in diagnostics or lengths["sets"]:
        measured = diagnostics.get(title, {})
        kinds = lengths.get("sets", {}).get(title, {}) | {"changes": measured.get("changes", {})}
        rows = [_change_row(kind, name, change) for kind, of in kinds.items() for name, change in of.items()]
        rows += [
            {"captions": f"sentence {position} alone, of {alone['captions']:,}", "T2I\nR@1": percent(alone["t2i"])}
            for position, alone in measured.get("positions", {}).items()
        ]
        used = [name for name in _COLUMNS if any(name in row for row in rows)]
        tables.append(f"{title}\n" + format_rows([{name: row.get(name, "") for name in used} for row in rows]))
        if measured:
            tables.append(format_rows([_score_row(title, measured[kind][name], kind, name) for kind, name in _SCORES]))
    return "\n\n".join(tables + [describe_effective_length(lengths)] * ("effective_length" in lengths))


def _change_row(kind: str, name: str, change: dict) -> dict[str, str]:
    row = {"captions": name}
    if kind in ("tokens", "sentences"):
        row = {"captions": f"{name} {kind}" if name == "all" else f"first {name} {kind}"}
    for direction, heading in DIRECTIONS.items():
        recall = change[direction] if kind == "changes" else {"top1": change[direction]}
        row[f"{heading}\nR@1"] = percent(recall["top1"])
        if "p" in recall:
            row[f"{heading}\nchange"] = points(recall["difference"])
            row[f"{heading}\n95% interval"] = interval((recall["low"], recall["high"]), signed=True)
    row |= {"changed": f"{change['changed']:,}"} if "changed" in change else {}
    return row | ({"cosine": f"{change['similarity']:.3f}"} if "similarity" in change else {})


def _score_row(title: str, measured: dict, kind: str, name: str) -> dict[str, str]:
    digits, factor = (3, 1) if name == "K" else (1, 100)
    row = {f"{title}: similarity to the image": _SCORES[kind, name], "score": "-", "95% interval": "-", "margin": ""}
    if measured["captions"]:
        row["score"] = f"{factor * measured['score']:.{digits}f}"
        row["95% interval"] = " to ".join(f"{factor * bound:.{digits}f}" for bound in measured["ci95"])
        row["margin"] = f"{measured['margin']:+.4f}" if "margin" in measured else ""
    counts = {"captions": "captions", "left_out": "left out", "tied": "tied", "tied_by_cut": "of these\ntruncated"}
    return row | {heading: f"{measured[count]:,}" for count, heading in counts.items()}


def describe_effective_length(lengths: dict) -> str:
    """Returns a line such as ``Effective length: 61 (95%: 55 to 70) tokens of 128 (DCI 58, IIW 64)``."""
    by_title = {title: "none" if n is None else f"{n:.0f}" for title, n in lengths["effective_length"].items()}
    overall = by_title.pop("all")
    bounds = lengths["effective_length_ci95"]["all"]
    overall += " (95%: {:.0f} to {:.0f})".format(*bounds) if bounds else ""
    each = ", ".join(f"{title} {length}" for title, length in by_title.items())
    return f"Effective length: {overall} tokens of {lengths['context_length']} ({each})"


def above_chance(result: dict[str, dict]) -> list[str]:
    """Returns the titles of the benchmarks on which the model has enough right answers for a meaningful card.

    Args:
        result: result of `diagnostics.diagnose`.
    """
    titles = []
    for title, found in result.items():
        whole = found["changes"]["as it is"]
        recall = sum(whole[d]["top1"] for d in DIRECTIONS) / 2
        if recall * (found["himo"]["K"]["captions"] + found["himo"]["K"]["left_out"]) >= MIN_RIGHT:
            titles.append(title)
    return titles


class Figure(NamedTuple):
    """A figure: its title, the name of its file, and matplotlib's object."""

    title: str
    file: str
    drawing: Any


def draw(label: str, found: dict[str, dict]) -> Figure | None:
    """Draws the card of a model, or the curves alone if it is at chance level; None if there are no curves.

    Args:
        label: the model.
        found: result of `diagnostics.diagnose`.
    """
    if above_chance(found.get("diagnostics", {})):
        return Figure(CARD, "long_text_card.png", draw_card(label, found))
    sets = found.get("lengths", {}).get("sets", {})
    if any(kinds.keys() & {"tokens", "sentences"} for kinds in sets.values()):
        return Figure("Recall with shortened captions", "lengths.png", draw_card(label, {"lengths": found["lengths"]}))
    return None


def draw_card(label: str, found: dict[str, dict]) -> Any:
    """Draws recall by tokens and by sentences; with diagnostics also recall by position and the effect of changes.

    Args:
        label: the model.
        found: result of `diagnostics.diagnose`; with diagnostics, benchmarks at chance level are left out.

    Returns:
        The matplotlib figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths, diagnostics = found["lengths"], found.get("diagnostics")
    titles = above_chance(diagnostics) if diagnostics else list(lengths["sets"])
    kinds = [kind for kind in ("tokens", "sentences") if any(kind in lengths["sets"][title] for title in titles)]
    shape = (2, 2) if diagnostics else (1, len(kinds))
    size = (5.5 * shape[1], 4 * shape[0])
    figure, panels = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for axes in panels[0][len(kinds) :]:
        axes.set_axis_off()
    for axes, kind in zip(panels[0], kinds):
        _draw_curves(axes, kind, lengths, titles)
    panels[0][0].legend(fontsize=9)
    if diagnostics:
        alone = {t: {k: (p["t2i"], *p["ci95"]) for k, p in diagnostics[t]["positions"].items()} for t in titles}
        _draw_intervals(panels[1][0], alone, "text to image R@1 with the n-th sentence as query, percent")
        t2i = {t: {n: c["t2i"] for n, c in diagnostics[t]["changes"].items() if "p" in c["t2i"]} for t in titles}
        changes = {t: {n: (r["difference"], r["low"], r["high"]) for n, r in found.items()} for t, found in t2i.items()}
        _draw_intervals(panels[1][1], changes, "change in text to image R@1, points, 95% interval")
        lines = [f"{CARD}: {label}"]
        lines += [describe_effective_length(lengths)] if "effective_length" in lengths else []
        lines += [_describe_scores(title, diagnostics[title]) for title in titles]
        figure.suptitle(plain("\n".join(lines)), fontsize=11)
    return figure


def _describe_scores(title: str, measured: dict) -> str:
    himo = [f"HiMo@{name} {score['score']:.2f}" for name, score in measured["himo"].items() if score["captions"]]
    wrong = [f"{100 * s['score']:.0f}% {name}" for name, s in measured["wrong_sentence"].items() if s["captions"]]
    preferred = f"; correct text preferred to a wrong sentence: {', '.join(wrong)}" if wrong else ""
    return f"{title}: {', '.join(himo)}{preferred}"


def _draw_curves(axes: Any, kind: str, lengths: dict, titles: list[str]) -> None:
    for number, title in enumerate(titles):
        curve, colour = lengths["sets"][title][kind], f"C{number}"
        x = [int(name) for name in curve] if kind == "tokens" else range(len(curve))
        recall = [50 * (point["i2t"] + point["t2i"]) for point in curve.values()]
        axes.plot(x, recall, marker="o", color=colour, label=plain(title))
        axes.set_xticks(list(x), list(curve), rotation=45 if kind == "tokens" else 0)
        if kind == "tokens" and lengths["effective_length"][title] is not None:
            axes.axvspan(*lengths["effective_length_ci95"][title], color=colour, alpha=0.15, linewidth=0)
            axes.axvline(lengths["effective_length"][title], color=colour, linestyle=":")
    bands = "; band: effective length, 95%" if kind == "tokens" else ""
    axes.set(xlabel=f"{kind} that are used{bands}", ylabel="R@1, percent, both directions", ylim=(0, None))
    axes.grid(alpha=0.3)


def _draw_intervals(axes: Any, by_title: Mapping[str, dict[str, tuple]], label: str) -> None:
    """Draws for each title and name a fraction with its interval, (value, low, high), in percent."""
    names = list(dict.fromkeys(name for found in by_title.values() for name in found))
    for number, found in enumerate(by_title.values()):
        value, low, high = 100 * np.array(list(found.values())).reshape(-1, 3).T
        y = [names.index(name) - 0.35 + 0.7 / len(by_title) * (number + 0.5) for name in found]
        errors = np.clip([value - low, high - value], 0, None)
        axes.errorbar(value, y, xerr=errors, fmt="o", color=f"C{number}")
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(names)), [fill(name, 18) for name in names], fontsize=9)
    axes.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
