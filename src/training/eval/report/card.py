"""The long-text card of a model: its diagnostics as tables for the terminal and as one figure."""

from collections.abc import Sequence
from textwrap import fill

from tabulate import tabulate

from training.eval.lengths import MIN_RIGHT
from training.eval.record import DIRECTIONS
from training.eval.report.curves import plain

_HIMO = {"2": "HiMo@2, percent", "3": "HiMo@3, percent", "K": "HiMo@K, correlation"}


def format_diagnostics(result: dict[str, dict]) -> str:
    """Returns the tables of all benchmarks for a terminal.

    Args:
        result: result of `diagnostics.diagnose`.
    """
    tables = []
    for title, found in result.items():
        rows = []
        for name, own in found["changes"].items():
            row = [name, f"{own['changed']:,}"]
            for direction in DIRECTIONS:
                r = own[direction]
                row.append(f"{100 * r['top1']:.2f}")
                row += [f"{100 * r['difference']:+.2f}", _interval(r["low"], r["high"])] if "p" in r else ["", ""]
            rows.append(row)
        headers = [f"{title}: captions changed", "number"]
        headers += [h for name in DIRECTIONS.values() for h in (f"{name}\nR@1", "change", "95% interval")]
        align = ["left"] + ["right"] * 7
        tables.append(tabulate(rows, headers=headers, colalign=align, disable_numparse=True))
        tables.append(_format_himo(title, found["himo"]))
        tables.append(_format_positions(title, found["positions"]))
    return "\n\n".join(tables)


def _interval(low: float, high: float) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def _format_himo(title: str, himo: dict[str, dict]) -> str:
    rows = []
    for name, heading in _HIMO.items():
        own, factor = himo[name], 1 if name == "K" else 100
        score = interval = "-"
        if own["captions"]:
            digits = 3 if name == "K" else 1
            score = f"{factor * own['score']:.{digits}f}"
            interval = "{:.{d}f} to {:.{d}f}".format(*(factor * bound for bound in own["ci95"]), d=digits)
        rows.append(
            [heading, score, interval, *(f"{own[k]:,}" for k in ("captions", "left_out", "tied", "tied_by_cut"))]
        )
    headers = [
        f"{title}: similarity grows",
        "score",
        "95% interval",
        "captions",
        "too short",
        "tied",
        "of these truncated",
    ]
    return tabulate(rows, headers=headers, colalign=["left"] + ["right"] * 6, disable_numparse=True)


def _format_positions(title: str, positions: dict[str, dict]) -> str:
    rows = [
        [position, f"{100 * own['t2i']:.2f}", "{:.1f}-{:.1f}".format(*(100 * b for b in own["ci95"])), own["captions"]]
        for position, own in positions.items()
    ]
    headers = [f"{title}: sentence alone, at", "T2I R@1", "95% interval", "captions"]
    return tabulate(rows, headers=headers, colalign=["left", "right", "right", "right"], disable_numparse=True)


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


def draw_card(label: str, lengths: dict, result: dict[str, dict]) -> object:
    """Draws the card: recall by tokens, by sentences and by position, and the effect of changes to captions.

    Args:
        label: the model.
        lengths: result of `lengths.analyse_lengths`.
        result: result of `diagnostics.diagnose`; benchmarks at chance level are left out.

    Returns:
        The matplotlib figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = above_chance(result)
    colours = {title: f"C{n}" for n, title in enumerate(titles)}
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _draw_curve(panels[0][0], "tokens", lengths, colours)
    _draw_curve(panels[0][1], "sentences", lengths, colours)
    _draw_positions(panels[1][0], result, colours)
    _draw_changes(panels[1][1], result, colours)
    panels[0][0].legend(fontsize=9)
    lines = [f"Long-text card: {plain(label)}", _describe_length(lengths)]
    for title in titles:
        scores = [f"{n} {result[title]['himo'][n]['score']:.2f}" for n in _HIMO if result[title]["himo"][n]["captions"]]
        lines.append(f"{plain(title)}: HiMo@{', @'.join(scores)}")
    figure.suptitle("\n".join(line for line in lines if line), fontsize=11)
    return figure


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
