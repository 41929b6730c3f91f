"""One chunk of a caption table: its rows cleaned, written as Parquet, and counted. Runs in worker processes."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataloaders.csv_rows import CsvForm, CsvRecords
from training.prepare.tables.clean import Cleaned, clean_caption
from training.prepare.tables.columns import KEY, RAW, URL, Columns
from training.prepare.tables.records import Chunk, cell_text
from training.prepare.work import add_counts, load_json, write_json
from training.runtime.files import whole_file

ROW_GROUP = 4_000  # rows that a worker holds at once: 25 MB of dicts and Arrow
ROW_KINDS = ("rows", "kept", "duplicates", "empty", "refused", "malformed")
CAPTION_KINDS = ("kept", "empty", "refused", "repaired", "cut_off")


@dataclass(frozen=True)
class Rules:
    """What is done to every row.

    Attributes:
        captions: caption columns to write, in order; those that a table lacks are null.
        trim: take cut-off last sentences away.
        keep_without_long: keep rows without a usable long caption.
    """

    captions: tuple[str, ...]
    trim: bool
    keep_without_long: bool

    @property
    def schema(self) -> pa.Schema:
        """Of the parts: url, key, raw_caption, long captions, short ones."""
        return pa.schema([(name, pa.string()) for name in (URL, KEY, *self.captions)])


@dataclass(frozen=True)
class Table:
    """One input.

    Attributes:
        path: the file.
        form: of a CSV; None for Parquet.
        header: names of all columns.
        begin: byte of the first row; 0 for Parquet.
        columns: what is what.
    """

    path: Path
    form: CsvForm | None
    header: tuple[str, ...]
    begin: int
    columns: Columns


@dataclass(frozen=True)
class Task:
    """One chunk to be cleaned.

    Attributes:
        table: the input.
        chunk: which part of it.
        rules: what to do.
        base: file names of the results begin so: ``BASE.parquet``, ``BASE.npy``, ``BASE.json``.
    """

    table: Table
    chunk: Chunk
    rules: Rules
    base: Path

    def file(self, suffix: str) -> Path:
        """A result's path."""
        return self.base.with_name(f"{self.base.name}.{suffix}")


def url_hash(text: str) -> int:
    """64 bits that stand for a URL or key.

    Among 100 million different ones the chance that any two share them is 3 in 10,000.
    """
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def clean_chunk(task: Task) -> dict:
    """Cleans one chunk, unless that has been done before.

    Returns:
        Counts: `ROW_KINDS`, and under ``captions`` by column `CAPTION_KINDS`. The last file written holds them too, and
        says that the others are whole: the rows, and a hash of each, by which duplicates are found later.
    """
    done = load_json(task.file("json"))
    if done is not None:
        return done
    counts = dict.fromkeys(ROW_KINDS, 0)
    captions = {name: dict.fromkeys(CAPTION_KINDS, 0) for name in task.table.columns.captions.values()}
    hashes: list[int] = []
    with whole_file(task.file("parquet")) as path, pq.ParquetWriter(path, task.rules.schema, compression="zstd") as out:
        rows: list[dict] = []
        for values, repaired in _rows(task):
            counts["rows"] += 1
            kind, row, found = clean_row(values, repaired, task.table.columns, task.rules)
            counts[kind] += 1
            for name, result in found.items():
                _count_caption(captions[name], result)
            if kind == "kept":
                rows.append(row)
                hashes.append(url_hash(row[URL] or row[KEY]))
            if len(rows) == ROW_GROUP:
                out.write_table(pa.Table.from_pylist(rows, task.rules.schema))
                rows = []
        if rows or not hashes:
            out.write_table(pa.Table.from_pylist(rows, task.rules.schema))
    with whole_file(task.file("npy")) as path, open(path, "wb") as file:
        np.save(file, np.array(hashes, dtype=np.uint64))
    result = counts | {"captions": captions}
    write_json(task.file("json"), result)
    return result


def clean_row(
    values: dict[str, str | None] | None, repaired: bool, columns: Columns, rules: Rules
) -> tuple[str, dict, dict[str, Cleaned]]:
    """Cleans one row.

    Args:
        values: column name -> text; None for a row that can't be read.
        repaired: it was in another encoding.
        columns: what is what.
        rules: what to do.

    Returns:
        (one of `ROW_KINDS`, the row to write, each caption as cleaned). A row is kept if a long caption is left of it
        (any caption, if the table has no long ones or the rules say so).
    """
    url = (values.get(columns.url) or "").strip() if values else ""
    key = (values.get(columns.key) or "").strip() if values else ""
    if not url and not key:
        return "malformed", {}, {}
    found = {}
    for source, name in columns.captions.items():
        cleaned = clean_caption(values.get(source), name != RAW, source in columns.long, rules.trim)
        found[name] = cleaned._replace(repaired=True) if repaired and cleaned.text else cleaned
    needed = list(columns.long.values()) if columns.long and not rules.keep_without_long else list(found)
    if not any(found[name].text for name in needed):
        return ("refused" if any(c.fault == "refused" for c in found.values()) else "empty"), {}, found
    row = {URL: url or None, KEY: key or f"{url_hash(url):016x}"}
    return "kept", row | {name: cleaned.text for name, cleaned in found.items()}, found


def _count_caption(counts: dict[str, int], result: Cleaned) -> None:
    counts[result.fault or "kept"] += 1
    counts["repaired"] += result.repaired
    counts["cut_off"] += result.cut_off


def _rows(task: Task) -> Iterator[tuple[dict[str, str | None] | None, bool]]:
    """Yields (column name -> text, whether its encoding was wrong); None for a malformed row."""
    if task.table.form is not None:
        records = CsvRecords(task.table.path, task.table.form, len(task.table.header))
        for record in records.read(task.chunk.begin, task.chunk.end):
            yield (dict(zip(task.table.header, record.cells)) if record.cells else None), record.repaired
        return
    columns = task.table.columns
    wanted = [name for name in (columns.url, columns.key, *columns.captions) if name]
    with pq.ParquetFile(task.table.path) as file:
        for group in range(task.chunk.begin, task.chunk.end):
            num_left = file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(1000, row_groups=[group], columns=wanted, use_threads=False):
                    for row in batch.to_pylist():
                        num_left -= 1
                        yield {name: cell_text(value) for name, value in row.items()}, False
            except (pa.ArrowException, OSError) as error:
                logging.warning(f"{task.table.path}: row group {group} is damaged, {num_left:,} rows lost ({error})")
                yield from repeat((None, False), num_left)


def first_of_each(hash_files: list[Path], per_pass: int = 2_000_000) -> tuple[list[np.ndarray], Counter]:
    """Finds the rows that come for the first time, over all chunks in their order.

    Hashes are taken a range at a time, so that memory does not grow with their number.

    Args:
        hash_files: one array of uint64 per chunk.
        per_pass: about as many hashes are held at once.

    Returns:
        Per chunk a bool array, True for a row to keep; and the number of duplicates.
    """
    sizes = [len(np.load(path)) for path in hash_files]
    keep = [np.zeros(size, dtype=bool) for size in sizes]
    num_passes = max(1, -(-sum(sizes) // per_pass))
    width = -(-(1 << 64) // num_passes)
    for number in range(num_passes):
        low, high = np.uint64(number * width), np.uint64(min((number + 1) * width, 1 << 64) - 1)
        values, places = [], []
        for chunk, path in enumerate(hash_files):
            hashes = np.load(path)
            rows = np.flatnonzero((hashes >= low) & (hashes <= high))
            values.append(hashes[rows])
            places.append((chunk, rows))
        _, first = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *values]), return_index=True)
        is_first = np.zeros(sum(map(len, values)), dtype=bool)
        is_first[first] = True
        start = 0
        for chunk, rows in places:
            keep[chunk][rows] = is_first[start : start + len(rows)]
            start += len(rows)
    return keep, Counter(duplicates=sum(sizes) - sum(int(k.sum()) for k in keep))


def write_part(job: tuple[Path, Path, np.ndarray]) -> int:
    """Writes the rows of a cleaned chunk that are to be kept.

    Args:
        job: (the chunk's rows, where to write them, which of them to keep).

    Returns:
        Rows written. A chunk of which nothing is kept leaves no file.
    """
    source, target, keep = job
    if target.exists():
        pass  # by a run that was killed
    elif keep.all() and len(keep):
        os.replace(source, target)
    elif keep.any():
        with pq.ParquetFile(source) as file, whole_file(target) as path:
            with pq.ParquetWriter(path, file.schema_arrow, compression="zstd") as out:
                start = 0
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, use_threads=False)
                    out.write_table(table.filter(pa.array(keep[start : start + table.num_rows])))
                    start += table.num_rows
    source.unlink(missing_ok=True)
    return int(keep.sum())


def total_counts(results: list[dict]) -> dict:
    """Adds up the counts of chunks."""
    total: dict = dict.fromkeys(ROW_KINDS, 0)
    for result in results:
        add_counts(total, result)
    return total
