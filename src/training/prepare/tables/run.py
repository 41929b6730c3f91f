"""`prepare tables`: converts published caption tables to clean Parquet parts, all with the same columns.

This process reads the tables once; worker processes clean the rows of one part each and write it. Then duplicates are
found by hashes of the URLs, over all parts in order, and removed. Parts that are complete on disk are not made again.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tabulate import tabulate

from training.prepare.rows import TableRows
from training.prepare.tables import parts
from training.prepare.tables.columns import KEY, URL, Columns, find_columns, output_captions
from training.prepare.work import (
    SUMMARY,
    add_counts,
    format_counts,
    load_json,
    processes,
    start_folder,
    write_json,
)
from training.readers.table_files import local_spec, table_files

VERSION = 2  # version of the cleaning; parts of different versions are never mixed


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0.

    Raises:
        FileNotFoundError, ValueError: a table is missing, not a table or lacks columns, or --out holds something else.
    """
    started, out = time.monotonic(), Path(args.out)
    paths = table_files(local_spec("::".join(args.tables)))
    tables = [TableRows(path, args.csv_separator, args.no_quotes) for path in paths]
    columns = [find_columns(str(table.path), table.names, args) for table in tables]
    rules = parts.Rules(output_captions(columns), not args.keep_cut_off, args.keep_without_long, args.caption_lists)
    sources = [
        {"name": table.path.name, "bytes": table.path.stat().st_size, "form": table.form} | asdict(found)
        for table, found in zip(tables, columns)
    ]
    settings = {"version": VERSION, "tables": sources, "rows_per_part": args.rows_per_part} | asdict(rules)
    start_folder(args, ".work", settings)
    summary = load_json(out / SUMMARY)
    if summary:
        print(f"{out}: already complete")
    else:
        summary = _make(zip(tables, columns), rules, args)
        write_json(out / SUMMARY, summary)
    if args.summary:
        write_json(Path(args.summary), summary)
    seconds = time.monotonic() - started
    print(f"{describe(summary)}\n{seconds:.1f} s, {summary['rows'] / seconds:,.0f} rows/s")
    return 0


def _make(tables: Iterable[tuple[TableRows, Columns]], rules: parts.Rules, args: argparse.Namespace) -> dict:
    """Writes the parts; returns counts of rows and captions."""
    paths: list[Path] = []

    def tasks() -> Iterator[tuple]:
        for number, (table, columns) in enumerate(tables):
            rows = table.read(columns.wanted)
            for place in count():
                if not (some := list(islice(rows, args.rows_per_part))):
                    break
                paths.append(Path(args.out) / f"part-{number:03d}-{place:06d}.parquet")
                if not paths[-1].exists():
                    yield some, columns, paths[-1]

    with processes(args.workers) as parallel:
        for _ in parallel(partial(parts.clean_part, rules=rules), tasks(), None, "cleaning", "part"):
            pass
        counts = [parts.read_counts(path) for path in paths]
        keep = first_of_each(paths)
        jobs = [(path, rows) for path, rows in zip(paths, keep) if not rows.all() or not len(rows)]
        for _ in parallel(parts.drop_rows, jobs, len(jobs), "removing duplicates", "part"):
            pass
    summary: dict = dict.fromkeys(parts.ROW_KINDS, 0) | {"captions": {}}
    for of_part in counts:
        add_counts(summary, of_part)
    kept = sum(int(rows.sum()) for rows in keep)
    return summary | {"kept": kept, "duplicates": summary["kept"] - kept, "parts": sum(map(bool, map(np.any, keep)))}


def first_of_each(paths: list[Path]) -> list[np.ndarray]:
    """Finds the first row of each URL, or key without one, over all parts in order.

    Rows are compared by 64-bit hashes: for 100 million different URLs, the probability that any two have the same one
    is 3 in 10,000. Each row takes about 30 bytes of memory.

    Returns:
        For each part a bool array, True for rows to keep.
    """
    hashes = [np.zeros(0, dtype=np.uint64)]
    for path in paths:
        names = pc.coalesce(*pq.read_table(path, columns=[URL, KEY]).columns).to_numpy()
        hashes.append(pd.util.hash_array(names, categorize=False))
    keep = ~pd.Series(np.concatenate(hashes)).duplicated().to_numpy()
    return np.split(keep, np.cumsum([len(rows) for rows in hashes]))[1:-1]


def describe(summary: dict) -> str:
    """Returns the counts as text for the terminal."""
    dropped = {name: summary[name] for name in parts.ROW_KINDS[2:]}
    rows = [[name, *counts.values()] for name, counts in summary["captions"].items()]
    headers = ["captions", *(kind.replace("_", "-") for kind in parts.CAPTION_KINDS)]
    return (
        f"{summary['kept']:,} of {summary['rows']:,} rows kept in {summary['parts']:,} parts\n"
        f"dropped rows: {format_counts(dropped)}\n{tabulate(rows, headers, intfmt=',')}"
    )
