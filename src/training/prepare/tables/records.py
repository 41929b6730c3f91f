"""Reads tables that don't fit into memory in chunks: bytes of a CSV file, or row groups of a Parquet file."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from training.prepare.tables.columns import Columns
from training.readers.csv_rows import CsvForm, CsvRecords, Record, Stretch
from training.readers.sentences import join_sentences

ROWS_AT_ONCE = 4_000  # 10 to 20 MB


class Chunk(NamedTuple):
    """A part of a table: the bytes `begin` to `end` of a CSV file, or these row groups of a Parquet file.

    Attributes:
        begin, end: bytes or row groups.
        plain: (first byte, byte after the last, number of rows) of the stretches in a CSV that a parser in C may read.
    """

    begin: int
    end: int
    plain: Sequence[tuple[int, int, int]] = ()


@dataclass(frozen=True)
class Table:
    """An input table.

    Attributes:
        path: the file.
        form: how a CSV is written; None for Parquet.
        header: the names of all columns.
        begin: the byte of the first row; 0 for Parquet.
        columns: which columns are used, and for what.
    """

    path: Path
    form: CsvForm | None
    header: tuple[str, ...]
    begin: int
    columns: Columns

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
    end, missing, plain = begin, num_rows, []
    for part in records.read_fast(begin):
        ends = part.ends if isinstance(part, Stretch) else np.array([part.end])
        end, first = part.begin, 0
        while first < len(ends):
            last = min(first + missing, len(ends))
            stop, missing = int(ends[last - 1]), missing - (last - first)
            if isinstance(part, Stretch):
                plain.append((end, stop, last - first))
            if not missing:
                yield Chunk(begin, stop, plain)
                begin, missing, plain = stop, num_rows, []
            end, first = stop, last
    if end > begin:
        yield Chunk(begin, end, plain)


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
    for rows in _csv_rows(table, chunk) if table.form else _parquet_rows(table, chunk):
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
    slow, place = CsvRecords(table.path, table.form, len(table.header)), chunk.begin
    with open(table.path, "rb") as file:
        for begin, end, num_rows in [*chunk.plain, (chunk.end, chunk.end, 0)]:
            records = slow.read(place, begin)
            while some := list(islice(records, ROWS_AT_ONCE)):
                yield _careful_rows(table, some)
            if num_rows:
                file.seek(begin)
                texts = _parse(table, file.read(end - begin))
                assert len(texts) == num_rows
                yield Rows(texts, np.zeros(num_rows, dtype=bool), 0)
            place = end


def _careful_rows(table: Table, records: list[Record]) -> Rows:
    good = [record for record in records if record.cells is not None]
    places = [table.header.index(name) for name in table.wanted]
    texts = [pa.array([record.cells[place] for record in good], pa.string()) for place in places]
    repaired = np.array([record.repaired for record in good], dtype=bool)
    return Rows(pa.table(texts, table.wanted), repaired, len(records) - len(good))


def _parse(table: Table, data: bytes) -> pa.Table:
    quote = '"' if table.form.quoted else False
    return csv.read_csv(
        pa.BufferReader(data),
        csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=table.header),
        csv.ParseOptions(delimiter=table.form.separator, quote_char=quote, newlines_in_values=True),
        csv.ConvertOptions(
            column_types=dict.fromkeys(table.wanted, pa.string()),
            include_columns=table.wanted,
            strings_can_be_null=False,
        ),
    )


def _parquet_rows(table: Table, chunk: Chunk) -> Iterator[Rows]:
    with pq.ParquetFile(table.path) as file:
        for group in range(chunk.begin, chunk.end):
            num_left = file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(1000, row_groups=[group], columns=table.wanted, use_threads=False):
                    num_left -= len(batch)
                    texts = pa.table([_strings(batch.column(name)) for name in table.wanted], table.wanted)
                    yield Rows(texts, np.zeros(len(texts), dtype=bool), 0)
            except (pa.ArrowException, OSError) as error:
                logging.warning(f"{table.path}: row group {group} is damaged, {num_left:,} rows lost ({error})")
                none = pa.table([pa.array([], pa.string()) for _ in table.wanted], table.wanted)
                yield Rows(none, np.zeros(0, dtype=bool), num_left)


def _strings(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.string())
    return pa.array(map(cell_text, column.to_pylist()), pa.string())


def cell_text(value: object) -> str | None:
    """Returns the text in a Parquet cell, with a list of sentences joined; None for anything else."""
    if isinstance(value, str):
        return value
    sentences = [s.strip() for s in value if isinstance(s, str) and s.strip()] if isinstance(value, list) else []
    return join_sentences(sentences) if sentences else None
