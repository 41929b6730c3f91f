"""`prepare tables`: converts published caption tables to clean Parquet parts, all with the same columns.

A table is divided into chunks of rows. Worker processes clean one chunk each; then duplicates are found by hashes of
the URLs, over all chunks in order; and the remaining rows of each chunk become one part. Each row takes 9 bytes of
hashes and marks on disk and one byte in memory; nothing else grows with the number of rows. Files that are complete on
disk are not made again.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from tabulate import tabulate

from training.prepare.tables.chunk import (
    ROW_KINDS,
    Rules,
    Task,
    clean_chunk,
    first_of_each,
    total_counts,
    write_part,
)
from training.prepare.tables.columns import find_columns, output_captions
from training.prepare.tables.records import Chunk, Table, csv_chunks, parquet_chunks
from training.prepare.work import (
    atomic_write,
    format_counts,
    load_json,
    processes,
    progress,
    remove_leftovers,
    spread,
    write_json,
)
from training.readers import tables as readers
from training.readers.csv_rows import CsvRecords, choose_form
from training.readers.files import TABLE_SUFFIXES
from training.readers.hub import local_spec
from training.readers.table_files import table_files

SUMMARY = "_summary.json"  # readers of folders of Parquet pass over names that begin with an underscore
_LOOKED_AT = 1 << 24  # bytes of a CSV by which its form is chosen
VERSION = 1  # version of the cleaning; parts of different versions are never mixed


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0."""
    started = time.monotonic()
    tables = [open_table(path, args) for path in expand_inputs(args.tables)]
    captions = tuple(output_captions([table.columns for table in tables]))
    rules = Rules(captions, not args.keep_cut_off, args.keep_without_long)
    out, settings = Path(args.out), _settings(tables, rules, args.rows_per_part)
    summary = load_json(out / SUMMARY) or load_json(out / SUMMARY[1:])
    complete = isinstance(summary, dict)
    if complete:
        if summary.get("settings") != settings:
            raise ValueError(f"--out {out}: made from other tables or with other flags; name another folder")
        print(f"{out}: already complete")
        shutil.rmtree(out / ".work", ignore_errors=True)
    else:
        summary = _make(tables, rules, args, settings)
    if args.summary:
        write_json(Path(args.summary), summary)
    print(describe(summary))
    if complete:
        return 0
    seconds = time.monotonic() - started
    print(f"{seconds:.1f} s, {summary['rows'] / seconds:,.0f} rows/s, memory at most {_peak_memory(args.workers)}")
    return 0


def _make(tables: list[Table], rules: Rules, args: argparse.Namespace, settings: dict) -> dict:
    out = Path(args.out)
    work = out / ".work"
    known = load_json(work / "settings.json")
    if known is None and out.is_dir() and any(path != work for path in out.iterdir()):
        raise ValueError(f"--out {out}: holds something else; name an empty or new folder")
    if known not in (None, settings):
        raise ValueError(
            f"--out {out}: started from other tables or with other flags; name another folder, or remove it"
        )
    args.lease.take(work, "--out")
    write_json(work / "settings.json", settings)
    for folder in (out, work):
        remove_leftovers(folder)
    tasks: list[Task] = []
    total_bytes = sum(table.path.stat().st_size for table in tables)

    def all_tasks() -> Iterator[Task]:
        for number, table in enumerate(tables):
            for task in table_tasks(table, number, rules, args.rows_per_part, work):
                tasks.append(task)
                yield task

    with processes(args.workers) as pool:
        results = {}
        with progress(None, total_bytes, "cleaning", "B", scaled=True) as bar:
            for base, size, result in spread(_clean, all_tasks(), pool):
                results[base] = result
                bar.update(size)
        # A row is a duplicate if an earlier row has the same URL.
        keep, duplicates = first_of_each([task.file("npy") for task in tasks])
        jobs = [(task.file("arrow"), out / f"{task.base.name}.parquet", mask) for task, mask in zip(tasks, keep)]
        kept = sum(progress(spread(write_part, jobs, pool), len(jobs), "writing", "part"))
    counts = total_counts([results[task.base] for task in tasks])
    assert kept + duplicates["duplicates"] == counts["kept"]
    summary = counts | {"kept": kept} | duplicates | {"parts": sum(bool(mask.any()) for mask in keep)}
    summary |= {"settings": settings}
    write_json(out / SUMMARY, summary)
    shutil.rmtree(work)
    return summary


def _clean(task: Task) -> tuple[Path, int, dict]:
    """Returns (base of the results' paths, number of bytes of the table, counts)."""
    size = task.chunk.end - task.chunk.begin
    if task.table.form is None:
        share = size / max(_num_units(task.table.path), 1)
        size = int(task.table.path.stat().st_size * share)
    return task.base, size, clean_chunk(task)


def expand_inputs(names: list[str]) -> list[Path]:
    """Returns the named tables; the tables of a folder are sorted by name.

    Raises:
        FileNotFoundError, ValueError: a file is missing, has an unknown suffix, or is named twice.
    """
    paths = table_files(local_spec("::".join(names)))
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path}: no {', '.join(TABLE_SUFFIXES)} in this folder")
    return paths


def open_table(path: Path, args: argparse.Namespace) -> Table:
    """Reads a table's header and finds its columns.

    Raises:
        ValueError: the file is not a table, or columns are missing (see `find_columns`).
    """
    form, begin = None, 0
    if path.suffix in (".csv", ".tsv"):
        form, header = choose_form(path, args.csv_separator, _LOOKED_AT)
        form = form._replace(quoted=form.quoted and not args.no_quotes)
        header, begin = CsvRecords(path, form).header()
    else:
        header = readers.open_table(path).names
    columns = find_columns(
        str(path), header, args.url_column, args.key_column, args.raw_column, args.long_columns, args.short_columns
    )
    return Table(path, form, tuple(header), begin, columns, args.caption_lists)


def table_tasks(table: Table, number: int, rules: Rules, num_rows: int, work: Path) -> Iterator[Task]:
    """Divides a table into tasks; the chunks are written to disk, so that a restart doesn't search for them again."""
    draft = Task(table, Chunk(0, 0), rules, work)
    journal = work / f"{number:03d}.chunks"
    known = _read_journal(journal)
    for place, chunk in enumerate(known):
        yield replace(draft, chunk=chunk, base=work / f"part-{number:03d}-{place:06d}")
    begin = known[-1].end if known else table.begin
    if table.form is None and table.path.suffix == ".parquet":
        with pq.ParquetFile(table.path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        more = list(parquet_chunks(sizes, num_rows))[len(known) :]
    elif table.form is None:
        total = _num_units(table.path)
        more = [Chunk(first, min(first + num_rows, total)) for first in range(begin, total, num_rows)]
    else:
        more = csv_chunks(CsvRecords(table.path, table.form, len(table.header)), begin, num_rows)
    with open(journal, "a", encoding="utf-8") as file:
        for place, chunk in enumerate(more, start=len(known)):
            file.write(json.dumps(chunk) + "\n")
            file.flush()
            yield replace(draft, chunk=chunk, base=work / f"part-{number:03d}-{place:06d}")


def _num_units(path: Path) -> int:
    """Returns the number of row groups of a Parquet file, or of rows of another."""
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_row_groups
    return len(readers.load_rows(readers.open_table(path), ()))


def _read_journal(path: Path) -> list[Chunk]:
    """Returns the chunks found so far; removes an incomplete last line from the file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_text("".join(whole), encoding="utf-8")
    return [Chunk(*json.loads(line)) for line in whole]


def _settings(tables: list[Table], rules: Rules, rows_per_part: int) -> dict:
    """Returns the settings that the parts depend on."""
    return {
        "version": VERSION,
        "tables": [
            {
                "name": table.path.name,
                "bytes": table.path.stat().st_size,
                "form": table.form and list(table.form),
                "url": table.columns.url,
                "key": table.columns.key,
                "captions": table.columns.captions,
            }
            for table in tables
        ],
        "captions": list(rules.captions),
        "trim": rules.trim,
        "keep_without_long": rules.keep_without_long,
        "rows_per_part": rows_per_part,
        "lists": tables[0].lists,
    }


def describe(summary: dict) -> str:
    """Returns the counts as text for the terminal."""
    dropped = {name: summary[name] for name in ROW_KINDS[2:]}
    lines = [f"{summary['kept']:,} of {summary['rows']:,} rows kept in {summary['parts']:,} parts"]
    lines.append(f"dropped rows: {format_counts(dropped)}")
    rows = [[name, *counts.values()] for name, counts in summary["captions"].items()]
    headers = ["captions", *(kind.replace("_", "-") for kind in next(iter(summary["captions"].values())))]
    return "\n".join([*lines, tabulate(rows, headers, intfmt=",")])


def _peak_memory(workers: int) -> str:
    """Returns the peak memory of this process and its workers, with each worker counted like the largest."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, child = (
        resource.getrusage(who).ru_maxrss * unit / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    if workers == 1:
        return f"{own:,.0f} MB"
    return f"{own + workers * child:,.0f} MB ({own:,.0f} and {workers} x {child:,.0f})"
