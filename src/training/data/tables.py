"""Tables of image paths and captions as a source of samples; the rows stay compact and are shared with workers.

Tables that hold the images themselves are read like shards: see embedded.py.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path

from training.data.permutation import permuted
from training.readers.faults import BadSample
from training.readers.samples import Part, RawSample
from training.readers.table_files import check_image_path
from training.readers.tables import caption_columns, choose_image_column, open_table, row_sample

ROWS_PER_PART = 10_000
CAPTION_FLAGS = "--raw-caption-keys, --short-caption-keys, --long-caption-keys"


class TableSource:
    """Rows of tables, each once per epoch, in an order that differs between epochs.

    Args:
        tables: (path, its image column, its rows); a row is a dict of column -> value.
        seed: seed of the order.
    """

    def __init__(self, tables: Sequence[tuple[Path, str, Sequence[dict]]], seed: int):
        self.tables, self.seed = tables, seed
        *self.starts, self.num_samples = accumulate((len(rows) for _, _, rows in tables), initial=0)
        self.num_left_out = sum(rows.num_left_out for _, _, rows in tables)

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        """Yields samples of an epoch; see `Source.read`."""
        return self._rows(permuted(self.num_samples, f"{self.seed}/{epoch}/rows", start + skip, stop))

    def _rows(self, numbers: Iterable[int]) -> Iterator[RawSample]:
        for number in numbers:
            table = bisect_right(self.starts, number) - 1
            file, image_column, rows = self.tables[table]
            try:
                yield row_sample(file, number, rows[number - self.starts[table]], image_column)
            except BadSample as error:
                yield RawSample(str(number), file.name, {}, {}, fault=error.kind)

    def parts(self) -> list[Part]:
        """Returns the tables as parts of up to `ROWS_PER_PART` rows, in file order."""
        parts = []
        for (file, _, _), first, end in zip(self.tables, self.starts, [*self.starts[1:], self.num_samples]):
            for start in range(first, end, ROWS_PER_PART):
                rows = range(start, min(start + ROWS_PER_PART, end))
                parts.append(Part(file.name, len(rows), partial(self._rows, rows)))
        return parts

    def fingerprint(self) -> str:
        """Returns a text that identifies data and order; see `Source.fingerprint`."""
        ends = [os.path.basename(row.image_path or "") for row in self._rows([0, self.num_samples - 1])]
        return f"table 3 of {self.num_samples} rows, {ends}, seed {self.seed}"


def read_tables(
    paths: Sequence[Path], image_column: str | None, captions: Sequence[str], separator: str | None, seed: int
) -> TableSource:
    """Reads the columns of tables that training needs.

    Bad rows of a CSV are left out and counted in a warning, which names the first.

    Args:
        paths: tables, or folders of images; see `open_table`.
        image_column: column of image paths, absolute or relative to the table's folder; see `choose_image_column`.
        captions: columns of captions; those that a table lacks are ignored.
        separator: separator of a CSV; see `open_csv`.
        seed: seed of the order.

    Raises:
        ValueError: a file is not a table, lacks the image column or all caption columns, its first image is not a
            path, or the tables have different columns.
    """
    tables, first = [], None
    for path in paths:
        table = open_table(path, separator)
        image = choose_image_column(table, image_column)
        columns = [image, *caption_columns(table, image, captions, CAPTION_FLAGS)]
        first = first or (path, columns)
        if set(columns) != set(first[1]):
            raise ValueError(
                f"{path}: has the columns {', '.join(columns)}, but {first[0]} has {', '.join(first[1])}; train on "
                "tables with the same columns"
            )
        rows = table.load(columns)
        for number in range(min(len(rows), 100)):
            with suppress(BadSample):  # counted in training
                check_image_path(rows[number].get(image), f"{path}: row {number + 1}")
        tables.append((path, image, rows))
    return TableSource(tables, seed)
