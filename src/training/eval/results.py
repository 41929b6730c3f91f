"""Output of an evaluation: tables for the terminal, a line in results.jsonl, a row for a README."""

import argparse
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from training.eval.record import DIRECTIONS, ClassificationResult, RetrievalResult, describe_pairs, to_json
from training.eval.tables import format_rows, interval, percent
from training.runtime.files import append_line

PACKAGES = ("lotlip", "open_clip_torch", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")


def result_rows(records: Iterable[Mapping[str, object]]) -> list[dict[str, str]]:
    """Returns the cells of a table of retrieval results, in percent: image to text before text to image.

    Args:
        records: rows of `training.results.load`, or `Result.columns`.
    """
    rows = []
    for record in records:
        whole = record["num-pairs"] == record["num-expected"]
        pairs = f"{record['num-pairs']:,}" + ("" if whole else f" of {record['num-expected']:,}")
        row = {"benchmark": str(record["benchmark"]), "pairs": pairs}
        for direction, name in DIRECTIONS.items():
            row[f"{name}\nR@1"] = percent(record[f"{direction}-top1"])
            row[f"{name}\n95%"] = interval(record[f"{direction}-top1-ci95"])
            row |= {f"{name}\nR@{k}": percent(record[f"{direction}-top{k}"]) for k in (5, 10)}
            median, mean = record[f"{direction}-median-rank"], record[f"{direction}-mean-rank"]
            row[f"{name} rank\nmedian / mean"] = f"{median:.6g} / {mean:.1f}"
        share, lost = record["truncated-share"], record["truncated-mean-tokens-lost"]
        unknown = share is None or share != share  # features from a file without token counts; NaN in a table
        row |= {"captions\ncut": "-" if unknown else f"{100 * share:.1f}%"}
        rows.append(row | {"tokens\nlost": "-" if unknown else f"{lost:.1f}"})
    return rows


def zero_shot_rows(results: Sequence[ClassificationResult]) -> list[dict[str, str]]:
    """Returns the cells of a table of zero-shot classification, in percent."""
    return [
        {
            "zero-shot": r.title,
            "images": r.pairs,
            "top-1": percent(r.top1),
            "95%\ninterval": interval(r.top1_ci95),
            "top-5": percent(r.top5),
        }
        for r in results
    ]


def format_table(results: Sequence[RetrievalResult]) -> str:
    """Returns the table of retrieval results for a terminal."""
    return format_rows(result_rows(r.columns() for r in results))


def format_protocols(results: Sequence[RetrievalResult]) -> str:
    """Returns one line per benchmark: its protocol, and the hash of the exact list of images and captions."""
    return "\n".join(describe_pairs(r.title, r.protocol, r.fingerprint) for r in results)


def format_zero_shot(results: Sequence[ClassificationResult]) -> str:
    """Returns the table of zero-shot classification for a terminal."""
    return format_rows(zero_shot_rows(results))


def format_markdown(results: Sequence[RetrievalResult], label: str) -> str:
    """Returns a Markdown table with one row: R@1 in percent, I2T / T2I, with benchmarks in the published order."""
    cells = {"model": label}
    for r in results:
        partial = "" if r.is_complete else f" ({r.pairs} pairs)"
        cells[r.title] = f"{percent(r.i2t.top1)} / {percent(r.t2i.top1)}{partial}"
    return format_rows([cells], num_left=len(cells), tablefmt="github")


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
