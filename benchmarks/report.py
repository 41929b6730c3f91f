"""Shows figures as a table, a plot and JSON."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.measure import Figure, Setting

RATIOS = ("time_ratio", "memory_ratio", "token_ratio")


def to_json(figures: Sequence[Figure], setting: Setting) -> dict[str, object]:
    """Returns all numbers by figure, and under ``machine`` a description of the machine."""
    content: dict[str, object] = {f.name: {"title": f.title, **f.ratios, **f.facts} for f in figures}
    device = torch.cuda.get_device_name(setting.device) if setting.on_gpu else platform.processor() or "CPU"
    content["machine"] = {
        "device": f"{setting.device.type}: {device}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quick": setting.quick,
    }
    return content


def format_table(figures: Sequence[Figure]) -> str:
    """Returns a table with one row per figure: ratios, seconds, peak memory, tokens per image, FLOP/s."""
    rows = []
    for figure in figures:
        facts, row = figure.facts, {"figure": figure.title}
        for name, heading in zip(RATIOS, ("time, x", "peak memory, x", "tokens, x")):
            row[heading] = f"{figure.ratios[name]:.2f}" if name in figure.ratios else ""
        row["seconds"] = _pair(facts.get("seconds"), "{:.3g}")
        row["peak MB"] = _pair(facts.get("peak_bytes"), "{:,.0f}", 1e6)
        row["tokens/image"] = _pair(facts.get("tokens_per_image"), "{:.1f}")
        row["TFLOP/s (utilisation)"] = ""
        if "tflop_per_s" in facts:
            row["TFLOP/s (utilisation)"] = f"{facts['tflop_per_s']:.3g} ({facts['flop_utilisation']:.0%})"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _pair(numbers: dict[str, float] | None, form: str, unit: float = 1) -> str:
    if numbers is None:
        return ""
    return " / ".join(form.format(numbers[side] / unit) for side in ("baseline", "ours"))


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Writes a plot of all ratios; none if no figure has one."""
    colors = dict(zip(RATIOS, ("tab:blue", "tab:orange", "tab:green")))
    bars = [
        (f"{f.name}: {name.removesuffix('_ratio')}", f.ratios[name], colors[name])
        for f in figures
        for name in RATIOS
        if name in f.ratios
    ]
    draw_bars(bars, "published scheme over ours (higher is better)", path, line_at=1)


def draw_bars(
    bars: Sequence[tuple[str, float, str]],
    label: str,
    path: Path,
    marks: Sequence[float | None] = (),
    line_at: float | None = None,
) -> None:
    """Writes a plot of horizontal bars on a logarithmic axis; none if there are no bars.

    Args:
        bars: name, value and colour of each bar, from top to bottom.
        label: label of the axis of the values.
        path: PNG file to write.
        marks: a value to mark on each bar, or None.
        line_at: value of a vertical line; None for no line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not bars:
        return
    names, values, colors = zip(*bars)
    chart, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(bars)))
    axes.bar_label(axes.barh(names, values, color=colors), fmt="%.2f", padding=3)
    for place, mark in enumerate(marks):
        if mark is not None:
            axes.plot(mark, place, marker="|", color="black", markersize=16)
    if line_at is not None:
        axes.axvline(line_at, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    pyplot.close(chart)
