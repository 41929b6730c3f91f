"""Small file helpers: JSON with errors that name the place, and many small reads at once."""

import glob
import io
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")

T = TypeVar("T")
R = TypeVar("R")
NUM_THREADS = 32  # a network disk answers one small request in milliseconds; the waiting overlaps


@dataclass(frozen=True)
class ShardMember:
    """A file inside a tar file, read in place; stands where a path does.

    Attributes:
        shard: the tar file.
        offset, size: where the content lies in it, in bytes.
        member: name inside.
    """

    shard: Path
    offset: int
    size: int
    member: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    def stat(self) -> os.stat_result:
        """Returns that of the tar file: the content has changed if it has."""
        return self.shard.stat()

    def resolve(self) -> str:
        """Returns a name that no other content has while the tar file stays as it is."""
        return f"{self.shard.resolve()}/{self.member}@{self.offset}"

    def open(self) -> io.BytesIO:
        """Returns the content as a file."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in a cell of a Parquet or Arrow file, read when it is needed; stands where a path does.

    Attributes:
        shard: the file.
        column: of bytes, or of structs with ``bytes``.
        row: from 0.
    """

    shard: Path
    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.shard}, row {self.row + 1}"

    @property
    def name(self) -> str:
        return f"{self.shard.name}-{self.row + 1}"

    def stat(self) -> os.stat_result:
        """Returns that of the file: the content has changed if it has."""
        return self.shard.stat()

    def resolve(self) -> str:
        """Returns a name that no other content has while the file stays as it is."""
        return f"{self.shard.resolve()}/{self.column}@{self.row}"

    def open(self) -> io.BytesIO:
        """Returns the image file's bytes as a file."""
        from dataloaders.columnar import read_image

        return io.BytesIO(read_image(self.shard, self.column, self.row))


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Applies a function that waits for the disk to every item, in threads; results keep the order."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(function, items))


def read_json(path: Path) -> object:
    """Reads a UTF-8 JSON file; ValueError names the file and the place if it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: broken JSON ({error}); fetch the file again") from error


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """Reads a JSON-lines file of objects as (``FILE line N``, object); ValueError names file and line."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); fetch the file again") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken JSON ({error}); fetch the file again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        rows.append((where, row))
    return rows


def text_field(row: object, key: str, where: str | Path) -> str:
    """Returns ``row[key]`` if it is a string; ValueError names the place and the keys found otherwise."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if not isinstance(row.get(key), str):
        raise ValueError(f"{where}: expected text under {key!r}, found keys {sorted(row)[:8]}")
    return row[key]


def require_dir(path: str | Path, flag: str) -> Path:
    """Returns the folder; FileNotFoundError with the flag's name if it is none."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{flag} {path}: no such folder")
    return path


def matching_files(pattern: str) -> list[str]:
    """Returns the file of this name, else all that match it as a pattern; a folder's name is never a pattern."""
    folder, name = os.path.split(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name)))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``2`` before ``10``."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def first_present(places: Sequence[Sequence[Path]]) -> list[Path]:
    """Returns for each file the first of its possible places where there is one; the first place if there is none."""
    return parallel_map(lambda own: next((p for p in own if file_identity(p) is not None), own[0]), places)


def file_identity(path: Path | ShardMember | EmbeddedImage) -> object | None:
    """Returns (device, inode) of a file, the path itself where there are no inodes, None if there is no file."""
    if hasattr(path, "shard"):  # in a tar or Parquet file
        return path if path.shard.is_file() else None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else path
