"""Finds the rows of large caption tables that belong to given samples.

For each table, an array of hashes is written once, beside the new shards. A pass over it finds the wanted rows, and
only row groups with such rows are read.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.prepare.shards.files import content_mark
from training.prepare.tables.chunk import url_hash
from training.prepare.tables.columns import KEY, URL
from training.prepare.tables.records import cell_text
from training.readers.files import IMAGE_SUFFIXES
from training.readers.table_files import table_files
from training.readers.tables import load_rows, open_table
from training.runtime.files import atomic_write
from training.runtime.messages import first_line

# Text columns that are never captions.
NOT_CAPTIONS = (URL, KEY, "status", "error_message", "exif", "sha256", "md5", "url_hash")


@dataclass(frozen=True)
class CaptionTables:
    """Parquet tables in order.

    Attributes:
        paths: the files.
        match: the column that identifies the sample of a row.
        columns: the caption columns to use.
        index: folder for the hashes.
        by_name: the column holds names of images, which `image_names` compares.
    """

    paths: tuple[Path, ...]
    match: str
    columns: tuple[str, ...]
    index: Path
    by_name: bool

    def describe(self) -> dict:
        """Returns the properties of the tables that the result depends on."""
        files = [[path.name, path.stat().st_size] for path in self.paths]
        return {"tables": files, "match": self.match, "columns": list(self.columns)}

    @property
    def num_rows(self) -> int:
        """Number of rows of all tables."""
        return sum(pq.read_metadata(path).num_rows for path in self.paths)


def open_tables(
    names: Sequence[str], match: str, columns: Sequence[str] | None, index: Path, by_name: bool = False
) -> CaptionTables:
    """Opens caption tables.

    Args:
        names: see `table_files`; other files than Parquet are converted once, in `index`.
        match: the column to match by.
        columns: the caption columns to use; None means all columns of text.
        index: folder for the hashes.
        by_name: see `CaptionTables`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, not Parquet, or lacks one of the columns.
    """
    paths = [_as_parquet(path, match, index) for name in names for path in table_files(name)]
    found: list[str] = []
    for path in paths:
        try:
            schema = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({first_line(error)})") from error
        lacking = [name for name in (match, *(columns or ())) if name not in schema.names]
        if lacking:
            raise ValueError(
                f"{path}: no column {lacking[0]}; it has {', '.join(schema.names)} (--match, --key-column, --columns)"
            )
        found += [field.name for field in schema if _is_text(field.type) and field.name not in (*NOT_CAPTIONS, match)]
    chosen = tuple(columns or dict.fromkeys(found))
    if not chosen:
        raise ValueError(f"{paths[0]}: no columns of text beside {match}; name them with --columns")
    return CaptionTables(tuple(paths), match, chosen, index, by_name)


def _as_parquet(path: Path, match: str, index: Path) -> Path:
    if path.suffix == ".parquet":
        return path
    table = open_table(path)
    if match not in table.names:
        raise ValueError(f"{path}: no column {match}; it has {', '.join(table.names)} (--match, --key-column)")
    target = index / f"{path.stem}-{url_hash(f'{path.resolve()} {content_mark(path)}'):016x}.parquet"
    if not target.exists():
        rows = load_rows(table, table.names)
        with atomic_write(target) as temporary:
            pq.write_table(pa.Table.from_pylist([dict(rows[number]) for number in range(len(rows))]), temporary)
    return target


def image_names(name: str) -> list[str]:
    """Returns what identifies an image in a table, without its suffix: ``photos/1.jpg`` -> ``photos/1``, ``*/1``.

    The last one matches a sample in no folder, such as ``1`` in a tar of the folder's content.
    """
    name = name.strip().removeprefix("./")
    stem, stop, suffix = name.rpartition(".")
    whole = stem if stop and suffix.lower() in IMAGE_SUFFIXES else name
    return [whole, f"*/{whole.rpartition('/')[2]}"] if "/" in whole else [whole]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def make_index(job: tuple[CaptionTables, int]) -> None:
    """Writes the hashes of one table's rows, unless the file exists. The argument is (tables, number of the table)."""
    tables, number = job
    target = _index_file(tables, number)
    if target.exists():
        return
    with pq.ParquetFile(tables.paths[number]) as file:
        hashes = np.zeros((2, file.metadata.num_rows), dtype=np.uint64)
        row = 0
        for batch in file.iter_batches(10_000, columns=[tables.match], use_threads=False):
            for value in batch.column(0).to_pylist():
                for place, name in enumerate(_names(tables, value)):
                    hashes[place, row] = url_hash(name)
                row += 1
    with atomic_write(target) as path, open(path, "wb") as file:
        np.save(file, hashes)


def _names(tables: CaptionTables, value: object) -> list[str]:
    if value is None or isinstance(value, float):
        return []
    return image_names(str(value)) if tables.by_name else [str(value).strip()]


def _index_file(tables: CaptionTables, number: int) -> Path:
    path = tables.paths[number]
    where = url_hash(
        f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns} {tables.match} {tables.by_name}"
    )
    return tables.index / f"{path.stem}-{where:016x}.npy"


def find_rows(tables: CaptionTables, values: set[str]) -> tuple[dict[str, int], pa.Table]:
    """Finds the rows with given values in the match column.

    Args:
        tables: the tables, for each of which `make_index` was called.
        values: URLs or keys.

    Returns:
        (value -> row in the returned table, the captions of these rows). If several rows have the same value, the first
        one is used; but ``*/1`` is left out if it stands for images of several folders.

    Raises:
        OSError: a table can't be read.
    """
    wanted = np.unique(np.array([url_hash(value) for value in values], dtype=np.uint64))
    schema = pa.schema([(name, pa.large_string()) for name in (tables.match, *tables.columns)])
    taken = [schema.empty_table()]
    for number in range(len(tables.paths)):
        hashes = np.load(_index_file(tables, number))
        rows = np.flatnonzero(np.isin(hashes, wanted).any(axis=0))
        if len(rows):
            try:
                taken.append(_take_rows(tables, number, rows, schema))
            except (pa.ArrowException, OSError) as error:
                raise OSError(
                    f"{tables.paths[number]}: can't be read ({first_line(error)}); make or fetch it again"
                ) from error
    table = pa.concat_tables(taken)
    found: dict[str, int] = {}
    owners: dict[str, set[str]] = {}
    for row, value in enumerate(table.column(tables.match).to_pylist()):
        names = _names(tables, value)
        for name in names:
            if name in values:  # two values may share a hash
                found.setdefault(name, row)
                owners.setdefault(name, set()).add(names[0])
    found = {name: row for name, row in found.items() if len(owners[name]) == 1}
    logging.debug(f"{len(found):,} of {len(values):,} values found")
    return found, table.select(list(tables.columns))


def _take_rows(tables: CaptionTables, number: int, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Reads some rows of one table, row group by row group."""
    parts = []
    with pq.ParquetFile(tables.paths[number]) as file:
        names = [name for name in schema.names if name in file.schema_arrow.names]
        start = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            inside = rows[(rows >= start) & (rows < start + size)] - start
            start += size
            if len(inside):
                part = file.read_row_group(group, columns=names).take(pa.array(inside))
                parts.append(_as_text(part, schema, tables.match))
    return pa.concat_tables(parts)


def _as_text(table: pa.Table, schema: pa.Schema, match: str) -> pa.Table:
    """Converts a table to the common schema; lists of sentences become texts, missing columns become null."""
    columns = []
    for name in schema.names:
        if name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, pa.large_string()))
        elif pa.types.is_nested(table.schema.field(name).type):
            columns.append(
                pa.array([cell_text(v, "sentences") for v in table.column(name).to_pylist()], pa.large_string())
            )
        else:
            columns.append(table.column(name).cast(pa.large_string()))
    made = pa.table(columns, schema=schema)
    stripped = pa.array([(v or "").strip() for v in made.column(match).to_pylist()], pa.large_string())
    return made.set_column(0, match, stripped)
