"""Tables of image paths and captions: CSV, TSV or Parquet, held as Arrow columns (compact, and shared with workers)."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from training.data.permutation import permuted
from training.data.tar import Part, RawSample

ROWS_PER_PART = 10_000


class TableSource:
    """Rows of a table, each once an epoch in an order drawn anew.

    Args:
        table: the image column and caption columns.
        image_column: its name.
        folder: relative image paths start there.
        name: of the table, for messages.
        seed: of the order.
    """

    def __init__(self, table: pa.Table, image_column: str, folder: str, name: str, seed: int):
        self.captions = {c: table.column(c) for c in table.column_names if c != image_column}
        self.paths, self.folder, self.name, self.seed = table.column(image_column), folder, name, seed
        self.num_samples = table.num_rows

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        """As `sources.Source.read`."""
        return self._rows(permuted(self.num_samples, f"{self.seed}/{epoch}/rows", start + skip, stop))

    def _rows(self, numbers: Iterable[int]) -> Iterator[RawSample]:
        for row in numbers:
            record = {column: values[row].as_py() for column, values in self.captions.items()}
            path = os.path.join(self.folder, self.paths[row].as_py() or "")
            yield RawSample(str(row), self.name, {}, record, path)

    def parts(self) -> list[Part]:
        """Stretches of the table, in its own order."""
        starts = range(0, self.num_samples, ROWS_PER_PART)
        ranges = [range(start, min(start + ROWS_PER_PART, self.num_samples)) for start in starts]
        return [Part(self.name, len(rows), partial(self._rows, rows)) for rows in ranges]

    def fingerprint(self) -> str:
        """As `sources.Source.fingerprint`."""
        ends = [self.paths[row].as_py() for row in (0, -1)] if self.num_samples else []
        return f"table 2 of {self.num_samples} rows, {ends}, seed {self.seed}"


def read_table(
    path: str, image_column: str, caption_columns: Sequence[str], separator: str | None, seed: int
) -> TableSource:
    """Reads the columns of a table that training needs.

    Rows of a CSV with too few or too many fields are left out and counted in a warning.

    Args:
        path: ``.csv``, ``.tsv`` or ``.parquet``.
        image_column: image paths, absolute or relative to the table's folder.
        caption_columns: those that are there are read.
        separator: of a CSV; None takes a comma, in ``.tsv`` a tab.
        seed: of the order.

    Raises:
        FileNotFoundError, ValueError: no such file or column, none of the caption columns, or not a table.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.endswith(".parquet"):
            columns = pq.read_schema(path).names
            wanted = _wanted_columns(path, columns, image_column, caption_columns)
            table = pq.read_table(path, columns=wanted)
        else:
            separator = separator or ("\t" if path.endswith(".tsv") else ",")
            with pacsv.open_csv(path, parse_options=_parse_options(separator, lambda row: "skip")) as reader:
                columns = reader.schema.names
            wanted = _wanted_columns(path, columns, image_column, caption_columns)
            table = _read_csv(path, separator, wanted)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable table ({str(error).splitlines()[0][:300]})") from error
    return TableSource(table, image_column, os.path.dirname(path), os.path.basename(path), seed)


def _wanted_columns(path: str, columns: list[str], image_column: str, caption_columns: Sequence[str]) -> list[str]:
    found = [column for column in caption_columns if column in columns]
    if image_column in columns and found:
        return [image_column, *found]
    lacking = "any caption column" if image_column in columns else f"the image column --csv-img-key {image_column}"
    raise ValueError(
        f"{path}: {lacking} is not among its columns ({', '.join(columns)}); captions are looked for in "
        f"{', '.join(caption_columns)} (--raw-caption-keys, --short-caption-keys, --long-caption-keys)"
    )


def _parse_options(separator: str, on_malformed: Callable) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=on_malformed)


def _read_csv(path: str, separator: str, wanted: list[str]) -> pa.Table:
    malformed = []

    def skip(row: pacsv.InvalidRow) -> str:
        malformed.append(row.number)
        return "skip"

    table = pacsv.read_csv(
        path,
        parse_options=_parse_options(separator, skip),
        convert_options=pacsv.ConvertOptions(
            include_columns=wanted, column_types={c: pa.large_string() for c in wanted}
        ),
    )
    if malformed:
        logging.warning(f"{path}: {len(malformed):,} rows left out, with too few or too many fields")
    return table
