"""Tables that hold the images themselves, as data sets on the Hugging Face hub do; each file is read like a shard."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from training.readers.columnar import ColumnarFile, may_hold_text
from training.readers.files import parallel_map
from training.readers.samples import BrokenShardError, RawSample
from training.readers.table_files import COLUMNAR, names_tables, table_files
from training.readers.tables import choose_image_column, row_sample

_LOOKED_AT = 256  # rows in which images that occur twice are looked for
logger = logging.getLogger(__name__)


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
    names = dict(zip(paths, parallel_map(lambda path: _name(path, image_column), paths)))
    if not any(names.values()):
        return None
    if not all(names.values()) or not all(sources):
        other = next((str(path) for path, name in names.items() if not name), "tar shards")
        raise ValueError(f"{spec}: {other} beside tables that hold the images themselves; train on one kind of data")
    return [[names[path] for path in source] for source in sources]


def _name(path: Path, image_column: str | None) -> str | None:
    """Returns the name under which a table with images inside is read; None for any other table."""
    table = ColumnarFile(path) if path.suffix in COLUMNAR else None
    columns = table.image_columns if table else []
    chosen = choose_image_column(table, image_column) if columns else None
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
