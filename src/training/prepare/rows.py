"""Rows of tables of any kind and size, one after another, as all commands read them."""

import logging
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

from training.readers.captions import caption_texts
from training.readers.columnar import ColumnarFile
from training.readers.csv_rows import CsvRecords, open_csv
from training.readers.faults import BadSample
from training.readers.tables import open_table

_LOOKED_AT = 1 << 24  # bytes of a CSV by which its form is chosen
Row = tuple[Sequence | None, bool]  # (cells, or None if they can't be read; whether it was read as Windows-1252)


class TableRows:
    """A table whose rows are read once, in order; it may be larger than the memory.

    Args:
        path: the table, or a folder of images with captions beside them.
        separator: see `open_csv`.
        plain_quotes: quotes are ordinary characters.

    Attributes:
        names: the columns.
        image_columns: those that hold the images themselves.
        form: how a CSV is written; None for other files.

    Raises:
        ValueError: the file is not a table of the kind that its name says.
    """

    def __init__(self, path: Path, separator: str | None = None, plain_quotes: bool = False):
        self.path, self.form, self.image_columns = path, None, ()
        if path.suffix in (".csv", ".tsv"):
            records = open_csv(path, separator, _LOOKED_AT)
            self.records = CsvRecords(path, records.form._replace(quoted=False)) if plain_quotes else records
            self.form, self.names = self.records.form, self.records.names
        else:
            self.table = open_table(path)
            self.names, self.image_columns = list(self.table.names), self.table.image_columns

    def read(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yields each row as its cells in the given columns; a row that can't be read is yielded, too."""
        if self.form:
            indices = [self.names.index(name) for name in columns]
            for record in self.records.read():
                yield record.cells and [record.cells[index] for index in indices], record.repaired
        elif isinstance(self.table, ColumnarFile):
            yield from _columnar_rows(self.table, columns)
        else:
            rows = self.table.load(columns)
            for number in range(len(rows)):
                try:
                    row = rows[number]
                    yield [row.get(name) for name in columns], False
                except BadSample:
                    yield None, False


def _columnar_rows(table: ColumnarFile, columns: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a Parquet or Arrow file; those of a damaged row group as rows that can't be read."""
    row = 0
    for group, stop in enumerate(table.group_ends):
        try:
            for batch in table.batches(columns, row, stop):
                cells = zip(*(batch.column(name).to_pylist() for name in columns))
                yield from zip(cells, repeat(False))
                row += len(batch)
        except ValueError as error:
            logging.warning(f"{table.path}: row group {group} is damaged, {stop - row:,} rows lost ({error})")
            yield from repeat((None, False), stop - row)
        row = stop


def cell_name(value: object) -> str:
    """Returns the URL or key in a cell; an empty text if it holds none."""
    return "" if value is None or isinstance(value, float) else as_utf8(str(value).strip())


def as_utf8(text: str) -> str:
    """Returns a text that can be written: JSON may contain half a surrogate pair, which becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def cell_texts(value: object, lists: str) -> list[str]:
    """Returns the captions in a cell, which can be written as UTF-8; none if it holds something else than captions."""
    try:
        return [as_utf8(text) for text in caption_texts(value, lists=lists)]
    except ValueError:
        return []
