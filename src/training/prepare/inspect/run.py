"""`prepare inspect`: counts the content of shards or tables, with the tokenizer that training will use.

Processes count one part each, and their counts are added up. The result depends neither on the number of processes nor
on the order. It is shown as a table and as JSON, and samples of it as a page.
"""

import argparse
import base64
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from training.model.assembly.factory import get_tokenizer
from training.prepare.inspect.counts import BROKEN, MAX_TOKENS, Counts, Data, count_part, open_parts
from training.prepare.work import format_counts, items_of_job, processes, write_json
from training.runtime.files import atomic_write
from training.runtime.messages import render_page

QUANTILES = (0.05, 0.5, 0.95)
TEMPLATE = Path(__file__).with_name("samples.html.j2")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read to their end."""
    data = Data(args.shards, args.csv_img_key, args.csv_separator, args.caption_keys or ())
    parts, places = open_parts(data)
    chosen = items_of_job(range(len(parts)), args.shard_range, {})
    tokenizer: Any = get_tokenizer(args.model, cache_dir=args.cache_dir)
    lengths = sorted({*args.context_lengths, tokenizer.context_length})
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    total, broken, miscounted = Counts(), [], {}
    rules = {"lists": args.caption_lists, "tokenizer": (args.model, args.cache_dir), "read_images": args.read_images}
    count = partial(count_part, data=data, **rules, show=args.show, seed=args.seed)
    with processes(args.workers) as parallel:
        for number, counts in parallel(count, chosen, len(chosen), "counting", "part"):
            total.add(counts, args.show)
            name, size, found = parts[number].name, parts[number].size, counts.numbers["samples",]
            if any(counts.numbers["bad", kind] for kind in BROKEN):
                broken.append(name)
            if size not in (-1, found):
                miscounted[name] = {"sizes.json": size, "samples": found}
    if args.shard_range:  # numbers of shards, or of parts of tables
        places = {kind: min(number, len(chosen)) for kind, number in places.items()}
    report = places | {"broken_shards": sorted(broken)} | summarise(total, lengths)
    report |= {"miscounted": dict(sorted(miscounted.items())), "model": args.model}
    write_json(out / "inspect.json", report | {"context_length": tokenizer.context_length})
    write_html(out / "samples.html", total.picked, args.shards)
    print(f"{describe(report)}\n{out}: inspect.json, samples.html ({len(total.picked)} samples)")
    return 1 if broken else 0


def summarise(counts: Counts, context_lengths: list[int]) -> dict:
    """Returns the content of inspect.json, except for lists of shards.

    Args:
        counts: counts of the whole set.
        context_lengths: context lengths, for each of which the fraction of longer captions is computed.
    """
    captions, bad = {}, counts.of("bad")
    for key, samples in sorted(counts.of("caption").items(), key=lambda item: (-item[1], item[0])):
        tokens = counts.of("tokens", key)
        number = tokens.total()
        longer = {str(n): sum(c for length, c in tokens.items() if length > n) for n in context_lengths}
        captions[key] = {
            "samples": samples,
            "captions": number,
            "refused": counts.numbers["refused", key],
            "mean_tokens": round(sum(length * c for length, c in tokens.items()) / number, 2),
            "token_quantiles": _quantiles(tokens, (*QUANTILES, 1.0)),
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
        "duplicates": {name: len(values) - len(np.unique(values)) for name, values in sorted(counts.hashes.items())},
    }


def _quantiles(numbers: Counter, quantiles: Sequence[float]) -> dict[str, int]:
    """Returns quantiles of the values that occur as often as `numbers` says."""
    values = sorted(numbers)
    ends = np.cumsum([numbers[value] for value in values])
    return {str(q): values[np.searchsorted(ends, q * ends[-1])] for q in quantiles}


def _range(numbers: Counter) -> dict[str, int]:
    names = ("min", *(f"quantile_{q}" for q in QUANTILES), "max")
    return dict(zip(names, _quantiles(numbers, (0, *QUANTILES, 1)).values())) if numbers else {}


def describe(report: dict) -> str:
    """Returns the report as text for the terminal."""
    places = {kind: report.get(kind, 0) for kind in ("shards", "tables", "folders")}
    lines = [f"{report['samples']:,} samples in {format_counts(places)}, {report['usable']:,} usable"]
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
        {"name": f"{source}/{key}", "captions": captions, "image": base64.b64encode(image or b"").decode()}
        for _, source, key, captions, image in picked
    ]
    with atomic_write(path) as temporary:
        temporary.write_text(render_page(TEMPLATE, title=title, samples=samples), encoding="utf-8", errors="replace")
