"""What is left of an evaluation: a table on the terminal, a line in results.jsonl, a row for a README."""

import argparse
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tabulate import tabulate

PACKAGES = ("lotlip", "open_clip_torch", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")
DIRECTIONS = {"i2t": "I2T", "t2i": "T2I"}


def format_pairs(record: dict) -> str:
    """``1,000`` for a complete benchmark, ``9,412 of 10,000`` for part of one."""
    if record["num_pairs"] == record["num_expected"]:
        return f"{record['num_pairs']:,}"
    return f"{record['num_pairs']:,} of {record['num_expected']:,}"


def format_table(records: Sequence[dict]) -> str:
    """Returns the table for a terminal, in percent: one row per benchmark, image to text before text to image."""
    rows = []
    for record in records:
        row = [record["title"], format_pairs(record)]
        for direction in DIRECTIONS:
            result = record[direction]
            low, high = (100 * bound for bound in result["top1-ci95"])
            row += [f"{100 * result['top1']:.2f}", f"{low:.1f}-{high:.1f}"]
            row += [f"{100 * result['top5']:.2f}", f"{100 * result['top10']:.2f}"]
            row += [f"{result['median-rank']:.6g} / {result['mean-rank']:.1f}"]
        unknown = record["truncated_share"] is None  # of features that came without token counts
        row.append("-" if unknown else f"{100 * record['truncated_share']:.1f}%")
        row.append("-" if unknown else f"{record['truncated_mean_tokens_lost']:.1f}")
        rows.append(row)
    headers = ["benchmark", "pairs"]
    for name in DIRECTIONS.values():
        headers += [f"{name}\nR@1", "95%\ninterval", "\nR@5", "\nR@10", "rank\nmedian / mean"]
    headers += ["captions\ncut", "tokens\nlost"]
    right = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers=headers, colalign=right, disable_numparse=True)


def format_protocols(records: Sequence[dict]) -> str:
    """``DCI: dci/short+extra, pairs 0f3a..``, a line per benchmark: what was read, and the hash of the exact list."""
    return "\n".join(f"{r['title']}: {r['protocol'] or 'your own pairs'}, pairs {r['fingerprint']}" for r in records)


def format_zero_shot(records: Sequence[dict]) -> str:
    """Returns the table of zero-shot classification for a terminal, in percent."""
    rows = []
    for record in records:
        low, high = (100 * bound for bound in record["top1-ci95"])
        rows.append([record["title"], format_pairs(record), f"{100 * record['top1']:.2f}", f"{low:.1f}-{high:.1f}"])
        rows[-1].append(f"{100 * record['top5']:.2f}")
    headers = ["zero-shot", "images", "top-1", "95%\ninterval", "top-5"]
    return tabulate(rows, headers=headers, colalign=["left"] + ["right"] * 4, disable_numparse=True)


def format_markdown(records: Sequence[dict], label: str) -> str:
    """Returns a Markdown table of one row, R@1 in percent, I2T / T2I, columns in the published order."""
    cells = {"model": label}
    for record in records:
        partial = "" if record["num_pairs"] == record["num_expected"] else f" ({format_pairs(record)} pairs)"
        cells[record["title"]] = " / ".join(f"{100 * record[d]['top1']:.2f}" for d in DIRECTIONS) + partial
    return tabulate([list(cells.values())], headers=list(cells), tablefmt="github", disable_numparse=True)


def flatten(records: Sequence[dict]) -> dict[str, object]:
    """Returns the published keys: fractions under ``KEY-i2t-top1`` and so on, plus counts under ``KEY-num-pairs``."""
    flat: dict[str, object] = {}
    for record in records:
        for direction in DIRECTIONS:
            flat |= {f"{record['key']}-{direction}-{name}": value for name, value in record[direction].items()}
        for name in ("num_images", "num_pairs", "num_expected", "num_missing", "num_broken"):
            flat[f"{record['key']}-{name.replace('_', '-')}"] = record[name]
        flat[f"{record['key']}-pairs"] = f"{record['num_pairs']:,} of {record['num_expected']:,} pairs"
        for name in ("protocol", "fingerprint", "truncated_share", "truncated_mean_tokens_lost"):
            flat[f"{record['key']}-{name.replace('_', '-')}"] = record[name]
    return flat


def flatten_zero_shot(records: Sequence[dict]) -> dict[str, object]:
    """Returns open_clip's keys: fractions under ``KEY-top1``, ``KEY-top5``, plus counts under ``KEY-num-images``."""
    flat: dict[str, object] = {}
    for record in records:
        flat |= {f"{record['key']}-{name}": record[name] for name in ("top1", "top5", "top1-ci95")}
        flat[f"{record['key']}-num-images"] = record["num_pairs"]
        flat[f"{record['key']}-images"] = f"{record['num_pairs']:,} of {record['num_expected']:,} images"
    return flat


def package_versions() -> dict[str, str]:
    """Returns Python's version and those of the packages that numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def label_of(args: argparse.Namespace) -> str:
    """What an evaluation measures, in a few words."""
    if args.features:
        return "features"
    return args.model if args.pretrained is None else f"{args.model} {args.pretrained}"


def run_name(*parts: str) -> str:
    """A folder name for a run that was given none: the time, then model, precision, ..."""
    return "-".join([f"{datetime.now():%Y_%m_%d-%H_%M_%S}", *(p.replace("/", "-").replace(":", "-") for p in parts)])


def write_results(
    records: Sequence[dict],
    folder: Path,
    args: argparse.Namespace,
    weights_sha256: str | None,
    extra: dict[str, object],
) -> Path:
    """Appends one line to ``FOLDER/results.jsonl``.

    Args:
        records: as `retrieval.rank_sets` returns them.
        folder: made if need be.
        args: all flags of the run.
        weights_sha256: of the weights file; None for an untrained model.
        extra: more top-level entries (device, seconds, ..).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    line = {
        **flatten(records),
        "model": None if args.features else args.model,
        "pretrained": args.pretrained,
        "weights_sha256": weights_sha256,
        "precision": args.precision,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "flags": vars(args),
        **extra,
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path
