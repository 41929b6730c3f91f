"""The table reader of training and evaluation: CSV, TSV, JSON, JSON lines, Parquet, Arrow and folders of images."""

import json
import logging
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from training.readers.captions import read_record
from training.readers.columnar import ArrowRows, ColumnarFile, Row, image_bytes, may_hold_text
from training.readers.csv_rows import CsvRecords, line_number, open_csv
from training.readers.faults import BadSample, refuse_pointer
from training.readers.files import read_json
from training.readers.samples import RawSample
from training.readers.table_files import COLUMNAR, beside, image_files

# Names of a column of image paths, of which the first is open_clip's default.
PATH_NAMES = ("filepath", "file_name", "image", "image_path", "img_path", "path", "filename")
ROWS_AT_ONCE = 50_000  # rows of a CSV that are collected before they are converted to Arrow's compact form
logger = logging.getLogger(__name__)


class CsvFile(CsvRecords):
    """A CSV or TSV.

    Args:
        path: the file.
        separator: see `open_csv`.
        strict: for `load`, a bad row is an error; otherwise bad rows are left out with a warning.
        plain_quotes: quotes are ordinary characters.
        limit: see `open_csv`.

    Raises:
        ValueError: see `open_csv`.
    """

    image_columns = ()

    def __init__(self, path: Path, separator: str | None, strict: bool, plain_quotes: bool, limit: int | None):
        form = open_csv(path, separator, limit).form
        super().__init__(path, form._replace(quoted=False) if plain_quotes else form)
        self.strict = strict

    def stream(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yields all rows in order; see `Row`."""
        indices = list(map(self.names.index, columns))
        for record in self.read():
            yield record.cells and [record.cells[index] for index in indices], record.repaired

    def load(self, columns: Sequence[str]) -> ArrowRows:
        """Returns all good rows.

        Raises:
            ValueError: the reader is strict and a row is bad.
        """
        schema = pa.schema([(name, pa.large_string()) for name in columns])
        rows, indices = self.read(), list(map(self.names.index, columns))
        tables, bad, num_repaired = [schema.empty_table()], [], 0
        while some := list(islice(rows, ROWS_AT_ONCE)):
            good = [row.cells for row in some if row.cells]
            bad += [row for row in some if not row.cells]
            num_repaired += sum(row.repaired for row in some if row.cells)
            tables.append(pa.table([[cells[index] for cells in good] for index in indices], schema))
        table = pa.concat_tables(tables)
        if bad:
            line, number = line_number(self.path, bad[0].begin), f"{len(bad):,} bad row{'s' * (len(bad) > 1)} in all"
            found = f"line {line:,}: {bad[0].fault} ({number})"
            if self.strict:
                raise ValueError(
                    f"{self.path}: {found}; put cells that hold {self.form.separator!r} into double quotes, "
                    "and write a quotation mark inside one twice; --csv-separator names another separator"
                )
            total = len(bad) + table.num_rows
            logger.warning(f"{self.path}: {len(bad):,} of {total:,} rows left out: {found}")
        if num_repaired:
            logger.warning(f"{self.path}: {num_repaired:,} rows are not UTF-8, and are read as Windows-1252")
        return ArrowRows(table, len(bad))


class _LazyRows(ABC):
    """Rows that are read from disk when they are needed."""

    image_columns, num_left_out = (), 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> dict: ...

    def load(self, columns: Sequence[str]) -> Self:
        """Returns the rows."""
        return self

    def stream(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yields all rows in order; see `Row`."""
        for number in range(len(self)):
            try:
                row = self[number]
                yield [row.get(name) for name in columns], False
            except BadSample:
                yield None, False


class JsonFile(_LazyRows):
    """JSON lines, or a JSON list of objects; lines are parsed when they are needed, and the file stays on disk.

    Raises:
        ValueError: the file is neither.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            begins = file.read(100)
            refuse_pointer(begins, path)
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if begins else b""
        self.content: bytes | mmap.mmap = whole
        if begins.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" or not self._is_lines():
            self.content = b"\n".join(json.dumps(row).encode() for row in _json_list(path))
        ends = np.fromiter((line.end() for line in re.finditer(b"\n", self.content)), np.int64)
        edges = np.concatenate([[0], ends, [len(self.content)]])
        self.spans = np.stack([edges[:-1], edges[1:]], 1)[np.diff(edges) > 2]  # without blank lines
        self.names = _names(self, 1000)
        if not self.names:
            found = f"{min(len(self), 1000):,} lines" if len(self) else "an empty file"
            raise ValueError(f"{path}: {found} without a JSON object; expected one object per line, in UTF-8")

    def _is_lines(self) -> bool:
        end = self.content.find(b"\n") + 1 or len(self.content)
        try:
            first = json.loads(bytes(self.content[:end]))
        except (ValueError, RecursionError):
            return self.path.suffix == ".jsonl"
        # A .json of one line may be one row, or an object around the list of rows, as `json.dump` writes it.
        if not isinstance(first, dict) or self.path.suffix != ".json" or self.content[end : end + 100].strip():
            return isinstance(first, dict)
        lists = [value for value in first.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        holds_rows = any(not {"from", "role"} & value[0].keys() for value in lists)  # rather than a conversation
        return not holds_rows or any(name in first for name in PATH_NAMES)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> dict:
        begin, end = self.spans[row]
        return read_record({"json": self.content[begin:end]})

    def __reduce__(self) -> tuple:
        return JsonFile, (self.path,)


def _names(rows: _LazyRows, most: int) -> list[str]:
    """Returns the columns of at most this many rows; rows that can't be read are passed over."""
    names: dict[str, None] = {}
    for number in range(min(most, len(rows))):
        with suppress(BadSample):
            names |= dict.fromkeys(rows[number])
    return list(names)


def _json_list(path: Path) -> list[dict]:
    """Returns the objects of a JSON file: a list, or the only list of objects in an object."""
    content = read_json(path)
    lists = [content] if isinstance(content, list) else list(content.values()) if isinstance(content, dict) else []
    lists = [rows for rows in lists if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)]
    if len(lists) != 1:
        raise ValueError(f"{path}: expected a list of objects, or one object per line")
    return lists[0]


class ImageFolder(_LazyRows):
    """Images with ``NAME.txt`` or ``NAME.json`` beside ``NAME.jpg``; the captions are read when they are needed."""

    def __init__(self, path: Path):
        self.path = path
        # Bytes, because a name need not be UTF-8.
        self.images = pa.array([os.fsencode(image.relative_to(path)) for image in image_files(path)], pa.large_binary())
        self.names = _names(self, 100) or [PATH_NAMES[0]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict:
        name, files = os.fsdecode(self.images[row].as_py()), {}
        for suffix in ("json", "txt"):
            beside = ((self.path / name).with_suffix(f".{form}") for form in (suffix, suffix.upper()))
            if found := next(filter(Path.is_file, beside), None):
                files[suffix] = found.read_bytes()
        try:
            return read_record(files) | {PATH_NAMES[0]: name}
        except BadSample as error:
            raise BadSample(f"{name}: {error}", error.kind) from error


Rows = ArrowRows | JsonFile | ImageFolder
TableFile = CsvFile | JsonFile | ImageFolder | ColumnarFile


def open_table(
    path: Path, separator: str | None = None, strict: bool = False, plain_quotes: bool = False, limit: int | None = None
) -> TableFile:
    """Opens a table of any kind.

    Args:
        path: the file, or a folder of images with captions beside them.
        separator, strict, plain_quotes, limit: see `CsvFile`; without effect on other files than CSV and TSV.

    Raises:
        ValueError: the file is not a table of the kind that its name says.
    """
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix in COLUMNAR:
        return ColumnarFile(path)
    if path.suffix in (".json", ".jsonl"):
        return JsonFile(path)
    return CsvFile(path, separator, strict, plain_quotes, limit)


def row_sample(path: Path, number: int, row: dict, image_column: str) -> RawSample:
    """Returns a row of a table, whose image is inside or a file beside the table, as a sample without its image column.

    Args:
        path: the table.
        number: the number of the row.
        row: column -> value.
        image_column: the column of the image: a path, bytes, or a dict of ``bytes`` and ``path`` as on the hub.
    """
    record = dict(row)
    image = record.pop(image_column, None)
    content = image_bytes(image)
    name = image.get("path") if isinstance(image, dict) else image
    outside = beside(path, name) if isinstance(name, str) and name and not content else None
    return RawSample(str(number), path.name, {"jpg": content} if content else {}, record, outside)


def choose_image_column(table: TableFile, wanted: str | None) -> str:
    """Chooses the image column of a table.

    Args:
        table: the table.
        wanted: the column that --csv-img-key names; the first of `PATH_NAMES`, its default, may be absent.

    Returns:
        `wanted` if the table has it, else the only column that holds images, else the only one of `PATH_NAMES`.

    Raises:
        ValueError: there is no such column, or several and the flag names none of them.
    """
    if wanted is not None and wanted in table.names:
        return wanted
    is_default = wanted in (None, PATH_NAMES[0])
    found = list(table.image_columns) or [name for name in PATH_NAMES if name in table.names]
    if is_default and len(found) == 1:
        return found[0]
    if is_default and found:
        kind = "hold images" if table.image_columns else "may hold image paths"
        raise ValueError(f"{table.path}: several columns {kind}: {', '.join(found)}; name one with --csv-img-key")
    raise ValueError(
        f"{table.path}: no image column {wanted or PATH_NAMES[0]!r} (--csv-img-key); {_describe_columns(table)}"
    )


def _describe_columns(table: TableFile) -> str:
    """Returns what the columns of a table are, for messages; and of a CSV, how they were told apart."""
    text = f"its columns are {', '.join(table.names)} (the first line of a CSV is its header)"
    if isinstance(table, CsvFile):
        for char, name in (("\t", "tabs"), (",", "commas"), (";", "semicolons")):
            if char in "".join(table.names):
                used = table.form.separator
                text += f". It is read as separated by {used!r}, and its header has {name}, too: name the separator "
                text += f"with --csv-separator {char!r}"
    return text


def caption_columns(table: TableFile, image_column: str, wanted: Sequence[str], flag: str) -> list[str]:
    """Returns the columns of captions that a table has.

    Args:
        table: the table.
        image_column: its image column.
        wanted: the names to look for.
        flag: the flags that name them, for messages.

    Raises:
        ValueError: there is no such column, or none that can hold texts.
    """
    found = [name for name in dict.fromkeys(wanted) if name in table.names and name != image_column]
    kinds = {name: table.schema.field(name).type for name in found} if isinstance(table, ColumnarFile) else {}
    if kinds and not any(may_hold_text(kind) or pa.types.is_binary(kind) for kind in kinds.values()):
        types = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ValueError(f"{table.path}: no texts or lists of texts in {types}; name other columns with {flag}")
    if not found:
        raise ValueError(
            f"{table.path}: {_describe_columns(table)}; expected captions under one of {', '.join(wanted)} ({flag})"
        )
    return found
