"""Rows of tables that do not fit memory: from any row of a CSV on, or some row groups of a Parquet file.

A CSV has no index, and a quoted caption may hold line ends, so only reading from its start tells where a row begins.
`CsvRecords` knows the byte at which each row begins, so that others can go on from there.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from training.data.captions import join_sentences

MAX_ROW_BYTES = 1 << 20  # an opened quote that is never closed would swallow the file
_LINES_AHEAD = 200


class Record(NamedTuple):
    """One row of a CSV.

    Attributes:
        cells: texts; None for a row with too few or too many cells, or one that never ends.
        begin, end: its bytes in the file.
        repaired: it was not UTF-8, and has been read as Windows-1252.
    """

    cells: list[str] | None
    begin: int
    end: int
    repaired: bool


class CsvForm(NamedTuple):
    """How a CSV is written.

    Attributes:
        separator: one character.
        quoted: cells may be in quotes, and hold separators and line ends then; otherwise quotes are plain characters.
    """

    separator: str
    quoted: bool = True


class CsvRecords:
    """Reads rows of a CSV file from a byte where a row begins.

    A quote that is opened and never closed makes one row out of many lines. Where a row of several lines has the wrong
    number of cells, reading goes on after its first line if one of the following lines begins a good row.

    Args:
        path: the file.
        form: how it is written.
        num_cells: of a good row; None where only the header is read.
    """

    def __init__(self, path: Path, form: CsvForm, num_cells: int | None = None):
        self.path, self.form, self.num_cells = path, form, num_cells
        self.quoting = csv.QUOTE_MINIMAL if form.quoted else csv.QUOTE_NONE
        csv.field_size_limit(MAX_ROW_BYTES)

    def header(self) -> tuple[list[str], int]:
        """Returns the names of the columns, and the byte at which the first row begins."""
        with open(self.path, "rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{self.path}: UTF-16 text; convert it first: iconv -f UTF-16 -t UTF-8")
            file.seek(0)
            cells, end, _ = self._next(file, 0)
        if not cells:
            raise ValueError(
                f"{self.path}: no header in its first row; is it a CSV with --separator {self.form.separator!r}?"
            )
        cells[0] = cells[0].removeprefix("\ufeff")
        return [cell.strip().strip('"') for cell in cells], end

    def read(self, begin: int, end: int | None = None) -> Iterator[Record]:
        """Yields the rows that begin at bytes `begin` to `end`; blank lines are none."""
        with open(self.path, "rb", buffering=1 << 20) as file:
            file.seek(begin)
            position = begin
            while end is None or position < end:
                cells, stop, repaired = self._next(file, position)
                if stop == position:
                    return
                if cells is not None and not cells:
                    position = stop
                    continue
                if cells is None or len(cells) != self.num_cells:
                    stop = self._resume(file, position, stop)
                    cells = None
                yield Record(cells, position, stop, repaired)
                position = stop

    def _next(self, file, position: int) -> tuple[list[str] | None, int, bool]:
        """Reads one row.

        Returns:
            (cells, where the row ends, whether it was read as Windows-1252). No cells for a blank line, None for a row
            that is none; at the file's end it ends where it begins.
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
        elif (
            self.form.quoted and lines and not lines[-1].endswith(b"\n") and sum(line.count(b'"') for line in lines) % 2
        ):
            cells = None  # the file breaks off within a quote
        return cells, position + taken, repaired

    def _resume(self, file, begin: int, stop: int) -> int:
        """After a bad row from `begin` to `stop`: where the next good one within it begins, else `stop`."""
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


class Chunk(NamedTuple):
    """A stretch of a table: bytes of a CSV file, or row groups of a Parquet file."""

    begin: int
    end: int


def csv_chunks(records: CsvRecords, begin: int, num_rows: int) -> Iterator[Chunk]:
    """Cuts what follows byte `begin` into stretches of `num_rows` rows."""
    end = begin
    for number, record in enumerate(records.read(begin), start=1):
        end = record.end
        if number % num_rows == 0:
            yield Chunk(begin, end)
            begin = end
    if end > begin:
        yield Chunk(begin, end)


def parquet_chunks(group_sizes: Sequence[int], num_rows: int) -> Iterator[Chunk]:
    """Puts neighbouring row groups together until they have `num_rows` rows."""
    begin = held = 0
    for number, size in enumerate(group_sizes, start=1):
        held += size
        if held >= num_rows or number == len(group_sizes):
            yield Chunk(begin, number)
            begin, held = number, 0


def cell_text(value: object) -> str | None:
    """What a Parquet cell says: a text, or a list of sentences joined; None for anything else."""
    if isinstance(value, str):
        return value
    sentences = [s.strip() for s in value if isinstance(s, str) and s.strip()] if isinstance(value, list) else []
    return join_sentences(sentences) if sentences else None
