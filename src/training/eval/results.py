"""The file results.jsonl: writes a line for each evaluation, and reads those below a folder into one table."""

import argparse
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from training.eval.record import Result, format_rows, result_rows, to_json
from training.readers.captions import split_lines
from training.runtime.files import append_line

if TYPE_CHECKING:
    import pandas

PACKAGES = ("lotlip", "open_clip_torch", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")
PLACE = Path("checkpoints") / "results.jsonl"
FACTS = ("model", "pretrained", "weights_sha256", "precision", "date", "epoch", "device", "world_size", "seconds")


def format_table(results: Sequence[Result]) -> str:
    """Returns the table of results for a terminal; all of retrieval, or all of classification."""
    return format_rows(result_rows(r.columns() for r in results))


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
    path, versions = folder / PLACE.name, dict.fromkeys(PACKAGES, "not installed")
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    line = to_json(results) | {"model": None if args.features else args.model, "pretrained": args.pretrained}
    line |= {"weights_sha256": weights_sha256, "precision": args.precision}
    line["versions"] = versions | {"python": platform.python_version()}
    line |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "flags": vars(args), **extra}
    append_line(path, json.dumps(line))  # in ASCII: U+2028 ends no line, and names need not be UTF-8
    return path


def load(*folders: str | Path, last: bool = False) -> "pandas.DataFrame":
    """Reads every results.jsonl in and below the given folders.

    Args:
        folders: ``logs``, or single runs, ``logs/NAME``.
        last: read only the last evaluation of each run.

    Returns:
        One row per evaluation and benchmark. The columns are ``run`` (its folder, relative or absolute like `folders`);
        properties of the run (`FACTS`); ``key`` and ``benchmark`` (the title); the numbers under their published names
        without the key (``i2t-top1``, ``num-pairs``, ``protocol``, ...; recall as fractions, intervals as lists); and
        every flag under its name, such as ``--batch-size``. Values that a run does not have are NaN.

    Raises:
        FileNotFoundError: a folder contains no results.

    A line that is not a JSON object, such as half a line that a crash left, is skipped with a warning that names it.
    """
    import pandas

    rows = []
    for folder in map(Path, folders):
        paths = sorted(folder.rglob(str(PLACE)))
        if not paths:
            raise FileNotFoundError(f"{folder}: no {PLACE} in or below it; evaluate a model with --logs and --name")
        for path in paths:
            lines = read_lines(path)
            for line in lines[-1:] if last else lines:
                rows += _rows(str(path.parents[1]), line)
    return pandas.DataFrame(rows)


def read_lines(path: Path) -> list[dict]:
    """Returns the objects of a results.jsonl, without broken lines."""
    lines = []
    for number, text in enumerate(split_lines(path.read_text(encoding="utf-8", errors="replace")), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            logging.warning(f"{path} line {number}: skipped, broken JSON ({error})")
    return [line for line in lines if isinstance(line, dict)]


def _rows(run: str, line: dict) -> list[dict[str, object]]:
    """Returns one row per benchmark of an evaluation. If several keys are prefixes of a name, the longest counts."""
    keys = [name.removesuffix("-i2t-top1") for name in line if name.endswith("-i2t-top1")]
    keys += [name.removesuffix("-num-images") for name in line if name.endswith("-num-images")]
    numbers: dict[str, dict] = {key: {} for key in keys}
    longest_first = sorted(numbers, key=len, reverse=True)
    for name, value in line.items():
        owner = next((key for key in longest_first if name.startswith(f"{key}-")), None)
        if owner:
            numbers[owner][name.removeprefix(f"{owner}-")] = value
    facts = {name: line[name] for name in FACTS if name in line}
    flags = {f"--{name.replace('_', '-')}": value for name, value in line.get("flags", {}).items()}
    return [
        {"run": run, **facts, "key": key, "benchmark": values.pop("title", key), **values, **flags}
        for key, values in numbers.items()
    ]


def flags_that_differ(runs: Mapping[str, str]) -> "pandas.DataFrame":
    """Returns the flags whose values differ between the last evaluations of some runs.

    The flags that only name output folders (``--logs``, ``--name``) are omitted.

    Args:
        runs: folder of each run -> heading of its column.

    Returns:
        One row per flag and one column per run that has results.
    """
    import pandas

    runs = {run: heading for run, heading in runs.items() if (Path(run) / PLACE).is_file()}
    columns = {heading: load(run, last=True).iloc[0].filter(regex="^--").astype(str) for run, heading in runs.items()}
    table = pandas.DataFrame(columns).drop(index=["--logs", "--name"], errors="ignore")
    return table[table.nunique(axis=1, dropna=False) > 1]
