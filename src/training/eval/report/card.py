"""Results of diagnostics as tables for the terminal and as one figure, the long-text card of a model."""

from collections.abc import Sequence
from textwrap import fill

from training.eval.lengths import MIN_RIGHT
from training.eval.record import DIRECTIONS
from training.eval.report.curves import plain
from training.eval.tables import format_rows, interval, percent, points

_SCORES = {
    ("himo", "2"): "HiMo@2, percent",
    ("himo", "3"): "HiMo@3, percent",
    ("himo", "K"): "HiMo@K, correlation",
    ("wrong_sentence", "after the first sentence"): "correct text preferred, percent: wrong sentence after the first",
    ("wrong_sentence", "after the whole caption"): "the same: wrong sentence after the caption",
}


def format_diagnostics(found: dict[str, dict]) -> str:
    """Returns the tables of all benchmarks for a terminal.

    Args:
        found: result of `diagnostics.diagnose`.
    """
    lengths, diagnostics = found.get("lengths", {}), found.get("diagnostics", {})
    tables = []
    for title in diagnostics or lengths["sets"]:
        measured = diagnostics.get(title, {})
        rows = _length_rows(lengths.get("sets", {}).get(title, {}))
        rows += [_change_row(name, own) for name, own in measured.get("changes", {}).items()]
        rows += [
            {"captions": f"sentence {position} alone, of {own['captions']:,}", "T2I\nR@1": percent(own["t2i"])}
            for position, own in measured.get("positions", {}).items()
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        ordered = [name for name in _COLUMNS if name in names]
        tables.append(f"{title}\n" + format_rows([{name: row.get(name, "") for name in ordered} for row in rows]))
        if measured:
            tables.append(format_rows([_score_row(title, measured[kind][name], kind, name) for kind, name in _SCORES]))
    return "\n\n".join(tables + [describe_effective_length(lengths)] * ("effective_length" in lengths))


_COLUMNS = ["captions", "changed"]
_COLUMNS += [f"{name}\n{column}" for name in DIRECTIONS.values() for column in ("R@1", "change", "95% interval")]
_COLUMNS += ["cosine"]


def _length_rows(by_kind: dict[str, dict[str, dict]]) -> list[dict[str, str]]:
    rows = []
    for kind, measured in by_kind.items():
        for name, own in measured.items():
            first = "" if name == "all" or kind == "sensitivity" else "first "
            row = {"captions": f"{first}{name}{'' if kind == 'sensitivity' else ' ' + kind}"}
            row |= {f"{heading}\nR@1": percent(own[direction]) for direction, heading in DIRECTIONS.items()}
            rows.append(row | ({"cosine": f"{own['similarity']:.3f}"} if "similarity" in own else {}))
    return rows


def _change_row(name: str, own: dict) -> dict[str, str]:
    row = {"captions": name, "changed": f"{own['changed']:,}"}
    for direction, heading in DIRECTIONS.items():
        r = own[direction]
        row[f"{heading}\nR@1"] = percent(r["top1"])
        if "p" in r:
            row[f"{heading}\nchange"] = points(r["difference"])
            row[f"{heading}\n95% interval"] = interval((r["low"], r["high"]), signed=True)
    return row


def _score_row(title: str, own: dict, kind: str, name: str) -> dict[str, str]:
    digits, factor = (3, 1) if name == "K" else (1, 100)
    row = {f"{title}: similarity to the image": _SCORES[kind, name], "score": "-", "95% interval": "-", "margin": ""}
    if own["captions"]:
        row["score"] = f"{factor * own['score']:.{digits}f}"
        row["95% interval"] = " to ".join(f"{factor * bound:.{digits}f}" for bound in own["ci95"])
        row["margin"] = f"{own['margin']:+.4f}" if "margin" in own else ""
    counts = {"captions": "captions", "left_out": "left out", "tied": "tied", "tied_by_cut": "of these\ntruncated"}
    return row | {heading: f"{own[count]:,}" for count, heading in counts.items()}


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


def draw_card(label: str, found: dict[str, dict]) -> object:
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
    colours = {title: f"C{n}" for n, title in enumerate(titles)}
    kinds = [kind for kind in ("tokens", "sentences") if any(kind in lengths["sets"][title] for title in titles)]
    num_rows = 2 if diagnostics else 1
    size = (5.5 * max(len(kinds), num_rows), 4 * num_rows)
    figure, panels = pyplot.subplots(
        num_rows, max(len(kinds), num_rows), figsize=size, layout="constrained", squeeze=False
    )
    for axes in panels[0][len(kinds) :]:
        axes.set_axis_off()
    for axes, kind in zip(panels[0], kinds):
        _draw_curve(axes, kind, lengths, colours)
    panels[0][0].legend(fontsize=9)
    if diagnostics:
        _draw_positions(panels[1][0], diagnostics, colours)
        _draw_changes(panels[1][1], diagnostics, colours)
        lines = [f"Long-text card: {plain(label)}", _describe_length(lengths)]
        lines += [_describe_scores(title, diagnostics[title]) for title in titles]
        figure.suptitle("\n".join(line for line in lines if line), fontsize=11)
    return figure


def _describe_scores(title: str, measured: dict) -> str:
    himo = [f"HiMo@{name} {own['score']:.2f}" for name, own in measured["himo"].items() if own["captions"]]
    wrong = [f"{100 * own['score']:.0f}% {name}" for name, own in measured["wrong_sentence"].items() if own["captions"]]
    preferred = f"; correct text preferred to a wrong sentence: {', '.join(wrong)}" if wrong else ""
    return f"{plain(title)}: {', '.join(himo)}{preferred}"


def _describe_length(lengths: dict) -> str:
    length = lengths.get("effective_length", {}).get("all")
    if length is None:
        return ""
    low, high = lengths["effective_length_ci95"]["all"]
    return f"Effective length {length:.0f} tokens ({low:.0f} to {high:.0f}) of {lengths['context_length']}"


def _draw_curve(axes: object, kind: str, lengths: dict, colours: dict[str, str]) -> None:
    for title, colour in colours.items():
        curve = lengths["sets"][title].get(kind)
        if not curve:
            continue
        places = [int(name) for name in curve] if kind == "tokens" else range(len(curve))
        axes.plot(places, _mean_recall(curve.values()), marker="o", color=colour, label=plain(title))
        axes.set_xticks(list(places), list(curve), rotation=45 if kind == "tokens" else 0)
        if kind == "tokens" and lengths["effective_length"][title] is not None:
            axes.axvspan(*lengths["effective_length_ci95"][title], color=colour, alpha=0.15, linewidth=0)
            axes.axvline(lengths["effective_length"][title], color=colour, linestyle=":")
    bands = "; band: effective length, 95%" if kind == "tokens" else ""
    axes.set(xlabel=f"{kind} that are used{bands}", ylabel="R@1, percent, both directions", ylim=(0, None))
    axes.grid(alpha=0.3)


def _mean_recall(points: Sequence[dict]) -> list[float]:
    return [50 * (point["i2t"] + point["t2i"]) for point in points]


def _draw_positions(axes: object, result: dict[str, dict], colours: dict[str, str]) -> None:
    width = 0.8 / max(len(colours), 1)
    for n, (title, colour) in enumerate(colours.items()):
        found = result[title]["positions"]
        places = [int(position) - 0.4 + width * (n + 0.5) for position in found]
        values = [100 * own["t2i"] for own in found.values()]
        errors = [[abs(100 * (own["ci95"][k] - own["t2i"])) for own in found.values()] for k in (0, 1)]
        axes.bar(places, values, width, color=colour, yerr=errors, error_kw={"elinewidth": 0.8, "ecolor": "0.3"})
    last = max((int(p) for title in colours for p in result[title]["positions"]), default=1)
    axes.set_xticks(range(1, last + 1))
    axes.set(xlabel="position of the single sentence used as query", ylabel="text to image R@1, percent")
    axes.grid(axis="y", alpha=0.3)


def _draw_changes(axes: object, result: dict[str, dict], colours: dict[str, str]) -> None:
    names: list[str] = []
    step = 0.7 / max(len(colours), 1)
    for n, (title, colour) in enumerate(colours.items()):
        changes = {name: own for name, own in result[title]["changes"].items() if "p" in own["t2i"]}
        names = list(changes)
        places = [place - 0.35 + step * (n + 0.5) for place in range(len(changes))]
        t2i = [own["t2i"] for own in changes.values()]
        values = [100 * r["difference"] for r in t2i]
        errors = [[100 * (r["difference"] - r["low"]) for r in t2i], [100 * (r["high"] - r["difference"]) for r in t2i]]
        axes.errorbar(values, places, xerr=[[max(e, 0) for e in side] for side in errors], fmt="o", color=colour)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(names)), [fill(name, 18) for name in names], fontsize=9)
    axes.set(xlabel="change in text to image R@1, points, 95% interval", ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
