"""Stretches of tables that do not fit memory: bytes of a CSV file, or row groups of a Parquet file."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dataloaders.csv_rows import CsvRecords
from training.data.captions import join_sentences


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
