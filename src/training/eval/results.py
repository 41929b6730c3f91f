"""Output of an evaluation: tables for the terminal, a line in results.jsonl, a row for a README."""

import argparse
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from training.eval.record import Result, RetrievalResult, to_json
from training.eval.tables import format_rows, of_expected, percent, result_rows
from training.runtime.files import append_line

PACKAGES = ("lotlip", "open_clip_torch", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")


def format_table(results: Sequence[Result]) -> str:
    """Returns the table of results for a terminal; all of retrieval, or all of classification."""
    return format_rows(result_rows(r.columns() for r in results))


def format_markdown(results: Sequence[RetrievalResult], label: str) -> str:
    """Returns a Markdown table with one row: R@1 in percent, I2T / T2I, with benchmarks in the published order."""
    cells = {"model": label}
    for r in results:
        partial = "" if r.is_complete else f" ({of_expected(r.num_pairs, r.num_expected)} pairs)"
        cells[r.title] = f"{percent(r.i2t.top1)} / {percent(r.t2i.top1)}{partial}"
    return format_rows([cells], num_left=len(cells), tablefmt="github")


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect results."""
    versions = {"python": platform.python_version()} | dict.fromkeys(PACKAGES, "not installed")
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
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
    results: Sequence[Result],
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
    line = to_json(results) | {"model": None if args.features else args.model, "pretrained": args.pretrained}
    line |= {"weights_sha256": weights_sha256, "precision": args.precision, "versions": package_versions()}
    line |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "flags": vars(args), **extra}
    append_line(path, json.dumps(line))  # in ASCII: U+2028 ends no line, and names need not be UTF-8
    return path
