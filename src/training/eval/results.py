"""Output of an evaluation: tables for the terminal, a line in results.jsonl, a row for a README."""

import argparse
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tabulate import tabulate

from training.eval.record import DIRECTIONS, ClassificationResult, RetrievalResult, describe_pairs, to_json
from training.runtime.files import append_line

PACKAGES = ("lotlip", "open_clip_torch", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")


def format_table(results: Sequence[RetrievalResult]) -> str:
    """Returns the table for a terminal, in percent: one row per benchmark, image to text before text to image."""
    rows = []
    for result in results:
        row = [result.title, result.pairs]
        for direction in DIRECTIONS:
            recall = result.recall(direction)
            low, high = (100 * bound for bound in recall.top1_ci95)
            row += [f"{100 * recall.top1:.2f}", f"{low:.1f}-{high:.1f}"]
            row += [f"{100 * recall.top5:.2f}", f"{100 * recall.top10:.2f}"]
            row += [f"{recall.median_rank:.6g} / {recall.mean_rank:.1f}"]
        unknown = result.truncated_share is None  # features from a file without token counts
        row.append("-" if unknown else f"{100 * result.truncated_share:.1f}%")
        row.append("-" if unknown else f"{result.truncated_mean_tokens_lost:.1f}")
        rows.append(row)
    headers = ["benchmark", "pairs"]
    for name in DIRECTIONS.values():
        headers += [f"{name}\nR@1", "95%\ninterval", "\nR@5", "\nR@10", "rank\nmedian / mean"]
    headers += ["captions\ncut", "tokens\nlost"]
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers=headers, colalign=alignment, disable_numparse=True)


def format_protocols(results: Sequence[RetrievalResult]) -> str:
    """Returns one line per benchmark: its protocol, and the hash of the exact list of images and captions."""
    return "\n".join(describe_pairs(r.title, r.protocol, r.fingerprint) for r in results)


def format_zero_shot(results: Sequence[ClassificationResult]) -> str:
    """Returns the table of zero-shot classification for a terminal, in percent."""
    rows = []
    for r in results:
        low, high = (100 * bound for bound in r.top1_ci95)
        rows.append([r.title, r.pairs, f"{100 * r.top1:.2f}", f"{low:.1f}-{high:.1f}", f"{100 * r.top5:.2f}"])
    headers = ["zero-shot", "images", "top-1", "95%\ninterval", "top-5"]
    return tabulate(rows, headers=headers, colalign=["left"] + ["right"] * 4, disable_numparse=True)


def format_markdown(results: Sequence[RetrievalResult], label: str) -> str:
    """Returns a Markdown table with one row: R@1 in percent, I2T / T2I, with benchmarks in the published order."""
    cells = {"model": label}
    for r in results:
        partial = "" if r.is_complete else f" ({r.pairs} pairs)"
        cells[r.title] = f"{100 * r.i2t.top1:.2f} / {100 * r.t2i.top1:.2f}" + partial
    return tabulate([list(cells.values())], headers=list(cells), tablefmt="github", disable_numparse=True)


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect results."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def label_of(args: argparse.Namespace) -> str:
    """Returns a short label of what is evaluated: the model and its weights, or ``features``."""
    if args.features:
        return "features"
    return args.model if args.pretrained is None else f"{args.model} {args.pretrained}"


def run_name(*parts: str) -> str:
    """Returns a folder name for a run without ``--name``: the time, followed by `parts` (model, precision, ...)."""
    return "-".join([f"{datetime.now():%Y_%m_%d-%H_%M_%S}", *(p.replace("/", "-").replace(":", "-") for p in parts)])


def write_results(
    results: Sequence[RetrievalResult | ClassificationResult],
    folder: Path,
    args: argparse.Namespace,
    weights_sha256: str | None,
    extra: dict[str, object],
) -> Path:
    """Appends one line to ``FOLDER/results.jsonl``.

    Args:
        results: results of all benchmarks.
        folder: created if it does not exist.
        args: all flags of the run.
        weights_sha256: hash of the weights file; None for an untrained model.
        extra: additional top-level entries (device, seconds, ...).

    Returns:
        The path of the file.

    Raises:
        OSError: the file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    line = {
        **to_json(results),
        "model": None if args.features else args.model,
        "pretrained": args.pretrained,
        "weights_sha256": weights_sha256,
        "precision": args.precision,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "flags": vars(args),
        **extra,
    }
    append_line(path, json.dumps(line))  # in ASCII: U+2028 ends no line, and names need not be UTF-8
    return path
