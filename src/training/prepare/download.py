"""`prepare download`: fetches the images of caption tables into shards with img2dataset, and counts the failures.

img2dataset runs as a separate command, so it may be installed in another environment; on a cluster it often is.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.prepare.columns import KEY, RAW, URL
from training.prepare.shards import order_shard
from training.prepare.work import format_counts, load_json, progress, shorten, start_folder, write_json, write_summary
from training.readers.columnar import ColumnarFile
from training.readers.files import parallel_map
from training.readers.samples import index_shard
from training.readers.table_files import table_files

STATE = ".download"
# What messages of one kind of failure differ in: addresses, names of hosts and numbers of bytes.
_DETAILS = re.compile(r"<urlopen error |>$|\[Errno -?\d+\] |'[^']*'|\(.*|: Hostname mismatch.*")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0 if every shard is there and complete, else 1."""
    tables, out = open_tables(args.tables), Path(args.out)
    captions = [name for name in tables[0].names if name not in (URL, KEY)]
    words = command_line(captions, args)
    if args.print_command:
        print(shlex.join(words))
        return 0
    if not args.check_only:
        words[0] = _find_engine(words)
    sizes_of_tables = [table.num_rows for table in tables]
    settings = {"tables": [sizes_of_tables, captions], "samples_per_shard": args.samples_per_shard}
    settings |= {"image_size": args.image_size, "resize_mode": args.resize_mode}
    state = start_folder(args, STATE, settings, may_hold_others=True)
    if not args.check_only:
        (out / "sizes.json").unlink(missing_ok=True)  # img2dataset would read it as one of its own .json files
        # Spark chooses the Python of its workers itself; this makes it use the one that has img2dataset.
        python = (Path(words[0]).parent / "python").absolute()
        env = ({"PYSPARK_PYTHON": str(python)} if python.exists() else {}) | dict(os.environ)
        code = subprocess.run(words, check=False, env=env).returncode
        if code:
            print(f"img2dataset ended with exit code {code}", file=sys.stderr)
    report, sizes = check(out, sizes_of_tables, args.samples_per_shard)
    if not args.check_only:  # img2dataset writes samples in the order in which they arrive
        for name in progress(sizes, len(sizes), "ordering", "shard"):
            order_shard(out / name)
    write_json(state / "report.json", report | {"sizes": sizes})
    write_json(out / "sizes.json", sizes)
    write_summary(args, report)
    print(f"{report['images']:,} images of {report['rows']:,} rows in {report['shards']:,} shards")
    print(f"not fetched: {format_counts(report['failures'])}")
    if missing := report["missing_shards"]:
        print(f"missing shards: {len(missing):,} ({shorten(missing)}); run it again")
    for name, reason in list(report["bad_shards"].items())[:10]:
        print(f"bad shard: {reason}; remove {name}.tar and {name}_stats.json and run it again")
    return 1 if missing or report["bad_shards"] else 0


def open_tables(path: str) -> list[ColumnarFile]:
    """Opens tables written by `tables`.

    Raises:
        FileNotFoundError, ValueError: the path doesn't exist, or is not such a table.
    """
    tables = [ColumnarFile(file) for file in table_files(path)]
    for table in tables:
        if table.path.suffix != ".parquet" or URL not in table.names:
            found = f"found {', '.join(table.names)}; make it with python -m training.prepare tables"
            raise ValueError(f"{table.path}: expected Parquet with a column {URL}, {found}")
    return tables


def command_line(captions: list[str], args: argparse.Namespace) -> list[str]:
    """Returns img2dataset's command line.

    The raw caption is written to the ``.txt`` and under ``caption``; other captions keep their names in the ``.json``.
    """
    values: dict[str, object] = {"url_list": args.tables, "url_col": URL, "output_folder": args.out}
    values |= {"number_sample_per_shard": args.samples_per_shard, "image_size": args.image_size}
    values |= {"resize_mode": args.resize_mode, "processes_count": args.processes, "thread_count": args.threads}
    values |= {"timeout": args.timeout, "retries": args.retries, "distributor": args.distributor}
    values |= {"input_format": "parquet", "output_format": "webdataset", "resize_only_if_bigger": True}
    values |= {"incremental_mode": "incremental", "enable_wandb": False}
    if RAW in captions:
        values["caption_col"] = RAW
    if others := [name for name in captions if name != RAW]:
        values["save_additional_columns"] = json.dumps(others, separators=(",", ":"))
    words = shlex.split(args.img2dataset)
    return [*words, *(f"--{name}={value}" for name, value in values.items()), *args.engine_flag]


def _find_engine(words: list[str]) -> str:
    """Returns the path of the command: as named, on PATH, or beside the current Python interpreter."""
    found = shutil.which(words[0]) or shutil.which(words[0], path=Path(sys.executable).parent)
    if not found:
        raise FileNotFoundError(
            f"--img2dataset {words[0]}: no such command. Install it in a separate environment: "
            "python -m venv img2dataset && img2dataset/bin/pip install img2dataset, then add "
            f"--img2dataset img2dataset/bin/img2dataset. The command would be: {shlex.join(words)}"
        )
    return found


def check(out: Path, tables: Sequence[int], per_shard: int) -> tuple[dict, dict[str, int]]:
    """Compares the shards in a folder with the tables they were fetched for.

    Args:
        out: folder of the shards.
        tables: number of rows of each table.
        per_shard: number of rows per shard; img2dataset begins a new shard with each table.

    Returns:
        Counts of rows and failures by kind, and shards that are missing, broken, or have another size than img2dataset
        reports; and the number of samples of each complete shard.
    """
    names = [f"{number:05d}" for number in range(sum(-(-size // per_shard) for size in tables))]
    stats = parallel_map(lambda name: load_json(out / f"{name}_stats.json"), names)
    found = parallel_map(lambda name: _count(out / f"{name}.tar"), names)
    failures: Counter[str] = Counter()
    bad, sizes = {}, {}
    for name, counts, (number, fault) in zip(names, stats, found):
        for message, times in counts.get("status_dict", {}).items():
            failures[failure_kind(message)] += times * (message != "success")
        if counts and number != counts["successes"]:
            fault = fault or f"{name}.tar: {number:,} samples, img2dataset counts {counts['successes']:,}"
        if counts and fault:
            bad[name] = fault
        elif counts:
            sizes[f"{name}.tar"] = number
    report: dict[str, Any] = {
        "rows": sum(tables),
        "images": sum(sizes.values()),
        "failed": failures.total(),
        "shards": len(names),
    }
    missing = [name for name, counts in zip(names, stats) if not counts]
    report |= {"failures": dict((+failures).most_common()), "missing_shards": missing, "bad_shards": bad}
    return report, sizes


def _count(shard: Path) -> tuple[int, str | None]:
    """Returns (number of samples in a shard, why it is not complete)."""
    try:
        index = index_shard(shard)
    except OSError as error:
        return 0, str(error)
    return len(index.offsets), index.fault


def failure_kind(message: str) -> str:
    """Returns the reason why an image was not fetched, without its details."""
    return _DETAILS.sub("", message).strip()[:60]
