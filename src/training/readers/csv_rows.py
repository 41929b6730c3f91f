"""The CSV and TSV reader of evaluation, training and preparation; no line of a file gets lost unnoticed.

Python's csv module parses, in its strict mode. It lacks four things, which are added here: the byte at which each row
begins, so that reading can continue from there; reading on after a row that can't be parsed; doubt about a quoted cell
of several lines one of which looks like a row, because a quote that is never closed swallows the rows after it; and
quotation marks written as ``\\"``, as Spark and MySQL do.
"""

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_ROW_BYTES = 1 << 20  # without a limit, a quote that is never closed would swallow the file
_LINES_AHEAD = 200
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{2,5}$")
_ESCAPE = re.compile(r'\\([\\"])')
logger = logging.getLogger(__name__)


class Record(NamedTuple):
    """One row of a CSV.

    Attributes:
        cells: texts; None for a row with too few or too many cells, or with a quote that is never closed.
        begin, end: the bytes of the file where the row begins and ends.
        repaired: the row was not UTF-8 and has been read as Windows-1252.
    """

    cells: list[str] | None
    begin: int
    end: int
    repaired: bool


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
    """Reads rows of a CSV file, starting at a byte where a row begins.

    A row is bad if it has the wrong number of cells, if a quotation mark is neither around a cell nor doubled, or if it
    spans several lines of which one looks like a row. After a bad row, reading continues at the first of its further
    lines that looks like a row.

    Args:
        path: the file.
        form: how the file is written.
        num_cells: the number of cells of a good row; None if only the header is read.
    """

    def __init__(self, path: Path, form: CsvForm, num_cells: int | None = None):
        self.path, self.form, self.num_cells = path, form, num_cells
        csv.field_size_limit(MAX_ROW_BYTES)

    def header(self) -> tuple[list[str], int]:
        """Returns the names of the columns, and the byte at which the first row begins.

        Raises:
            ValueError: there is no header, the file is UTF-16 or has CR line ends, or two columns have the same name.
        """
        with open(self.path, "rb") as file:
            head = file.read(1 << 16)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ValueError(f"{self.path}: UTF-16 text; convert it first: iconv -f UTF-16 -t UTF-8")
            if b"\r" in head and b"\n" not in head:
                raise ValueError(f"{self.path}: lines end with CR alone; convert them first: tr '\\r' '\\n'")
            lines = _Lines(file, 0, self.form.escaped)
            try:
                cells = next(self._parser(lines), [])
            except csv.Error:
                cells = []
        if not cells:
            raise ValueError(
                f"{self.path}: no header in its first row; is it a CSV with the separator {self.form.separator!r}? "
                "Name another one with --csv-separator"
            )
        names = [cell.strip().strip('"') for cell in cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.path}: two columns are called {twice[0]!r} (the first line is the header)")
        return names, lines.position

    def read(self, begin: int, end: int | None = None) -> Iterator[Record]:
        """Yields the rows that begin from byte `begin` up to, not including, byte `end`; blank lines are skipped."""
        with open(self.path, "rb", buffering=1 << 20) as file:
            while end is None or begin < end:
                lines = _Lines(file, begin, self.form.escaped)
                for record in self._good_rows(lines):
                    begin = record.end
                    if record.cells is None:
                        begin = self._resume(lines)
                    yield record._replace(end=begin)
                    if record.cells is None or (end is not None and begin >= end):
                        break
                else:
                    return

    def _good_rows(self, lines: "_Lines") -> Iterator[Record]:
        """Yields rows, the last of which is bad unless the file ends."""
        parser = self._parser(lines)
        while True:
            begin = lines.begin_row()
            try:
                cells = next(parser, None)
            except csv.Error:
                yield Record(None, begin, lines.position, lines.repaired)
                return
            if cells is None:
                return
            if not cells:
                continue
            is_good = len(cells) == self.num_cells and (len(lines.row) == 1 or not self._is_doubtful(cells, lines.row))
            yield Record(cells if is_good else None, begin, lines.position, lines.repaired)

    def _parser(self, lines: Iterator[str]) -> Iterator[list[str]]:
        quoting = csv.QUOTE_MINIMAL if self.form.quoted else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=self.form.separator, quoting=quoting, strict=self.form.quoted)

    def _is_doubtful(self, cells: list[str], lines: Sequence[str]) -> bool:
        """Returns whether one of a row's further lines looks like a row itself.

        Captions hardly ever contain tabs. They do contain commas, so a line also needs a cell of the same kind as that
        of its row, in a column in which the row has no line break: a name with the same suffix, of the same form, and
        so on.
        """
        places = [place for place, cell in enumerate(cells) if "\n" not in cell]
        for line in lines[1:_LINES_AHEAD]:
            for found in self._splits(line):
                if self.form.separator == "\t" and self.num_cells > 1:
                    return True
                if any(_is_alike(cells[place], found[place]) for place in places):
                    return True
        return False

    def _splits(self, line: str) -> list[list[str]]:
        """Returns the cells of a line, with quotes and with quotes as ordinary characters, if their number is right."""
        if line.count(self.form.separator) < self.num_cells - 1:
            return []
        found = []
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if self.form.quoted else (csv.QUOTE_NONE,):
            try:
                found += csv.reader([line], delimiter=self.form.separator, quoting=quoting)
            except csv.Error:  # a carriage return in the middle of a line
                pass
        return [cells for cells in found if len(cells) == self.num_cells]

    def _resume(self, lines: "_Lines") -> int:
        """Returns the byte where the first line in a bad row that looks like a row begins; else the end of the row."""
        place = lines.begin
        for line, size in list(zip(lines.row, lines.sizes))[:_LINES_AHEAD]:
            if place > lines.begin and (self._splits(line) or self._parses(lines.file, place)):
                return place
            place += size
        lines.file.seek(lines.position)
        return lines.end_of_line()

    def _parses(self, file, place: int) -> bool:
        """Returns whether a row of the right number of cells begins at a byte."""
        try:
            return len(next(self._parser(_Lines(file, place, self.form.escaped)), [])) == self.num_cells
        except csv.Error:
            return False


class _Lines:
    """The lines of a file as text, from byte `begin` on, and the lines of the current row."""

    def __init__(self, file, begin: int, escaped: bool):
        self.file, self.begin, self.position, self.escaped = file, begin, begin, escaped
        self.row, self.sizes, self.repaired = [], [], False
        file.seek(begin)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.position - self.begin >= MAX_ROW_BYTES:
            raise csv.Error("row too long")
        line = self.file.readline(MAX_ROW_BYTES)
        if not line:
            raise StopIteration
        self.position += len(line)
        try:
            text = line.decode("utf-8" if self.begin else "utf-8-sig")
        except UnicodeDecodeError:
            text, self.repaired = line.decode("cp1252", "replace"), True
        if "\0" in text:
            text = text.replace("\0", "")
        if self.escaped and "\\" in text:
            text = _ESCAPE.sub(lambda match: '""' if match[1] == '"' else "\\", text)
        self.row.append(text)
        self.sizes.append(len(line))
        return text

    def begin_row(self) -> int:
        """Forgets the lines so far; returns the byte at which the next line begins."""
        self.begin, self.row, self.sizes, self.repaired = self.position, [], [], False
        return self.begin

    def end_of_line(self) -> int:
        """Returns the byte after the current line, of which only a part has been read if it is very long."""
        while self.row and not self.row[-1].endswith("\n") and (line := self.file.readline(MAX_ROW_BYTES)):
            self.position += len(line)
            if line.endswith(b"\n"):
                break
        return self.position


def _is_alike(own: str, other: str) -> bool:
    """Returns whether two cells may be the names of two images."""
    own, other = own.strip(), other.strip()
    if _URL.match(own):
        return _URL.match(other) is not None
    if suffix := _SUFFIX.search(own):
        found = _SUFFIX.search(other)
        return found is not None and (" " not in other or suffix[0].lower() == found[0].lower())
    if any(map(str.isdigit, own)):
        return _shape(own) == _shape(other)
    return bool(own and other) and len(other.split()) <= len(own.split())


def _shape(text: str) -> str:
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", text))


def choose_form(path: Path, separator: str | None = None, limit: int | None = None) -> tuple[CsvForm, list[str]]:
    r"""Finds out how a file is written, and reads its header.

    Quotes inside quoted cells are doubled or, if more rows are good that way, written as ``\"``. Quotes count as
    ordinary characters only if some rows are bad otherwise, if all rows are good this way, and if no cell is quoted as
    a whole. CC3M's table is an example.

    Args:
        path: the file.
        separator: None means a comma, semicolon or tab, whichever the header has most of; and a tab in ``.tsv``.
        limit: look at this many bytes; None looks at the whole file.

    Returns:
        The form of the file and the names of its columns.

    Raises:
        ValueError: the header can't be read (see `CsvRecords.header`).
    """
    form = CsvForm(separator or default_separator(path))
    header, begin = CsvRecords(path, form).header()

    def count_bad(form: CsvForm) -> int:
        return sum(row.cells is None for row in CsvRecords(path, form, len(header)).read(begin, limit))

    num_bad = count_bad(form)
    if num_bad and (fewer := count_bad(form._replace(escaped=True))) < num_bad:
        logger.warning(f'{path}: quotation marks are written as \\" and read as such')
        form, num_bad = form._replace(escaped=True), fewer
    if num_bad:
        plain = form._replace(quoted=False, escaped=False)
        rows = (row.cells for row in CsvRecords(path, plain, len(header)).read(begin, limit))
        if all(cells is not None and not any(map(_is_quoted, cells)) for cells in rows):
            logger.warning(f"{path}: no cell is quoted as a whole, so quotation marks are read as plain characters")
            return plain, header
    return form, header


def _is_quoted(cell: str) -> bool:
    cell = cell.strip()
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def default_separator(path: Path) -> str:
    """Returns a tab for ``.tsv``, else the separator that the first line has most of; a comma if it has none."""
    if path.suffix == ".tsv":
        return "\t"
    with open(path, "rb") as file:
        line = file.readline(1 << 16).decode("utf-8", "replace")
    found = max(",;\t", key=line.count)
    if found != ",":
        logger.warning(f"{path}: separated by {found!r}, by its first line; --csv-separator names another one")
    return found


class BadRows:
    """Counts the bad rows of a CSV and keeps the first one for the message."""

    def __init__(self, path: Path, form: CsvForm, header: Sequence[str]):
        self.path, self.form, self.num_cells = path, form, len(header)
        self.count, self.first = 0, None

    def add(self, record: Record) -> None:
        """Counts a bad row."""
        self.count += 1
        self.first = self.first or record

    def describe(self) -> str:
        """Describes the first bad row, for example ``line 7: 3 cells, the header has 2 (1 bad row in all)``."""
        with open(self.path, "rb") as file:
            number = sum(block.count(b"\n") for block in _blocks(file, self.first.begin)) + 1
            lines = _Lines(file, self.first.begin, self.form.escaped)
            records = CsvRecords(self.path, self.form, self.num_cells)
            try:
                cells = next(records._parser(lines), [])
                plain = next(csv.reader(lines.row[:1], delimiter=self.form.separator, quoting=csv.QUOTE_NONE), [])
            except csv.Error:
                cells = plain = None
        if cells is None:
            fault = "a quotation mark that is never closed, or not doubled inside a quoted cell"
        elif len(cells) == self.num_cells or (len(lines.row) > 1 and len(plain) == self.num_cells):
            fault = "a quotation mark that is never closed, or a cell of several lines that look like rows"
        else:
            fault = f"{len(cells)} cells, the header has {self.num_cells}"
        return f"line {number:,}: {fault} ({self.count:,} bad row{'s' * (self.count > 1)} in all)"


def _blocks(file, size: int) -> Iterator[bytes]:
    """Yields the first `size` bytes of a file in pieces."""
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        size -= len(block)
        yield block
