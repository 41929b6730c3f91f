"""The CSV and TSV reader of evaluation, training and preparation; no line of a file gets lost unnoticed.

A CSV has no index, and a quoted caption may contain line breaks, so finding where a row begins requires reading from
the start of the file. `CsvRecords` reports the byte at which each row begins, so that a reader can continue from there.
A quote that is opened and never closed would swallow the rows after it. If one of the swallowed lines is a row itself,
the quote counts as unclosed and its row as bad, and reading continues with that line. duckdb and polars do not do that
(TRAIN_DATASETS.md compares them).
"""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.readers.csv_scan import plain_row_ends

MAX_ROW_BYTES = 1 << 20  # without a limit, a quote that is never closed would swallow the file
_LINES_AHEAD = 200
_BLOCK_BYTES = (1 << 16, 1 << 22)  # block size after a row that needed the slow reader, and the largest one
_QUOTING = {True: csv.QUOTE_MINIMAL, False: csv.QUOTE_NONE}
# A cell that refers to a file: a URL, or a file name with a suffix.
_REFERENCE = re.compile(r"(?:[a-z][a-z0-9+.-]*://\S+|[^\s\t]*\S\.[A-Za-z0-9]{2,5})\s*")


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


class Stretch(NamedTuple):
    """Consecutive good rows of a UTF-8 CSV that every CSV parser reads the same way.

    Attributes:
        begin: byte of the file at which the first row begins.
        ends: int64 [num_rows], the byte of the file at which each row ends.
    """

    begin: int
    ends: np.ndarray


class CsvForm(NamedTuple):
    """How a CSV is written.

    Attributes:
        separator: one character.
        quoted: cells may be in quotes, and may then contain separators and line breaks; if False, quotes are ordinary
            characters.
    """

    separator: str
    quoted: bool = True


class CsvRecords:
    """Reads rows of a CSV file, starting at a byte where a row begins.

    A row is bad if it has the wrong number of cells, or if it spans several lines of which one is a row itself. After
    a bad row, reading continues at the first of its further lines that begins a good row.

    Args:
        path: the file.
        form: how the file is written.
        num_cells: the number of cells of a good row; None if only the header is read.
    """

    def __init__(self, path: Path, form: CsvForm, num_cells: int | None = None):
        self.path, self.form, self.num_cells = path, form, num_cells
        self.quoting = _QUOTING[form.quoted]
        csv.field_size_limit(MAX_ROW_BYTES)

    def header(self) -> tuple[list[str], int]:
        """Returns the names of the columns, and the byte at which the first row begins.

        Raises:
            ValueError: there is no header, the file is UTF-16 or has CR line ends, or two columns have the same name.
        """
        with open(self.path, "rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{self.path}: UTF-16 text; convert it first: iconv -f UTF-16 -t UTF-8")
            file.seek(0)
            head = file.read(1 << 16)
            if b"\r" in head and b"\n" not in head:
                raise ValueError(f"{self.path}: lines end with CR alone; convert them first: tr '\\r' '\\n'")
            file.seek(0)
            cells, end, _ = self._next(file, 0)
        if not cells:
            raise ValueError(
                f"{self.path}: no header in its first row; is it a CSV with the separator {self.form.separator!r}?"
            )
        cells[0] = cells[0].removeprefix("\ufeff")
        names = [cell.strip().strip('"') for cell in cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.path}: two columns are called {twice[0]!r} (the first line is the header)")
        return names, end

    def read(self, begin: int, end: int | None = None) -> Iterator[Record]:
        """Yields the rows that begin from byte `begin` up to, not including, byte `end`; blank lines are skipped."""
        with open(
            self.path, "rb", buffering=1 << 20 if end is None else min(max(end - begin, 1 << 13), 1 << 20)
        ) as file:
            file.seek(begin)
            while end is None or begin < end:
                record, stop = self._record(file, begin)
                if stop == begin:
                    return
                if record:
                    yield record
                begin = stop

    def read_fast(self, begin: int) -> Iterator[Record | Stretch]:
        """Yields the rows from byte `begin` on, most of them grouped into stretches for a parser in C."""
        size = _BLOCK_BYTES[0]
        with open(self.path, "rb", buffering=0) as raw, open(self.path, "rb") as file:
            while True:
                raw.seek(begin)
                block = raw.read(size)
                ends, is_all = plain_row_ends(block, *self.form, self.num_cells, MAX_ROW_BYTES, self._is_row)
                if len(ends):
                    yield Stretch(begin, begin + ends)
                    begin += int(ends[-1])
                if len(ends) and is_all:
                    size = min(4 * size, _BLOCK_BYTES[1])
                    continue
                size = _BLOCK_BYTES[0]
                file.seek(begin)
                record, stop = self._record(file, begin)
                if stop == begin:
                    return
                if record:
                    yield record
                begin = stop

    def _record(self, file, begin: int) -> tuple[Record | None, int]:
        """Returns (the row at byte `begin` or None for a blank line, the byte at which the next row begins)."""
        cells, stop, repaired = self._next(file, begin)
        if stop == begin or cells == []:
            return None, stop
        if cells is None or len(cells) != self.num_cells or self._swallows_rows(file, cells, begin, stop):
            stop = self._resume(file, begin, stop)
            cells = None
        return Record(cells, begin, stop, repaired), stop

    def _next(self, file, position: int) -> tuple[list[str] | None, int, bool]:
        """Reads one row.

        Returns:
            (cells, the byte at which the row ends, whether it was read as Windows-1252). The cells are empty for a
            blank line and None for a row that can't be parsed. At the end of the file, the row ends where it begins.
        """
        lines: list[bytes] = []
        taken, repaired = 0, False

        def texts() -> Iterator[str]:
            nonlocal taken, repaired
            while taken < MAX_ROW_BYTES and (line := file.readline(MAX_ROW_BYTES)):
                taken += len(line)
                lines.append(line)
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    text, repaired = line.decode("cp1252", "replace"), True
                yield text.replace("\0", "")

        try:
            cells = next(csv.reader(texts(), delimiter=self.form.separator, quoting=self.quoting), [])
        except csv.Error:
            cells = None
        if taken >= MAX_ROW_BYTES:
            cells = None
        elif self.form.quoted and sum(line.count(b'"') for line in lines) % 2 and self._is_open(lines):
            cells = None  # the file ends within a quote
        return cells, position + taken, repaired

    def _is_open(self, lines: list[bytes]) -> bool:
        """Tells whether a further line would still belong to this row, or the row can't be parsed."""
        texts = [*(line.decode("utf-8", "replace") for line in lines), "further"]
        try:
            return len(list(csv.reader(texts, delimiter=self.form.separator))) == 1
        except csv.Error:  # a carriage return in the middle of a line
            return True

    def _swallows_rows(self, file, cells: list[str], begin: int, stop: int) -> bool:
        """Tells whether a row of several lines contains a line that is a row itself.

        Such a line has as many cells, and a reference (see `_REFERENCE`) in a column where its row has one.
        """
        if not self.form.quoted or not any("\n" in cell for cell in cells):
            return False
        file.seek(begin)
        lines = file.read(stop - begin).decode("utf-8", "replace").splitlines()[1 : 1 + _LINES_AHEAD]
        file.seek(stop)
        kinds = [bool(_REFERENCE.fullmatch(cell)) for cell in cells]
        return any(self._is_row(line, kinds) for line in lines)

    def _is_row(self, line: str, kinds: Sequence[bool] | None = None) -> bool:
        """Tells whether a line within a row is a row itself.

        `kinds` tells for each cell of the surrounding row whether it holds a reference; None if that is unknown.
        """
        own = next(csv.reader([line], delimiter=self.form.separator), [])
        if len(own) != self.num_cells or self.num_cells == 1:
            return False
        # Captions hardly ever contain tabs. They do contain commas, so a line also needs a file name or URL in a
        # column where its row has one.
        if self.form.separator == "\t":
            return True
        return any(kind and _REFERENCE.fullmatch(cell) is not None for kind, cell in zip(kinds or repeat(True), own))

    def _resume(self, file, begin: int, stop: int) -> int:
        """Returns the byte at which the first good row inside the bad row `begin` to `stop` begins; else `stop`."""
        file.seek(begin)
        place = begin + len(file.readline(MAX_ROW_BYTES))
        for _ in range(_LINES_AHEAD):
            if place >= stop:
                break
            file.seek(place)
            cells, end, _ = self._next(file, place)
            if cells and len(cells) == self.num_cells:
                file.seek(place)
                return place
            file.seek(place)
            place += len(file.readline(MAX_ROW_BYTES))
        file.seek(stop)
        return stop


def choose_form(path: Path, separator: str) -> tuple[CsvForm, list[str]]:
    """Finds out whether a file uses quotes, and reads its header.

    Quotes count as ordinary characters only if some rows are bad otherwise, if all rows are good this way, and if no
    cell is quoted as a whole. CC3M's table is an example.

    Returns:
        The form of the file and the names of its columns.

    Raises:
        ValueError: the header can't be read (see `CsvRecords.header`).
    """
    quoted = CsvForm(separator)
    header, begin = CsvRecords(path, quoted).header()
    if all(row.cells is not None for row in CsvRecords(path, quoted, len(header)).read(begin)):
        return quoted, header
    plain = CsvForm(separator, quoted=False)
    for row in CsvRecords(path, plain, len(header)).read(begin):
        if row.cells is None or any(len(c) > 1 and c[0] == c[-1] == '"' for c in map(str.strip, row.cells)):
            return quoted, header
    return plain, header


def default_separator(path: Path) -> str:
    """Returns a tab for ``.tsv``, else a comma."""
    return "\t" if path.suffix == ".tsv" else ","


class BadRows:
    """Counts the bad rows of a CSV and keeps the first one for the message."""

    def __init__(self, path: Path, form: CsvForm, header: list[str]):
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
            file.seek(self.first.begin)
            line = file.readline(MAX_ROW_BYTES).decode("utf-8", "replace")
        cells, plain = (
            next(csv.reader([line], delimiter=self.form.separator, quoting=_QUOTING[quoted]), [])
            for quoted in (self.form.quoted, False)
        )
        if self.first.cells is not None:
            fault = "not UTF-8"
        elif len(cells) != self.num_cells and not (line.count('"') % 2 and len(plain) == self.num_cells):
            fault = f"{len(cells)} cells, the header has {self.num_cells}"
        else:
            fault = "a quotation mark that is never closed"
        return f"line {number:,}: {fault} ({self.count:,} bad row{'s' * (self.count > 1)} in all)"


def _blocks(file, size: int) -> Iterator[bytes]:
    """Yields the first `size` bytes of a file in pieces."""
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        size -= len(block)
        yield block
