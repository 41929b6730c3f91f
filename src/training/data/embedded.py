"""Tables that hold the images themselves, as data sets on the Hugging Face hub do; each file is read like a shard."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from training.readers.columnar import ColumnarFile, choose_image_column, image_bytes
from training.readers.samples import BrokenShardError, RawSample
from training.readers.table_files import COLUMNAR, names_tables, table_files

_PREFERRED = "image"  # the column to use if several hold images


def embedded_sources(spec: str, image_column: str) -> list[list[str]] | None:
    """Returns the files of each source if the flag names tables with images inside; None if it names anything else.

    Args:
        spec: value of ``--train-data``.
        image_column: value of ``--csv-img-key``.

    Raises:
        FileNotFoundError, ValueError: `table_files` raised it, or only some of the sources are tables with images.
    """
    if not names_tables(spec):
        return None
    sources = [table_files(part) if names_tables(part) else [] for part in spec.split("::")]
    inside = {path: holds_images(path, image_column) for source in sources for path in source}
    if not any(inside.values()):
        return None
    if not all(inside.values()) or not all(sources):
        other = next((str(path) for path, own in inside.items() if not own), "tar shards")
        raise ValueError(f"{spec}: {other} beside tables that hold the images themselves; train on one kind of data")
    return [[str(path) for path in source] for source in sources]


def holds_images(path: Path, image_column: str) -> bool:
    """Tells whether the image column of a table holds images rather than paths.

    Raises:
        ValueError: the file is not a table, or it has several columns of images and `image_column` is not the one that
            `read_rows` uses.
    """
    if path.suffix not in COLUMNAR:
        return False
    file = ColumnarFile(path)
    chosen = choose_image_column(path, file.names, file.image_columns, image_column)
    if chosen not in file.image_columns:
        return False
    if len(file.image_columns) > 1 and chosen != _PREFERRED:
        raise ValueError(
            f"{path}: several columns hold images ({', '.join(file.image_columns)}); training reads the one called "
            f"{_PREFERRED!r}: rename {chosen!r}, or remove the others"
        )
    return True


def count_rows(path: str) -> int:
    """Returns the number of samples of a table."""
    return ColumnarFile(path).num_rows


def read_rows(path: str, first: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Reads rows of a table as samples; a sample's record holds the columns of texts.

    Args:
        path: ``.parquet`` or ``.arrow``.
        first, stop: the first row, from 0, and the row before which to stop; None reads to the end.

    Raises:
        BrokenShardError: the file can't be opened, or is broken; the rows before the break have been yielded.
    """
    try:
        file = ColumnarFile(path)
        image = choose_image_column(Path(path), file.names, file.image_columns, _PREFERRED)
        texts = [field.name for field in file.schema if field.name != image and _holds_text(field.type)]
        for batch in file.batches([image, *texts], first, stop):
            for row in batch.to_pylist():
                yield _sample(Path(path), first, row.pop(image), row)
                first += 1
    except (ValueError, OSError) as error:
        raise BrokenShardError(f"{path}: {error}") from error


def _sample(path: Path, number: int, image: object, record: dict) -> RawSample:
    content = image_bytes(image)
    beside = image.get("path") if isinstance(image, dict) and not content else None
    files = {"jpg": content} if content else {}
    return RawSample(str(number), path.name, files, record, str(path.parent / beside) if beside else None)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
