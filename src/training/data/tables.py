"""Tables of image paths and captions as a source of samples; the rows stay compact and are shared with workers.

Tables that hold the images themselves, as data sets on the Hugging Face hub do, are read like shards, file by file.
"""

import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path

from training.data.order import permuted
from training.readers.columnar import ColumnarFile, may_hold_text
from training.readers.faults import BadSample
from training.readers.files import parallel_map
from training.readers.samples import BrokenShardError, Part, RawSample
from training.readers.table_files import COLUMNAR, check_image_path, names_tables, table_files
from training.readers.tables import Rows, caption_columns, choose_image_column, open_table, row_sample

_LOOKED_AT = 256  # rows in which images that occur twice are looked for
logger = logging.getLogger(__name__)
ROWS_PER_PART = 10_000
CAPTION_FLAGS = "--raw-caption-keys, --short-caption-keys, --long-caption-keys"


class TableSource:
    """Rows of tables, each once per epoch, in an order that differs between epochs.

    Args:
        tables: (path, its image column, its rows); a row is a dict of column -> value.
        seed: seed of the order.
    """

    def __init__(self, tables: Sequence[tuple[Path, str, Rows]], seed: int):
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


def embedded_sources(spec: str, image_column: str | None) -> list[list[str]] | None:
    """Returns the files of each source if the flag names tables with images inside; None if it names anything else.

    Args:
        spec: value of ``--train-data``.
        image_column: value of ``--csv-img-key``.

    Returns:
        For each source its files, as ``FILE`` or, if several columns hold images, ``FILE#COLUMN``.

    Raises:
        FileNotFoundError, ValueError: `table_files` raised it, or only some of the sources are tables with images.
    """
    if not names_tables(spec):
        return None
    sources = [table_files(name) if names_tables(name) else [] for name in spec.split("::")]
    paths = [path for source in sources for path in source]
    found = zip(paths, parallel_map(lambda path: _name(path, image_column), paths))
    names = {path: name for path, name in found if name}
    if not names:
        return None
    if len(names) < len(paths) or not all(sources):
        other = next((str(path) for path in paths if path not in names), "tar shards")
        raise ValueError(f"{spec}: {other} beside tables that hold the images themselves; train on one kind of data")
    return [[names[path] for path in source] for source in sources]


def _name(path: Path, image_column: str | None) -> str | None:
    """Returns the name under which a table with images inside is read; None for any other table."""
    table = ColumnarFile(path) if path.suffix in COLUMNAR else None
    columns = table.image_columns if table else []
    chosen = choose_image_column(table, image_column) if table and columns else None
    if chosen not in columns:
        return None
    return str(path) if len(columns) == 1 else f"{path}#{chosen}"


def is_table(url: str) -> bool:
    """Returns whether a name is that of a file of features, or one from `embedded_sources`."""
    return url.partition("#")[0].endswith(COLUMNAR) or url.endswith(COLUMNAR)


def _path_and_column(url: str) -> tuple[str, str]:
    path, _, column = (url, "", "") if os.path.exists(url) else url.rpartition("#")
    return path, column


def count_rows(url: str) -> int:
    """Returns the number of samples of a table or a file of features."""
    return ColumnarFile(_path_and_column(url)[0]).num_rows


def warn_of_repeated_images(url: str) -> None:
    """Logs a warning if several of a table's first rows hold the same image."""
    counts = Counter(row.image for row in read_rows(url, 0, _LOOKED_AT))
    repeated = sum(counts.values()) - len(counts)
    if repeated:
        logger.warning(
            f"{url}: {repeated:,} of the first {counts.total():,} rows hold the image of an earlier row; each row is a "
            "sample of its own, and in a batch the same image counts as different ones. Put its captions into one row, "
            "as a list"
        )


def read_rows(url: str, first: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Reads rows of a table as samples; a sample's record holds the columns of texts.

    Args:
        url: a name from `embedded_sources`.
        first, stop: the first row, from 0, and the row before which to stop; None reads to the end.

    Raises:
        BrokenShardError: the file can't be opened, or is broken; the rows before the break have been yielded.
    """
    try:
        path, image = _path_and_column(url)
        file = ColumnarFile(path)
        image = image or choose_image_column(file, None)
        texts = [f.name for f in file.schema if f.name not in file.image_columns and may_hold_text(f.type)]
        for row in file.rows([image, *texts], first, stop):
            yield row_sample(file.path, first, row, image)
            first += 1
    except (ValueError, OSError) as error:
        raise BrokenShardError(f"{url}: {error}") from error
