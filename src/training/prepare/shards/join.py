"""`prepare join`: adds captions from tables to the JSON files of existing shards.

The names or URLs of all samples are read, then the tables once: the rows that are found are kept in an SQLite file, as
they may not fit into memory. Then each shard is rewritten, several in parallel. A note beside each written shard says
that it is done, so that the same command can continue after a stop.
"""

import argparse
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from training.prepare.rows import TableRows, as_utf8, cell_name, cell_texts
from training.prepare.shards.files import JsonSample, Shard, content_mark, plain_tar, read_json_samples, rewrite_shard
from training.prepare.shards.job import ShardJob, attempt
from training.prepare.tables.columns import KEY, URL
from training.prepare.work import format_counts, hash_text, processes, progress
from training.readers.columnar import ColumnarFile, may_hold_text
from training.readers.faults import FAULT_KINDS
from training.readers.files import IMAGE_SUFFIXES
from training.readers.hub import local_spec
from training.readers.table_files import table_files

ROWS_AT_ONCE = 10_000
# Text columns that are never captions.
NOT_CAPTIONS = (URL, KEY, "status", "error_message", "exif", "sha256", "md5", "url_hash")
KINDS = ("samples", "matched", "unmatched", "nothing to match by", *FAULT_KINDS, "captions")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0, or 1 if shards can't be read."""
    job = ShardJob(args, args.shards, "--shards", ".join")
    match = args.match or ("key" if args.key_column else None) or _guess_match(job.shards)
    column = args.key_column if match == "key" and args.key_column else match
    tables = open_tables(args.tables, column, args.columns, match == "key", args.caption_lists)
    settings = {"tables": [content_mark(table.path) for table in tables.tables], "match": column}
    settings |= {"columns": tables.columns, "lists": args.caption_lists, "keep": args.keep_existing}
    left = job.left(settings, dict.fromkeys(KINDS, 0))
    found, num_rows, num_malformed = job.state / f"captions-{job.name}.tmp", 0, 0
    try:
        with processes(args.workers) as parallel:
            wanted, jobs = [np.zeros(1, dtype=np.uint64)], []
            looked_at = parallel(attempt, [(_names_in, shard, (match,)) for shard in left])
            for shard, names in progress(looked_at, len(left), "reading", "shard"):
                if isinstance(names, str):
                    job.add(shard, names)
                else:
                    wanted.append(names)
                    jobs.append((_write, shard, (match, found, args.keep_existing)))
            if jobs:
                num_rows, num_malformed = find_rows(tables, np.unique(np.concatenate(wanted)), found)
            for shard, counts in progress(parallel(attempt, jobs), len(jobs), "joining", "shard"):
                job.add(shard, counts)
    finally:
        found.unlink(missing_ok=True)
    total, further = job.total, {"match": match, "columns": list(tables.columns), "table_rows": num_rows}
    malformed = f" ({num_malformed:,} of them malformed)" if num_malformed else ""
    lines = [
        f"{total['samples']:,} samples by {match}: {format_counts({k: total[k] for k in KINDS[1:-1]})}",
        f"{total['captions']:,} captions written; {num_rows:,} rows of tables read{malformed}",
    ]
    return job.finish(further | {"malformed_rows": num_malformed}, lines)


def _guess_match(shards: Sequence[Shard]) -> str:
    """Returns ``url`` if samples of the first readable shard have such a key, else ``key``."""
    found = (attempt((_samples_of, shard, ())) for shard in shards)
    samples = next((samples for _, samples in found if not isinstance(samples, str)), [])
    return "url" if any(isinstance(sample.record.get("url"), str) for sample in samples[:100]) else "key"


def _samples_of(shard: Shard) -> list[JsonSample]:
    with plain_tar(shard) as path:
        return read_json_samples(path)


def sample_names(sample: JsonSample, match: str) -> list[str]:
    """Returns what may identify a sample in a table's match column; the first one found there is used."""
    if sample.fault:
        return []
    value = sample.record.get(match)
    values = [as_utf8(value.strip())] if isinstance(value, str) and value.strip() else []
    if match == "url":
        return values
    key = sample.key.removeprefix("./")
    return [
        key,
        key.rpartition("/")[2] if "/" in key else f"*/{key}",
        *(name for v in values for name in image_names(v)[:1]),
    ]


def _names_in(shard: Shard, match: str) -> np.ndarray:
    """Returns hashes of the names of a shard's samples."""
    names = (name for sample in _samples_of(shard) for name in sample_names(sample, match))
    return np.array(list(map(hash_text, names)), dtype=np.uint64)


def _write(shard: Shard, match: str, found: Path, keep_existing: bool) -> dict:
    """Writes one shard; returns its counts."""
    counts, additions = Counter(captions=0), []
    with plain_tar(shard) as path, closing(open_found(found)) as base:
        samples = read_json_samples(path)
        for sample in samples:
            names = sample_names(sample, match)
            captions = next((c for c in (captions_of(base, name) for name in names) if c is not None), None)
            nothing = "unmatched" if names else "nothing to match by"
            counts[sample.fault or (nothing if captions is None else "matched")] += 1
            kept = sample.record if keep_existing else {}
            additions.append({key: text for key, text in (captions or {}).items() if not kept.get(key)})
        rewrite_shard(path, shard.target, samples, additions)
    return dict(counts) | {"samples": len(additions), "captions": sum(map(len, additions))}


@dataclass(frozen=True)
class CaptionTables:
    """Tables in order.

    Attributes:
        tables: the tables.
        match: the column that identifies the sample of a row.
        columns: the caption columns to use.
        by_name: the column holds names of images, which `image_names` compares.
        lists: see `caption_texts`.
    """

    tables: tuple[TableRows, ...]
    match: str
    columns: tuple[str, ...]
    by_name: bool
    lists: str

    def names(self, cell: object) -> list[str]:
        """Returns what a cell of the match column may be found by."""
        name = cell_name(cell)
        return image_names(name) if self.by_name else [name] if name else []


def open_tables(
    names: Sequence[str], match: str, columns: Sequence[str] | None, by_name: bool, lists: str
) -> CaptionTables:
    """Opens caption tables.

    Args:
        names: see `table_files`.
        match: the column to match by.
        columns: the caption columns to use; None means all columns of text.
        by_name, lists: see `CaptionTables`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, not a table, or lacks one of the columns.
    """
    tables = tuple(TableRows(path) for path in table_files(local_spec("::".join(names))))
    found: list[str] = []
    for table in tables:
        for name in (match, *(columns or ())):
            if name not in table.names:
                raise ValueError(
                    f"{table.path}: no column {name}; it has {', '.join(table.names)} (--match, --key-column, "
                    "--columns)"
                )
        found += _text_columns(table)
    chosen = columns or [name for name in dict.fromkeys(found) if name not in (*NOT_CAPTIONS, match)]
    if not chosen:
        raise ValueError(f"{tables[0].path}: no columns of text beside {match}; name them with --columns")
    return CaptionTables(tables, match, tuple(chosen), by_name, lists)


def _text_columns(table: TableRows) -> list[str]:
    if table.form is None and isinstance(table.table, ColumnarFile):
        return [field.name for field in table.table.schema if may_hold_text(field.type)]
    return table.names


def image_names(name: str) -> list[str]:
    r"""Returns what identifies an image in a table, without its suffix: ``photos\1.jpg`` -> ``photos/1``, ``*/1``.

    The last one matches a sample in no folder, such as ``1`` in a tar of the folder's content.
    """
    name = name.strip().replace("\\", "/").removeprefix("./")
    stem, stop, suffix = name.rpartition(".")
    whole = stem if stop and suffix.lower() in IMAGE_SUFFIXES else name
    return [whole, f"*/{whole.rpartition('/')[2]}"] if "/" in whole else [whole] if whole else []


def find_rows(tables: CaptionTables, wanted: np.ndarray, path: Path) -> tuple[int, int]:
    """Reads all tables once, and keeps the captions of the wanted rows.

    Args:
        tables: the tables.
        wanted: sorted hashes of the names to look for.
        path: SQLite file to write.

    Returns:
        Number of rows, and how many of them can't be read.
    """
    path.unlink(missing_ok=True)
    num_rows = num_malformed = 0
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?nolock=1", uri=True)) as base:
        base.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; CREATE TABLE names(name TEXT, owner TEXT, row INTEGER);"
            "CREATE TABLE captions(row INTEGER PRIMARY KEY, texts TEXT);"
        )
        for batch in progress(_batches(tables), None, "reading tables", "batch"):
            good = [(number, cells) for number, cells in enumerate(batch, num_rows) if cells is not None]
            num_rows += len(batch)
            num_malformed += len(batch) - len(good)
            _keep(base, tables, good, wanted)
        base.execute("CREATE INDEX by_name ON names(name)")
        base.commit()
    return num_rows, num_malformed


def _batches(tables: CaptionTables) -> Iterator[list[tuple | None]]:
    """Yields a few rows at a time, as the cells of the match column and of all caption columns."""
    for table in tables.tables:
        columns = [name for name in tables.columns if name in table.names]
        rows = table.read([tables.match, *columns])
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            yield [cells and (cells[0], dict(zip(columns, cells[1:]))) for cells, _ in batch]


def _keep(base: sqlite3.Connection, tables: CaptionTables, rows: list, wanted: np.ndarray) -> None:
    names = [(name, number) for number, (_, (cell, _)) in enumerate(rows) for name in tables.names(cell)]
    hashes = np.array([hash_text(name) for name, _ in names], dtype=np.uint64)
    places = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
    found = dict.fromkeys(names[place][1] for place in np.flatnonzero(wanted[places] == hashes))
    for row, (cell, captions) in (rows[number] for number in found):
        texts = {name: cell_texts(value, tables.lists) for name, value in captions.items()}
        content = {name: those if len(those) > 1 else those[0] for name, those in texts.items() if those}
        base.execute("INSERT INTO captions VALUES (?, ?)", (row, json.dumps(content)))
        known = tables.names(cell)
        base.executemany("INSERT INTO names VALUES (?, ?, ?)", [(name, known[0], row) for name in known])


def open_found(path: Path) -> sqlite3.Connection:
    """Opens the file that `find_rows` wrote, for reading."""
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def captions_of(base: sqlite3.Connection, name: str) -> dict[str, str | list[str]] | None:
    """Returns the captions under a name: of the first such row, and None if no row has it.

    ``*/1`` has none if it stands for images of several folders.
    """
    row, num_owners = base.execute(
        "SELECT MIN(row), COUNT(DISTINCT owner) FROM names WHERE name = ?", (name,)
    ).fetchone()
    if num_owners != 1:
        return None
    return json.loads(base.execute("SELECT texts FROM captions WHERE row = ?", (row,)).fetchone()[0])
