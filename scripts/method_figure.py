"""Draws figures/method.svg: the two towers, the corner tokens, the attention rule, and the two terms of the loss.

python scripts/method_figure.py [OUT.svg]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).parents[1] / "figures" / "method.svg"
BLUE, ORANGE, GREEN, GREY, INK = "#4477aa", "#ee7733", "#228833", "#bbbbbb", "#222222"
TOKENS = ("[CLS]", "C0", "C1", "a", "street", "[SEP]", "two", "dogs", "[SEP]")
NUM_CORNERS = 2


def box(axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10) -> None:
    """Draws a rounded box with its lower left corner at (x, y)."""
    style = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color, ec=INK, lw=0.8
    )
    axes.add_patch(style)
    dark = color in (BLUE, GREEN, ORANGE)
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color="white" if dark else INK
    )


def arrow(axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """Draws an arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.1))


def draw_towers(axes) -> None:
    """Draws image and captions at the bottom, the towers above them, and features and loss at the top."""
    axes.set_xlim(0, 10.4)
    axes.set_ylim(0, 6.6)
    axes.axis("off")
    box(axes, 0.2, 0.3, 2.2, 0.7, "image", "white")
    box(axes, 3.1, 0.3, 2.4, 0.7, "short caption\n\u201ca street\u201d", "white", 9)
    box(axes, 6.0, 0.3, 4.2, 0.7, "long caption\n\u201ca street. two dogs. ..\u201d", "white", 9)
    box(axes, 0.2, 1.8, 2.2, 1.3, "image tower\n(ViT, locked)", GREY, 11)
    box(axes, 3.1, 1.8, 7.1, 1.3, "text tower (BERT, trained)\nreads [CLS] C0 C1 and the words", BLUE, 11)
    for x in (1.3, 4.3, 8.1):
        arrow(axes, (x, 1.03), (x, 1.77))
    box(axes, 0.8, 3.7, 1.0, 0.5, "image", GREY, 9)
    box(axes, 3.8, 3.7, 1.0, 0.5, "[CLS]", GREEN, 9)
    for x, label, color in ((6.4, "[CLS]", GREEN), (7.6, "C0", ORANGE), (8.8, "C1", ORANGE)):
        box(axes, x, 3.7, 1.0, 0.5, label, color, 9)
        arrow(axes, (x + 0.5, 3.13), (x + 0.5, 3.68))
    for x in (1.3, 4.3):
        arrow(axes, (x, 3.13), (x, 3.68))
    box(axes, 2.0, 5.2, 2.9, 0.9, "short term: image \u2194\n[CLS] of the short caption", "white", 9)
    box(axes, 5.9, 5.2, 4.3, 0.9, "long term: image \u2194\n[CLS], C0 and C1 of each long caption", "white", 9)
    arrow(axes, (1.3, 4.23), (2.6, 5.17), GREY)
    arrow(axes, (1.6, 4.23), (6.2, 5.17), GREY)
    arrow(axes, (4.3, 4.23), (3.9, 5.17), GREEN)
    for x, color in ((6.9, GREEN), (8.1, ORANGE), (9.3, ORANGE)):
        arrow(axes, (x, 4.23), (x, 5.17), color)
    axes.text(5.2, 6.35, "loss = short term + long term", ha="center", fontsize=11, color=INK)


def may_attend(query: int, key: int) -> bool:
    """Returns whether a position may attend to another: the corner-token rule of LoTLIP."""
    specials = NUM_CORNERS + 1
    if query >= specials:  # a word sees [CLS] and every word
        return key == 0 or key >= specials
    return key == query or key >= specials  # [CLS] and corners see themselves and every word


def draw_attention(axes) -> None:
    """Draws the attention rule as a grid: a row attends to a column if their cell is filled."""
    count = len(TOKENS)
    for query in range(count):
        for key in range(count):
            color = (
                (GREEN if query == 0 else ORANGE if query <= NUM_CORNERS else BLUE)
                if may_attend(query, key)
                else "white"
            )
            axes.add_patch(pyplot.Rectangle((key, count - 1 - query), 1, 1, fc=color, ec=INK, lw=0.5))
    axes.set_xlim(0, count)
    axes.set_ylim(0, count)
    axes.set_aspect("equal")
    axes.set_xticks([i + 0.5 for i in range(count)], TOKENS, rotation=60, fontsize=8)
    axes.set_yticks([count - 0.5 - i for i in range(count)], TOKENS, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title("who (row) attends to whom (column)", fontsize=10)


def main() -> int:
    """Writes the figure, with the same bytes each time; returns 0."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    pyplot.rcParams["svg.hashsalt"] = "lotlip"
    chart, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, 4.8), width_ratios=(2.3, 1))
    draw_towers(left)
    draw_attention(right)
    chart.tight_layout()
    chart.savefig(out, metadata={"Date": None})
    pyplot.close(chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
