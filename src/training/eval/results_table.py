"""Reads all evaluations below a folder into one table."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from training.readers.captions import split_lines

if TYPE_CHECKING:
    import pandas

PLACE = Path("checkpoints") / "results.jsonl"
FACTS = ("model", "pretrained", "weights_sha256", "precision", "date", "epoch", "device", "world_size", "seconds")


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
