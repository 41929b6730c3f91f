"""Reads tables that don't fit into memory in chunks: bytes of a CSV file, row groups of a Parquet file, or rows."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.prepare.tables.columns import Columns
from training.readers.captions import RecordError, caption_texts
from training.readers.csv_rows import CsvForm, CsvRecords
from training.readers.tables import load_rows, open_table

ROWS_AT_ONCE = 4_000  # 10 to 20 MB


class Chunk(NamedTuple):
    """A part of a table: the bytes `begin` to `end` of a CSV file, row groups of a Parquet file, or rows of another."""

    begin: int
    end: int


@dataclass(frozen=True)
class Table:
    """An input table.

    Attributes:
        path: the file.
        form: how a CSV is written; None for other files.
        header: the names of all columns.
        begin: the byte of the first row; 0 for other files.
        columns: which columns are used, and for what.
        lists: see `caption_texts`.
    """

    path: Path
    form: CsvForm | None
    header: tuple[str, ...]
    begin: int
    columns: Columns
    lists: str = "alternatives"

    @property
    def wanted(self) -> list[str]:
        """The columns that are read."""
        return list(
            dict.fromkeys(name for name in (self.columns.url, self.columns.key, *self.columns.captions) if name)
        )


class Rows(NamedTuple):
    """Some rows of a table.

    Attributes:
        texts: the wanted columns, as strings.
        repaired: bool [num_rows], True for rows that were not UTF-8 and have been read as Windows-1252.
        num_malformed: number of rows before or between these that can't be read.
    """

    texts: pa.Table
    repaired: np.ndarray
    num_malformed: int


def csv_chunks(records: CsvRecords, begin: int, num_rows: int) -> Iterator[Chunk]:
    """Divides the rows after byte `begin` into chunks of `num_rows` rows."""
    end = begin
    for number, record in enumerate(records.read(begin), start=1):
        end = record.end
        if number % num_rows == 0:
            yield Chunk(begin, end)
            begin = end
    if end > begin:
        yield Chunk(begin, end)


def parquet_chunks(group_sizes: Sequence[int], num_rows: int) -> Iterator[Chunk]:
    """Combines consecutive row groups into chunks of at least `num_rows` rows."""
    begin = held = 0
    for number, size in enumerate(group_sizes, start=1):
        held += size
        if held >= num_rows or number == len(group_sizes):
            yield Chunk(begin, number)
            begin, held = number, 0


def read_rows(table: Table, chunk: Chunk) -> Iterator[Rows]:
    """Yields the rows of a chunk, about `ROWS_AT_ONCE` at a time."""
    held: list[pa.Table] = []
    repaired: list[np.ndarray] = []
    malformed = num_rows = 0
    read = _csv_rows if table.form else _parquet_rows if table.path.suffix == ".parquet" else _other_rows
    for rows in read(table, chunk):
        held.append(rows.texts)
        repaired.append(rows.repaired)
        malformed += rows.num_malformed
        num_rows += len(rows.repaired)
        if num_rows >= ROWS_AT_ONCE:
            yield Rows(pa.concat_tables(held), np.concatenate(repaired), malformed)
            held, repaired, malformed, num_rows = [], [], 0, 0
    if held:
        yield Rows(pa.concat_tables(held), np.concatenate(repaired), malformed)


def _csv_rows(table: Table, chunk: Chunk) -> Iterator[Rows]:
    records = CsvRecords(table.path, table.form, len(table.header)).read(chunk.begin, chunk.end)
    places = [table.header.index(name) for name in table.wanted]
    while some := list(islice(records, ROWS_AT_ONCE)):
        good = [record for record in some if record.cells is not None]
        texts = [pa.array([record.cells[place] for record in good], pa.string()) for place in places]
        repaired = np.array([record.repaired for record in good], dtype=bool)
        yield Rows(pa.table(texts, table.wanted), repaired, len(some) - len(good))


def _other_rows(table: Table, chunk: Chunk) -> Iterator[Rows]:
    rows = load_rows(open_table(table.path), table.wanted)
    for first in range(chunk.begin, chunk.end, ROWS_AT_ONCE):
        good, numbers = [], range(first, min(first + ROWS_AT_ONCE, chunk.end))
        for number in numbers:
            try:
                good.append(rows[number])
            except RecordError:
                pass
        texts = [pa.array([cell_text(row.get(n), table.lists) for row in good], pa.string()) for n in table.wanted]
        yield Rows(pa.table(texts, table.wanted), np.zeros(len(good), dtype=bool), len(numbers) - len(good))


def _parquet_rows(table: Table, chunk: Chunk) -> Iterator[Rows]:
    with pq.ParquetFile(table.path) as file:
        for group in range(chunk.begin, chunk.end):
            num_left = file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(1000, row_groups=[group], columns=table.wanted, use_threads=False):
                    num_left -= len(batch)
                    texts = pa.table([_strings(batch.column(name), table.lists) for name in table.wanted], table.wanted)
                    yield Rows(texts, np.zeros(len(texts), dtype=bool), 0)
            except (pa.ArrowException, OSError) as error:
                logging.warning(f"{table.path}: row group {group} is damaged, {num_left:,} rows lost ({error})")
                none = pa.table([pa.array([], pa.string()) for _ in table.wanted], table.wanted)
                yield Rows(none, np.zeros(0, dtype=bool), num_left)


def _strings(column: pa.Array, lists: str) -> pa.Array:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.string())
    return pa.array([cell_text(value, lists) for value in column.to_pylist()], pa.string())


def cell_text(value: object, lists: str) -> str | None:
    """Returns the text in a cell; None for anything else than a text, a list of texts or a conversation.

    Raises:
        ValueError: there are several alternatives, but a part has one caption in each column.
    """
    try:
        texts = caption_texts(value, lists=lists)
    except ValueError:
        return None
    if len(texts) > 1:
        raise ValueError(
            f"a cell holds {len(texts)} captions ({texts[0][:40]!r}, ..), a part one in each column; if they are the "
            "sentences of one caption, add --caption-lists sentences"
        )
    return texts[0] if texts else None
