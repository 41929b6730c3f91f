"""Tables that hold the images themselves, as data sets on the Hugging Face hub do; each file is read like a shard."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from training.readers.columnar import ColumnarFile, image_bytes, may_hold_text
from training.readers.files import parallel_map
from training.readers.samples import BrokenShardError, RawSample
from training.readers.table_files import COLUMNAR, beside, names_tables, table_files
from training.readers.tables import choose_image_column

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
    sources = [table_files(part) if names_tables(part) else [] for part in spec.split("::")]
    paths = [path for source in sources for path in source]
    inside = dict(zip(paths, parallel_map(lambda path: _inside(path, image_column), paths)))
    if not any(inside.values()):
        return None
    if not all(inside.values()) or not all(sources):
        other = next((str(path) for path, own in inside.items() if not own), "tar shards")
        raise ValueError(f"{spec}: {other} beside tables that hold the images themselves; train on one kind of data")
    return [[inside[path] for path in source] for source in sources]


def _inside(path: Path, image_column: str | None) -> str | None:
    """Returns the name under which a table with images inside is read; None for any other table."""
    if path.suffix not in COLUMNAR:
        return None
    file = ColumnarFile(path)
    columns = file.image_columns
    chosen = choose_image_column(file, image_column) if columns else None
    if chosen not in columns:
        return None
    return str(path) if len(columns) == 1 else f"{path}#{chosen}"


def is_table(url: str) -> bool:
    """Returns whether one of the names from `embedded_sources` is that of a table."""
    return url.partition("#")[0].endswith(COLUMNAR) or url.endswith(COLUMNAR)


def _open(url: str) -> tuple[ColumnarFile, str]:
    path, _, column = (url, "", "") if os.path.exists(url) else url.rpartition("#")
    file = ColumnarFile(path)
    return file, column or choose_image_column(file, None)


def count_rows(url: str) -> int:
    """Returns the number of samples of a table."""
    return _open(url)[0].num_rows


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
        file, image = _open(url)
        texts = [field.name for field in file.schema if field.name not in file.image_columns]
        texts = [name for name in texts if may_hold_text(file.schema.field(name).type)]
        for row in file.rows([image, *texts], first, stop):
            yield _sample(file.path, first, row.pop(image), row)
            first += 1
    except (ValueError, OSError) as error:
        raise BrokenShardError(f"{url}: {error}") from error


def _sample(path: Path, number: int, image: object, record: dict) -> RawSample:
    content = image_bytes(image)
    outside = image.get("path") if isinstance(image, dict) and not content else None
    files = {"jpg": content} if content else {}
    return RawSample(str(number), path.name, files, record, beside(path, outside) if outside else None)
