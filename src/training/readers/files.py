"""Small file helpers: JSON with errors that name the file and line, and many small reads in parallel."""

import glob
import io
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, TypeVar

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "jfif", "jpe", "avif", "heic", "heif", "bmp", "gif", "tif", "tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".jsonl", ".json")

_LEFTOVERS = ("__macosx", "thumbs.db", "desktop.ini")

T = TypeVar("T")
R = TypeVar("R")
_TURNED = " upright"  # part of the names of images that are read with the rotation in their EXIF data
NUM_THREADS = 32  # a network disk answers one small request in milliseconds; the waiting overlaps


@dataclass(frozen=True)
class ShardMember:
    """A file inside a tar file, read in place; used like a `Path`.

    Attributes:
        shard: the tar file, or its URL.
        offset, size: position and length of the content in the tar file, in bytes.
        member: the file's name inside the tar file.
        upright: apply the rotation in the EXIF data when the image is read.
    """

    shard: Path | str
    offset: int
    size: int
    member: str
    upright: bool = False

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    def stat(self) -> os.stat_result | SimpleNamespace:
        """Returns the status of the tar file, because its change is a change of the content."""
        if isinstance(self.shard, Path):
            return self.shard.stat()
        from training.readers.remote import identity

        size, changes = identity(self.shard)
        return SimpleNamespace(st_size=size, st_mtime_ns=changes)

    def resolve(self) -> str:
        """Returns a name that no other content has while the tar file stays as it is."""
        shard = self.shard.resolve() if isinstance(self.shard, Path) else self.shard
        return f"{shard}/{self.member}@{self.offset}{_TURNED * self.upright}"

    def open(self) -> io.BytesIO:
        """Returns the content as a file."""
        from training.readers.remote import read_range

        return io.BytesIO(read_range(self.shard, self.offset, self.size))


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in a cell of a Parquet or Arrow file, read when it is needed; used like a `Path`.

    Attributes:
        shard: the Parquet or Arrow file.
        column: the name of the column, which holds bytes, or structs with ``bytes``.
        row: counted from 0.
        upright: apply the rotation in the EXIF data when the image is read.
    """

    shard: Path
    column: str
    row: int
    upright: bool = False

    def __str__(self) -> str:
        return f"{self.shard}, row {self.row + 1}"

    @property
    def name(self) -> str:
        return f"{self.shard.name}-{self.row + 1}"

    def stat(self) -> os.stat_result:
        """Returns the status of the file, because its change is a change of the content."""
        return self.shard.stat()

    def resolve(self) -> str:
        """Returns a name that no other content has while the file stays as it is."""
        return f"{self.shard.resolve()}/{self.column}@{self.row}{_TURNED * self.upright}"

    def open(self) -> io.BytesIO:
        """Returns the image file's bytes as a file."""
        from training.readers.columnar import read_image

        return io.BytesIO(read_image(self.shard, self.column, self.row))


@dataclass(frozen=True)
class UprightFile:
    """An image file whose EXIF rotation is applied when it is read; used like a `Path`."""

    path: Path
    upright: bool = True

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def stat(self) -> os.stat_result:
        """Returns the status of the file."""
        return self.path.stat()

    def resolve(self) -> str:
        """Returns a name that differs from the one of the same file without the rotation."""
        return f"{self.path.resolve()}{_TURNED}"

    def open(self) -> BinaryIO:
        """Opens the file."""
        return open(self.path, "rb")


ImageFile = Path | ShardMember | EmbeddedImage | UprightFile


def upright(image: ImageFile) -> ImageFile:
    """Returns the same image, to be read with the rotation in its EXIF data."""
    return replace(image, upright=True) if is_dataclass(image) else UprightFile(image)


def is_leftover(name: str) -> bool:
    """Returns whether a path names what systems leave in folders: hidden files and folders, Thumbs.db and others."""
    parts = name.split("/")
    return any((p.startswith(".") and p not in (".", "..")) or p.lower() in _LEFTOVERS for p in parts)


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Applies a function to every item in threads, for functions that wait for the disk; results keep the order."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(function, items))


def read_json(path: Path) -> object:
    """Reads a UTF-8 JSON file.

    Raises:
        ValueError: the file is broken; the message names the file and the position.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: broken JSON ({error}); fetch the file again") from error


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """Reads a JSON-lines file of objects.

    Returns:
        (``FILE line N``, object) for each line that is not blank.

    Raises:
        ValueError: a line is broken or not an object; the message names file and line.
    """
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
    """Returns ``row[key]``, a string.

    Raises:
        ValueError: `row` is not an object, or has no string under `key`; the message begins with `where`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if not isinstance(row.get(key), str):
        raise ValueError(f"{where}: expected text under {key!r}, found keys {sorted(row)[:8]}")
    return row[key]


def require_dir(path: str | Path, flag: str) -> Path:
    """Returns the path of a folder; raises FileNotFoundError that names `flag` if there is no such folder."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{flag} {path}: no such folder")
    return path


def matching_files(pattern: str) -> list[str]:
    """Returns the file of this name, else all files that match the name as a pattern, sorted.

    If the folder part names an existing folder, its characters are not treated as a pattern.
    """
    folder, name = os.path.split(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(glob.glob(os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name)))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that puts ``2`` before ``10``."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def first_present(places: Sequence[Sequence[Path]]) -> list[Path]:
    """Returns for each file the first of its possible paths that exists; if none exists, the first path."""
    return parallel_map(lambda own: next((p for p in own if file_identity(p) is not None), own[0]), places)


def file_identity(path: ImageFile) -> object | None:
    """Returns a value that is equal for paths to the same file that is read alike; None if there is no file.

    The value is (device, inode), or the path itself if the file system has no inodes.
    """
    if isinstance(path, UprightFile):
        found = file_identity(path.path)
        return found and (found, "upright")
    if hasattr(path, "shard"):  # in a tar or Parquet file
        return path if isinstance(path.shard, str) or path.shard.is_file() else None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else path
