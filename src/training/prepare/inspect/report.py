"""Shows the counts of a data set as a table and as JSON, and samples of it as a page."""

import base64
from collections import Counter
from pathlib import Path

import numpy as np
from tabulate import tabulate

from training.prepare.inspect.counts import BROKEN, MAX_TOKENS, Counts
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
    captions, samples, bad = {}, counts.of("caption"), counts.of("bad")
    for key in sorted(samples, key=lambda k: (-samples[k], k)):
        tokens = counts.of("tokens", key)
        number = tokens.total()
        longer = {str(n): sum(c for length, c in tokens.items() if length > n) for n in context_lengths}
        captions[key] = {
            "samples": samples[key],
            "captions": number,
            "refused": counts.numbers["refused", key],
            "mean_tokens": round(sum(length * c for length, c in tokens.items()) / number, 2),
            "token_quantiles": {str(q): _quantile(tokens, q) for q in (*QUANTILES, 1.0)},
            "truncated_share": {n: round(count / number, 6) for n, count in longer.items()},
            "token_histogram": {str(length): tokens[length] for length in sorted(tokens)},
        }
    num_samples = counts.numbers["samples",]
    return {
        "samples": num_samples,
        "usable": num_samples - sum(number for kind, number in bad.items() if kind not in BROKEN),
        "bad": dict(sorted(bad.items())),
        "with_short_caption": counts.numbers["with", "short"],
        "with_long_caption": counts.numbers["with", "long"],
        "captions": captions,
        "longest_counted": MAX_TOKENS,
        "image_width": _range(counts.of("width")),
        "image_height": _range(counts.of("height")),
        "duplicates": {name: _num_repeated(arrays) for name, arrays in sorted(counts.hashes.items())},
    }


def _quantile(numbers: Counter, q: float) -> int:
    """Returns a quantile of the values that occur as often as `numbers` says."""
    values = sorted(numbers)
    ends = np.cumsum([numbers[value] for value in values])
    return values[int(np.searchsorted(ends, q * numbers.total()))]


def _range(numbers: Counter) -> dict[str, int]:
    if not numbers:
        return {}
    return {"min": min(numbers)} | {f"quantile_{q}": _quantile(numbers, q) for q in QUANTILES} | {"max": max(numbers)}


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
        first = f"{counts['samples']:,} in {url}, where it counts {counts['sizes.json']:,}"
        lines.append(f"sizes.json is wrong for {len(report['miscounted']):,} shards: {first}")
    lines.append(f"duplicates: {format_counts({f'by {k}': n for k, n in report['duplicates'].items()})}")
    if report["image_width"]:
        sizes = [" .. ".join(f"{v:,}" for v in report[name].values()) for name in ("image_width", "image_height")]
        lines.append(f"image width {sizes[0]}, height {sizes[1]} (least, 5%, 50%, 95%, most)")
    rows = []
    for key, c in report["captions"].items():
        row = {"caption": key} | {name: f"{c[name]:,}" for name in ("samples", "captions", "refused")}
        row |= {"tokens\nmean": f"{c['mean_tokens']:.1f}"}
        row |= {"\n5 / 50 / 95 / 100%": " / ".join(f"{n:,}" for n in c["token_quantiles"].values())}
        rows.append(row | {f"cut at\n{n}": f"{100 * fraction:.1f}%" for n, fraction in c["truncated_share"].items()})
    if rows:
        align = ["left"] + ["right"] * (len(rows[0]) - 1)
        lines.append(tabulate(rows, headers="keys", colalign=align, disable_numparse=True))
    return "\n".join(lines)


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
