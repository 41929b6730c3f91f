"""The CSV and TSV reader of evaluation, training and preparation; no line of a file gets lost unnoticed.

Python's csv module parses, in its strict mode. It lacks four things, which are added here: the byte at which each row
begins, for messages; reading on after a row that can't be parsed; doubt about a quoted cell
of several lines one of which looks like a row, because a quote that is never closed swallows the rows after it; and
quotation marks written as ``\\"``, as Spark and MySQL do.
"""

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from training.readers.faults import refuse_pointer

MAX_ROW_BYTES = 1 << 20  # without a limit, a quote that is never closed would swallow the file
_LINES_AHEAD = 200
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{2,5}$")
_QUOTED = re.compile(r'\s*".*"\s*', re.DOTALL)
_ESCAPE = re.compile(r'\\([\\"])')
logger = logging.getLogger(__name__)


class Record(NamedTuple):
    """One row of a CSV.

    Attributes:
        cells: texts; None for a row with too few or too many cells, or with a quote that is never closed.
        begin, end: the bytes of the file where the row begins and ends.
        repaired: the row was not UTF-8 and has been read as Windows-1252.
        fault: why a row has no cells.
    """

    cells: list[str] | None
    begin: int
    end: int
    repaired: bool
    fault: str | None


class CsvForm(NamedTuple):
    """How a CSV is written.

    Attributes:
        separator: one character.
        quoted: cells may be in quotes, and may then contain separators and line breaks; if False, quotes are ordinary
            characters.
        escaped: a quotation mark in a quoted cell is written as ``\\"``, and not twice.
    """

    separator: str
    quoted: bool = True
    escaped: bool = False


class CsvRecords:
    """The rows of a CSV file.

    A row is bad if it has the wrong number of cells, if a quotation mark is neither around a cell nor doubled, or if it
    spans several lines of which one looks like a row. After a bad row, reading continues at the first of its further
    lines that looks like a row.

    Args:
        path: the file.
        form: how the file is written.

    Attributes:
        names: the columns.

    Raises:
        ValueError: there is no header, the file is UTF-16 or has CR line ends, or two columns have the same name.
    """

    def __init__(self, path: Path, form: CsvForm):
        self.path, self.form = path, form
        csv.field_size_limit(MAX_ROW_BYTES)
        with open(path, "rb") as file:
            head = file.read(1 << 16)
            refuse_pointer(head, path)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head.partition(b"\n")[0]:
                raise ValueError(f"{path}: UTF-16 text; convert it first: iconv -f UTF-16 -t UTF-8")
            if b"\r" in head and b"\n" not in head:
                raise ValueError(f"{path}: lines end with CR alone; convert them first: tr '\\r' '\\n'")
            lines = _Lines(file, 0, form)
            cells, self.begin = lines.next_row(), lines.position
        if not cells:
            raise ValueError(
                f"{path}: no header in its first row; is it a CSV with the separator {form.separator!r}? "
                "Name another one with --csv-separator"
            )
        self.names = [cell.strip().strip('"') for cell in cells]
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"{path}: two columns are called {twice[0]!r} (the first line is the header)")

    def read(self, begin: int | None = None, end: int | None = None) -> Iterator[Record]:
        """Yields the rows that begin before byte `end`, from the one at byte `begin` on; blank lines are skipped."""
        with open(self.path, "rb", buffering=1 << 20) as file:
            lines = _Lines(file, self.begin if begin is None else begin, self.form)
            while end is None or lines.position < end:
                cells = lines.next_row()
                if not lines.row:
                    return
                if cells is None or any(map(str.strip, cells)) or len(cells) > 1:  # not a blank line
                    begin, repaired, fault = lines.row[0][0], lines.repaired, self._fault(cells, lines.row)
                    if fault:
                        self._resume(lines)
                    yield Record(None if fault else cells, begin, lines.position, repaired, fault)

    def _fault(self, cells: list[str] | None, row: Sequence[tuple[int, str]]) -> str | None:
        """Returns what is wrong with a row, if anything; `row` holds its lines."""
        if cells is None:
            return (
                "a quotation mark that is never closed or not doubled inside a quoted cell, or a CR outside of quotes"
            )
        complete = len(cells) == len(self.names)
        if len(row) > 1 and (self._is_doubtful(cells, row) if complete else self._splits(row[0][1])):
            return "a quotation mark that is never closed, or a cell of several lines that look like rows"
        return None if complete else f"{len(cells)} cells, the header has {len(self.names)}"

    def _is_doubtful(self, cells: list[str], row: Sequence[tuple[int, str]]) -> bool:
        """Returns whether one of a row's further lines looks like a row itself.

        Captions hardly ever contain tabs. They do contain commas, so a line also needs a cell of the same kind as that
        of its row, in a column in which the row has no line break: a name with the same suffix, of the same form, and
        so on.
        """
        whole = [column for column, cell in enumerate(cells) if "\n" not in cell]
        tabs = self.form.separator == "\t" and len(self.names) > 1
        splits = (found for _, line in row[1:_LINES_AHEAD] for found in self._splits(line))
        return any(tabs or any(_is_alike(cells[column], found[column]) for column in whole) for found in splits)

    def _splits(self, line: str) -> list[list[str]]:
        """Returns the cells of a line, with quotes and with quotes as ordinary characters, if their number is right."""
        if line.count(self.form.separator) < len(self.names) - 1:
            return []
        found: list[list[str]] = []
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if self.form.quoted else (csv.QUOTE_NONE,):
            with suppress(csv.Error):  # a carriage return in the middle of a line
                found += csv.reader([line], delimiter=self.form.separator, quoting=quoting)
        return [cells for cells in found if len(cells) == len(self.names)]

    def _resume(self, lines: "_Lines") -> None:
        """Goes to the first line in a bad row that looks like a row; else to the end of the row's last line."""
        end = lines.position
        for begin, line in lines.row[1:_LINES_AHEAD]:
            if self._splits(line) or len(_Lines(lines.file, begin, self.form).next_row() or ()) == len(self.names):
                lines.go_to(begin)
                return
        lines.go_to(end)
        while lines.row and not lines.row[-1][1].endswith("\n"):  # a very long line
            lines.row = []
            next(lines, None)


class _Lines:
    """The lines of a file as text, from a byte on.

    Attributes:
        row: (byte where it begins, text) of each line of the current row.
        position: the byte where the next line begins.
        repaired: a line of the row was not UTF-8.
    """

    def __init__(self, file: IO[bytes], begin: int, form: CsvForm):
        self.file, self.form, self.repaired = file, form, False
        self.row: list[tuple[int, str]] = []
        reader = partial(csv.reader, self, delimiter=form.separator)
        self.cells = reader(strict=True) if form.quoted else reader(quoting=csv.QUOTE_NONE)
        self.go_to(begin)

    def go_to(self, position: int) -> None:
        self.position = position
        self.file.seek(position)

    def next_row(self) -> list[str] | None:
        """Returns the cells of the next row; None if it can't be parsed, and nothing for a blank line or at the end."""
        self.row, self.repaired = [], False
        try:
            return next(self.cells, [])
        except csv.Error:
            return None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.row and self.position - self.row[0][0] >= MAX_ROW_BYTES:
            raise csv.Error("row too long")
        line = self.file.readline(MAX_ROW_BYTES)
        if not line:
            raise StopIteration
        try:
            text = line.decode("utf-8" if self.position else "utf-8-sig")
        except UnicodeDecodeError:
            text, self.repaired = line.decode("cp1252", "replace"), True
        text = text.replace("\0", "")
        if self.form.escaped and "\\" in text:
            text = _ESCAPE.sub(lambda match: '""' if match[1] == '"' else "\\", text)
        self.row.append((self.position, text))
        self.position += len(line)
        return text


def _is_alike(cell: str, other: str) -> bool:
    """Returns whether two cells may be the names of two images."""
    cell, other = cell.strip(), other.strip()
    if _URL.match(cell):
        return _URL.match(other) is not None
    if suffix := _SUFFIX.search(cell):
        found = _SUFFIX.search(other)
        return found is not None and (" " not in other or suffix[0].lower() == found[0].lower())
    if any(map(str.isdigit, cell)):
        return _shape(cell) == _shape(other)
    return bool(cell and other) and len(other.split()) <= len(cell.split())


def _shape(text: str) -> str:
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", text))


def open_csv(path: Path, separator: str | None = None, limit: int | None = None) -> CsvRecords:
    r"""Opens a CSV, after finding out how it is written.

    Quotes inside quoted cells are doubled or, if more rows are good that way, written as ``\"``. Quotes count as
    ordinary characters only if some rows are bad otherwise, if all rows are good this way, and if no cell is quoted as
    a whole. CC3M's table is an example.

    Args:
        path: the file.
        separator: None means a comma, semicolon or tab, whichever the first line has most of; and a tab in ``.tsv``.
        limit: look at this many bytes; None looks at the whole file.

    Raises:
        ValueError: the header can't be read (see `CsvRecords`).
    """

    def count_bad(records: CsvRecords) -> int:
        return sum(row.cells is None for row in records.read(end=limit))

    if separator is None and path.suffix != ".tsv":
        with open(path, "rb") as file:
            separator = max(",;\t", key=file.readline(1 << 16).decode("utf-8", "replace").count)
        if separator != ",":
            logger.warning(f"{path}: separated by {separator!r}, by its first line; --csv-separator names another one")
    records = CsvRecords(path, CsvForm(separator or "\t"))
    if not (num_bad := count_bad(records)):
        return records
    escaped = CsvRecords(path, records.form._replace(escaped=True))
    if (fewer := count_bad(escaped)) < num_bad:
        logger.warning(f'{path}: quotation marks are written as \\" and read as such')
        records, num_bad = escaped, fewer
    if num_bad:
        plain = CsvRecords(path, records.form._replace(quoted=False, escaped=False))
        rows = (row.cells for row in plain.read(end=limit))
        if all(cells is not None and not any(map(_QUOTED.fullmatch, cells)) for cells in rows):
            logger.warning(f"{path}: no cell is quoted as a whole, so quotation marks are read as plain characters")
            return plain
    return records


def line_number(path: Path, position: int) -> int:
    """Returns the number of the line, from 1, in which a byte of a file is."""
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(min(1 << 20, position - file.tell())), b"")
        return sum(block.count(b"\n") for block in blocks) + 1
