"""Parquet and Arrow tables, with images inside or beside them, in the layout of data sets on the Hugging Face hub."""

import logging
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from training.readers.faults import refuse_pointer
from training.runtime.messages import first_line

ROWS_AT_ONCE = 64  # about 10 MB if the table holds images
TEXT_ROWS_AT_ONCE = 10_000
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
# (cells in the wanted columns, or None if the row can't be read; whether it was read as Windows-1252)
Row = tuple[Sequence | None, bool]


class ArrowRows:
    """Rows in Arrow's compact form, in any order.

    Attributes:
        num_left_out: number of rows of the file that can't be read.
    """

    def __init__(self, table: pa.Table, num_left_out: int = 0):
        self.columns = dict(zip(table.column_names, table.columns))
        self.num_rows, self.num_left_out = table.num_rows, num_left_out

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> dict:
        return {name: values[row].as_py() for name, values in self.columns.items()}


class ColumnarFile:
    """A Parquet file, or an Arrow file as `datasets.save_to_disk` writes it; rows are read lazily.

    Args:
        path: the file.

    A Parquet file is open only while rows are read, because a data set may have more files than a process may open.

    Attributes:
        schema: names and types of the columns.
        names: the names of all columns.
        image_columns: those that hold the images themselves: bytes, or structs of bytes and path.
        num_rows: the number of rows in the file.
        group_ends: the row after each row group, in which reading can't begin; an Arrow file counts as one group.

    Raises:
        ValueError: the file is not a Parquet or Arrow table, or is truncated.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if self.path.suffix == ".arrow":
                self._table, self._metadata = _map_arrow(self.path), None
                self.schema, sizes = self._table.schema, [self._table.num_rows]
            else:
                with pq.ParquetFile(self.path) as file:
                    self._table, self._metadata, self.schema = None, file.metadata, file.schema_arrow
                sizes = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        except pa.ArrowInvalid as error:
            with open(path, "rb") as file:
                refuse_pointer(file.read(100), path)
            raise ValueError(f"{path}: not a readable table ({first_line(error)}); fetch or write it again") from error
        self.num_rows, self.group_ends = sum(sizes), list(accumulate(sizes))
        self.names = list(self.schema.names)
        self.image_columns = [field.name for field in self.schema if _holds_images(field.type)]

    def batches(self, columns: Sequence[str], first: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
        """Yields the rows from `first` up to, but not including, `stop` (None: to the end), a few at a time.

        Raises:
            ValueError: the file is broken within these rows.
        """
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        size = ROWS_AT_ONCE if any(name in self.image_columns for name in columns) else TEXT_ROWS_AT_ONCE
        if self._table is not None:
            rows = self._table.select(columns).slice(first, max(stop - first, 0))
            yield from rows.to_batches(max_chunksize=size)
            return
        begins = [0, *self.group_ends[:-1]]
        groups = [i for i, (begin, end) in enumerate(zip(begins, self.group_ends)) if end > first and begin < stop]
        row = begins[groups[0]] if groups else stop
        try:
            with pq.ParquetFile(self.path, metadata=self._metadata, memory_map=True) as file:
                for batch in file.iter_batches(size, groups, columns, use_threads=False):
                    wanted = batch.slice(max(first - row, 0), max(min(stop, row + len(batch)) - max(first, row), 0))
                    if len(wanted):
                        yield wanted
                    row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}: broken ({first_line(error)})") from error

    def rows(self, columns: Sequence[str], first: int = 0, stop: int | None = None) -> Iterator[dict]:
        """Yields each row from `first` up to, but not including, `stop` as a dict of column -> value."""
        for batch in self.batches(columns, first, stop):
            yield from batch.to_pylist()

    def stream(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yields all rows in order; those of a damaged row group can't be read."""
        row = 0
        for group, stop in enumerate(self.group_ends):
            try:
                for batch in self.batches(columns, row, stop):
                    yield from zip(zip(*(batch.column(name).to_pylist() for name in columns)), repeat(False))
                    row += len(batch)
            except ValueError as error:
                logging.warning(f"{self.path}: row group {group} is damaged, {stop - row:,} rows lost ({error})")
                yield from repeat((None, False), stop - row)
            row = stop

    def same_group(self, first: int, second: int) -> bool:
        """Returns whether two rows are in the same row group, so that reading can't begin between them."""
        return self._table is None and bisect_right(self.group_ends, first) == bisect_right(self.group_ends, second)

    def load(self, columns: Sequence[str]) -> ArrowRows:
        """Returns all rows; those of an Arrow file stay on disk."""
        if self._table is not None:
            return ArrowRows(self._table.select(columns))
        schema = pa.schema([self.schema.field(name) for name in columns])
        return ArrowRows(pa.Table.from_batches(list(self.batches(columns)), schema))


def _map_arrow(path: Path) -> pa.Table:
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in _BYTES)


def may_hold_text(kind: pa.DataType) -> bool:
    """Returns whether a column of a type may hold captions: texts, lists of texts, or conversations."""
    if hasattr(kind, "value_type"):  # lists and dictionaries
        return may_hold_text(kind.value_type)
    if pa.types.is_struct(kind):
        return any(may_hold_text(field.type) for field in kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def image_bytes(value: object) -> bytes | None:
    """Returns the bytes of the image file in a cell; None if the cell holds none."""
    return (value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None) or None


def read_image(path: Path, column: str, row: int) -> bytes:
    """Returns the bytes of the image file in a cell of a Parquet or Arrow file; empty if the cell holds none."""
    cursor = _Cursor(path, column)
    with cursor.lock:
        return image_bytes(cursor.read(row)) or b""


@lru_cache(maxsize=16)
class _Cursor:
    """Reads cells of a column, mostly in order: a Parquet row group can't be entered in the middle."""

    def __init__(self, path: Path, column: str):
        self.file, self.column, self.lock = ColumnarFile(path), column, threading.Lock()
        self.first, self.batches = 0, self.file.batches([column])
        self.cells: pa.Array = pa.array([])

    def read(self, row: int) -> object:
        following = self.first + len(self.cells)
        if row < self.first or (row >= following and not self.file.same_group(following, row)):
            self.first, self.cells, self.batches = row, pa.array([]), self.file.batches([self.column], row)
        while row >= self.first + len(self.cells):
            self.first += len(self.cells)
            self.cells = next(self.batches).column(0)
        return self.cells[row - self.first].as_py()
