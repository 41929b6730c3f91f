"""Parquet and Arrow tables, with images inside or beside them, in the layout of data sets on the Hugging Face hub."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS_AT_ONCE = 64  # about 10 MB if the table holds images
_HELD = b"."  # replaces an image's bytes where it only matters that there are some


class ColumnarFile:
    """A Parquet file, or an Arrow file as `datasets.save_to_disk` writes it; rows are read lazily.

    Args:
        path: the file.

    Attributes:
        schema: names and types of the columns.
        num_rows: the number of rows in the file.

    Raises:
        ValueError: the file is not a Parquet or Arrow table, or is truncated.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if self.path.suffix == ".arrow":
                self._table, self._file = _map_arrow(self.path), None
                self.schema, self.num_rows = self._table.schema, self._table.num_rows
            else:
                self._table, self._file = None, pq.ParquetFile(self.path)
                self.schema, self.num_rows = self._file.schema_arrow, self._file.metadata.num_rows
                sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
                self._ends = np.cumsum(sizes, dtype=np.int64)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a readable table ({str(error).splitlines()[0][:300]})") from error

    @property
    def names(self) -> list[str]:
        """The names of all columns."""
        return list(self.schema.names)

    @property
    def image_columns(self) -> list[str]:
        """The columns that hold the images themselves: bytes, or structs of bytes and path."""
        return [field.name for field in self.schema if _holds_images(field.type)]

    def batches(self, columns: Sequence[str], first: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
        """Yields the rows from `first` up to, but not including, `stop` (None: to the end), a few at a time.

        Raises:
            ValueError: the file is broken within these rows.
        """
        stop = self.num_rows if stop is None else min(stop, self.num_rows)
        if self._table is not None:
            part = self._table.select(columns).slice(first, max(stop - first, 0))
            yield from part.to_batches(max_chunksize=ROWS_AT_ONCE)
            return
        groups = [i for i, end in enumerate(self._ends) if end > first and self._start(i) < stop]
        row = self._start(groups[0]) if groups else stop
        try:
            for batch in self._file.iter_batches(ROWS_AT_ONCE, groups, columns, use_threads=False):
                wanted = batch.slice(max(first - row, 0), max(min(stop, row + len(batch)) - max(first, row), 0))
                if len(wanted):
                    yield wanted
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}: broken ({str(error).splitlines()[0][:300]})") from error

    def rows(self, image_column: str, columns: Sequence[str]) -> Iterator[dict]:
        """Yields each row as a dict of column -> value; the bytes of its image are replaced by `_HELD`."""
        for batch in self.batches([image_column, *columns]):
            values = {name: batch.column(name) for name in columns}
            yield from pa.table({image_column: _without_bytes(batch.column(image_column))} | values).to_pylist()

    def _start(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0


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
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def choose_image_column(path: Path, names: Sequence[str], embedded: Sequence[str], wanted: str) -> str | None:
    """Chooses the image column of a table.

    Args:
        path: the table, for messages.
        names: all its columns.
        embedded: the columns that hold images themselves.
        wanted: the column that --csv-img-key names.

    Returns:
        `wanted` if the table has it, else the only column that holds images; None if no column holds images.

    Raises:
        ValueError: several columns hold images, and the flag names none of them.
    """
    if wanted in names:
        return wanted
    if len(embedded) > 1:
        raise ValueError(f"{path}: several columns hold images: {', '.join(embedded)}; name one with --csv-img-key")
    return embedded[0] if embedded else None


def image_bytes(value: object) -> bytes | None:
    """Returns the bytes of the image file in a cell; None if the cell holds none."""
    return (value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None) or None


def read_image(path: Path, column: str, row: int) -> bytes:
    """Returns the bytes of the image file in a cell of a Parquet or Arrow file; empty if the cell holds none."""
    start = row - row % ROWS_AT_ONCE
    return image_bytes(_stretch(path, column, start)[row - start].as_py()) or b""


def _without_bytes(column: pa.Array) -> pa.Array:
    """Replaces the images by `_HELD`, to avoid copying them."""
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        held = pc.struct_field(column, "bytes")
        names = [field.name for field in kind if field.name in ("bytes", "path")]
        parts = [_marks(held) if name == "bytes" else pc.struct_field(column, name) for name in names]
        return pa.StructArray.from_arrays(parts, names)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _marks(column)
    return column


def _marks(column: pa.Array) -> pa.Array:
    there = pc.fill_null(pc.greater(pc.binary_length(column), 0), False)
    return pc.if_else(there, pa.scalar(_HELD, pa.binary()), pa.scalar(None, pa.binary()))


@lru_cache(maxsize=4)
def _opened(path: Path) -> ColumnarFile:
    return ColumnarFile(path)


@lru_cache(maxsize=4)  # images are read in order, so the next one is nearly always among the same rows
def _stretch(path: Path, column: str, start: int) -> pa.Array:
    batches = list(_opened(path).batches([column], start, start + ROWS_AT_ONCE))
    return pa.chunked_array([batch.column(0) for batch in batches])
