"""Tables of image paths and captions: CSV, TSV or Parquet, kept as Arrow columns (compact, and shared with workers).

Tables that hold the images themselves are read like shards: see embedded.py.
"""

import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from training.data.permutation import permuted
from training.readers.columnar import ColumnarFile
from training.readers.csv_rows import BadRows, CsvForm, CsvRecords, choose_form, default_separator
from training.readers.samples import Part, RawSample
from training.readers.table_files import COLUMNAR, check_image_path

ROWS_PER_PART = 10_000
ROWS_AT_ONCE = 50_000  # rows of a CSV that are collected before they are converted to Arrow's compact form
logger = logging.getLogger(__name__)


class TableSource:
    """Rows of tables, each once per epoch, in an order that differs between epochs.

    Args:
        tables: (path, its image column and caption columns); all tables have the same columns.
        image_column: name of the image column.
        seed: seed of the order.
    """

    def __init__(self, tables: Sequence[tuple[str, pa.Table]], image_column: str, seed: int):
        self.files = [path for path, _ in tables]
        self.starts = [0]
        for _, table in tables[:-1]:
            self.starts.append(self.starts[-1] + table.num_rows)
        table = pa.concat_tables([table for _, table in tables], promote_options="permissive")
        self.captions = {c: table.column(c) for c in table.column_names if c != image_column}
        self.paths, self.seed = table.column(image_column), seed
        self.num_samples = table.num_rows

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        """Yields samples of an epoch; see `Source.read`."""
        return self._rows(permuted(self.num_samples, f"{self.seed}/{epoch}/rows", start + skip, stop))

    def _rows(self, numbers: Iterable[int]) -> Iterator[RawSample]:
        for row in numbers:
            file = self.files[bisect_right(self.starts, row) - 1]
            record = {column: values[row].as_py() for column, values in self.captions.items()}
            path = os.path.join(os.path.dirname(file), self.paths[row].as_py() or "")
            yield RawSample(str(row), os.path.basename(file), {}, record, path)

    def parts(self) -> list[Part]:
        """Returns the tables as parts of up to `ROWS_PER_PART` rows, in file order."""
        parts = []
        for file, first, end in zip(self.files, self.starts, [*self.starts[1:], self.num_samples]):
            for start in range(first, end, ROWS_PER_PART):
                rows = range(start, min(start + ROWS_PER_PART, end))
                parts.append(Part(os.path.basename(file), len(rows), partial(self._rows, rows)))
        return parts

    def fingerprint(self) -> str:
        """Returns a text that identifies data and order; see `Source.fingerprint`."""
        ends = [self.paths[row].as_py() for row in (0, -1)] if self.num_samples else []
        return f"table 2 of {self.num_samples} rows, {ends}, seed {self.seed}"


def read_tables(
    paths: Sequence[Path], image_column: str, caption_columns: Sequence[str], separator: str | None, seed: int
) -> TableSource:
    """Reads the columns of tables that training needs.

    Bad rows of a CSV are left out and counted in a warning, which names the first.

    Args:
        paths: ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` files.
        image_column: column of image paths, absolute or relative to the table's folder.
        caption_columns: columns of captions; those that a table lacks are ignored.
        separator: separator of a CSV; None means a comma, or a tab in ``.tsv``.
        seed: seed of the order.

    Raises:
        ValueError: a file is not a table, lacks the image column or all caption columns, its first image is not a
            path, or the tables have different columns.
    """
    tables = []
    for path in paths:
        if path.suffix in COLUMNAR:
            file = ColumnarFile(path)
            wanted = _wanted_columns(path, file.names, image_column, caption_columns)
            tables.append((str(path), pa.Table.from_batches(list(file.batches(wanted)), _only(file.schema, wanted))))
        else:
            tables.append((str(path), _read_csv(path, separator, image_column, caption_columns)))
        first, last = tables[0], tables[-1]
        images = (image.as_py() for image in last[1].column(image_column))
        check_image_path(next(filter(None, images), None), f"{path}: row 1")
        if set(first[1].column_names) != set(last[1].column_names):
            raise ValueError(
                f"{path}: has the columns {', '.join(last[1].column_names)}, but {first[0]} has "
                f"{', '.join(first[1].column_names)}; train on tables with the same columns"
            )
    return TableSource(tables, image_column, seed)


def _only(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names])


def _wanted_columns(path: Path, columns: list[str], image_column: str, caption_columns: Sequence[str]) -> list[str]:
    found = [column for column in dict.fromkeys(caption_columns) if column in columns and column != image_column]
    if image_column in columns and found:
        return [image_column, *found]
    lacking = "any caption column" if image_column in columns else f"the image column --csv-img-key {image_column}"
    raise ValueError(
        f"{path}: {lacking} is not among its columns ({', '.join(columns)}), which the first line of a CSV names; "
        f"captions are read from {', '.join(caption_columns)} "
        "(--raw-caption-keys, --short-caption-keys, --long-caption-keys)"
    )


def _read_csv(path: Path, separator: str | None, image_column: str, caption_columns: Sequence[str]) -> pa.Table:
    separator = separator or default_separator(path)
    header = CsvRecords(path, CsvForm(separator)).header()[0]
    wanted = _wanted_columns(path, header, image_column, caption_columns)
    table = _read_plain_csv(path, separator, wanted)
    return _read_rows(path, separator, wanted) if table is None else table


def _read_plain_csv(path: Path, separator: str, wanted: list[str]) -> pa.Table | None:
    """Reads a CSV with Arrow, several million rows per second; returns None unless every line is a good row."""
    try:
        table = pacsv.read_csv(
            path,
            parse_options=pacsv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                include_columns=wanted, column_types={c: pa.large_string() for c in wanted}
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError):  # bad rows, not UTF-8, or a header that Arrow reads differently
        return None
    with open(path, "rb", buffering=1 << 20) as file:
        num_lines, last = 0, b""
        for line in file:
            if not line.isspace():
                num_lines, last = num_lines + 1, line
    # Otherwise a quoted cell has swallowed lines, or the last quote is never closed.
    return table if table.num_rows == num_lines - 1 and last.count(b'"') % 2 == 0 else None


def _read_rows(path: Path, separator: str, wanted: list[str]) -> pa.Table:
    """Reads a CSV row by row; bad rows are counted and left out."""
    form, header = choose_form(path, separator)
    if not form.quoted:
        logger.warning(f"{path}: no cell is quoted as a whole, so quotation marks are read as plain characters")
    bad, places = BadRows(path, form, header), [header.index(name) for name in wanted]
    schema = pa.schema([(name, pa.large_string()) for name in wanted])
    batches, columns, repaired = [], [[] for _ in wanted], 0

    def flush() -> None:
        batches.append(pa.RecordBatch.from_arrays([pa.array(c, pa.large_string()) for c in columns], schema=schema))
        for column in columns:
            column.clear()

    records = CsvRecords(path, form, len(header))
    for record in records.read(records.header()[1]):
        if record.cells is None:
            bad.add(record)
            continue
        repaired += record.repaired
        for column, place in zip(columns, places):
            column.append(record.cells[place])
        if len(columns[0]) == ROWS_AT_ONCE:
            flush()
    flush()
    table = pa.Table.from_batches(batches)
    if bad.count:
        total = bad.count + table.num_rows
        logger.warning(f"{path}: {bad.count:,} of {total:,} rows left out: {bad.describe()}")
    if repaired:
        logger.warning(f"{path}: {repaired:,} rows are not UTF-8, and are read as Windows-1252")
    return table
