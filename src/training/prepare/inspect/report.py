"""Shows the counts of a shard set as a table, as JSON and as a figure, and samples of it as a page."""

import base64
from collections import Counter
from pathlib import Path

import numpy as np
from tabulate import tabulate

from training.prepare.inspect.counts import MAX_TOKENS, Counts
from training.prepare.work import format_counts
from training.runtime.files import atomic_write
from training.runtime.pages import render_page

QUANTILES = (0.05, 0.5, 0.95)
TEMPLATE = Path(__file__).with_name("samples.html.j2")


def summarise(counts: Counts, context_lengths: list[int]) -> dict:
    """Returns the content of inspect.json, except for lists of shards.

    Args:
        counts: counts of the whole set.
        context_lengths: context lengths, for each of which the fraction of longer captions is computed.
    """
    captions = {}
    for key in sorted(counts.captions, key=lambda k: (-counts.captions[k], k)):
        histogram = counts.lengths[key]
        number, lengths = int(histogram.sum()), np.arange(len(histogram))
        captions[key] = {
            "samples": number,
            "refused": counts.refused[key],
            "mean_tokens": round(float((histogram * lengths).sum() / number), 2),
            "token_quantiles": {str(q): _quantile(histogram, q) for q in (*QUANTILES, 1.0)},
            "truncated_share": {str(n): round(float(histogram[n + 1 :].sum() / number), 6) for n in context_lengths},
            "token_histogram": {str(n): int(histogram[n]) for n in np.flatnonzero(histogram)},
        }
    return {
        "samples": counts.samples,
        "usable": counts.samples
        - sum(counts.bad.values())
        + counts.bad["broken shard"]
        + counts.bad["unreachable shard"],
        "bad": dict(sorted(counts.bad.items())),
        "with_short_caption": counts.with_short,
        "with_long_caption": counts.with_long,
        "captions": captions,
        "longest_counted": MAX_TOKENS,
        "image_width": _of_sizes(counts.widths),
        "image_height": _of_sizes(counts.heights),
        "duplicates": {name: _num_repeated(arrays) for name, arrays in sorted(counts.hashes.items())},
    }


def _quantile(histogram: np.ndarray, q: float) -> int:
    return int(np.searchsorted(np.cumsum(histogram), q * histogram.sum()))


def _of_sizes(sizes: Counter) -> dict[str, float]:
    if not sizes:
        return {}
    histogram = np.zeros(max(sizes) + 1, dtype=np.int64)
    for size, number in sizes.items():
        histogram[size] = number
    quantiles = {f"quantile_{q}": _quantile(histogram, q) for q in QUANTILES}
    return {"min": min(sizes), **quantiles, "max": max(sizes)}


def _num_repeated(arrays: list[np.ndarray]) -> int:
    """Returns how many values are repetitions of another."""
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return int(len(values) - len(np.unique(values)))


def describe(report: dict) -> str:
    """Returns the report as text for the terminal."""
    lines = [f"{report['samples']:,} samples in {report['shards']:,} shards, {report['usable']:,} usable"]
    lines.append(f"bad: {format_counts(report['bad'])}")
    if report["miscounted"]:
        url, counts = next(iter(report["miscounted"].items()))
        there = f"{counts['samples']:,} in {url}, where it counts {counts['sizes.json']:,}"
        lines.append(f"sizes.json is wrong for {len(report['miscounted']):,} shards: {there}")
    lines.append(f"duplicates: {format_counts({f'by {k}': n for k, n in report['duplicates'].items()})}")
    if report["image_width"]:
        sizes = [" .. ".join(f"{v:,}" for v in report[name].values()) for name in ("image_width", "image_height")]
        lines.append(f"image width {sizes[0]}, height {sizes[1]} (least, 5%, 50%, 95%, most)")
    contexts = list(next(iter(report["captions"].values()))["truncated_share"]) if report["captions"] else []
    rows = []
    for key, c in report["captions"].items():
        quantiles = " / ".join(f"{n:,}" for n in c["token_quantiles"].values())
        shares = [f"{100 * share:.1f}%" for share in c["truncated_share"].values()]
        rows.append([key, f"{c['samples']:,}", f"{c['refused']:,}", f"{c['mean_tokens']:.1f}", quantiles, *shares])
    headers = [
        "caption",
        "samples",
        "refused",
        "tokens\nmean",
        "\n5 / 50 / 95 / 100%",
        *(f"cut at\n{n}" for n in contexts),
    ]
    right = ["left"] + ["right"] * (len(headers) - 1)
    if rows:
        lines.append(tabulate(rows, headers, colalign=right, disable_numparse=True))
    return "\n".join(lines)


def write_png(path: Path, counts: Counts, context_lengths: list[int]) -> None:
    """Draws the lengths of all captions in tokens, and the sizes of images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    end = 16
    for key in sorted(counts.lengths):
        histogram = counts.lengths[key]
        end = max(end, _quantile(histogram, 0.995))
        left.step(np.arange(len(histogram)), histogram / histogram.sum(), where="mid", label=key, linewidth=1)
    for length in context_lengths:
        if length <= end:
            left.axvline(length, color="grey", linestyle=":", linewidth=1)
            left.annotate(str(length), (length, left.get_ylim()[1]), fontsize=8, ha="right", va="top", rotation=90)
    left.set(xlim=(0, end), xlabel="tokens", ylabel="share of captions", title="Caption lengths")
    if counts.lengths:
        left.legend(fontsize=8)
    for name, sizes in (("width", counts.widths), ("height", counts.heights)):
        if sizes:
            values, weights = zip(*sorted(sizes.items()))
            right.hist(values, bins=40, weights=weights, histtype="step", label=name)
    right.set(xlabel="pixels", ylabel="images", title="Image sizes")
    if counts.widths:
        right.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def write_html(path: Path, picked: list[tuple], title: str) -> None:
    """Writes a page of samples; all text from the data is escaped."""
    samples = [
        {
            "name": f"{shard}/{key}",
            "captions": captions,
            "image": base64.b64encode(image).decode() if image else None,
        }
        for _, shard, key, captions, image in picked
    ]
    with atomic_write(path) as temporary:
        temporary.write_text(render_page(TEMPLATE, title=title, samples=samples), encoding="utf-8", errors="replace")
