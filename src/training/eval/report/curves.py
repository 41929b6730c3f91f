"""Recall curves of a report, as SVG that depends on the numbers only."""

import io
import itertools
from collections.abc import Sequence

from training.eval.metrics import hit_probability
from training.eval.record import DIRECTIONS
from training.eval.retrieval import RankedSet

KS = (1, 2, 3, 5, 10, 20, 50, 100)


def recall_curves(ranked: Sequence[RankedSet]) -> list[dict[str, object]]:
    """Returns for each benchmark and direction ``title``, ``direction`` and ``recall``, fractions at each of `KS`."""
    curves = []
    for r, (direction, name) in itertools.product(ranked, DIRECTIONS.items()):
        recall = [float(hit_probability(getattr(r, direction), k).mean()) for k in KS]
        curves.append({"title": r.pairs.title, "direction": name, "recall": recall})
    return curves


def draw_recall(curves: Sequence[dict[str, object]]) -> str:
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


def to_svg(figure: object) -> str:
    """Returns a matplotlib figure as SVG without a date, and closes it."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
