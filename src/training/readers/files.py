"""Files, local or at URLs, images in files, JSON with errors that name the line, and many small reads in parallel."""

import glob
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, TypeVar

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "jfif", "jpe", "avif", "heic", "heif", "bmp", "gif", "tif", "tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".jsonl", ".json")
METADATA = ("metadata.parquet", "metadata.jsonl", "metadata.csv")  # beside images, in the hub's folders of images

_LEFTOVERS = ("__macosx", "thumbs.db", "desktop.ini")

T = TypeVar("T")
R = TypeVar("R")
NUM_THREADS = 32  # a network disk answers one small request in milliseconds; the waiting overlaps


@dataclass(frozen=True)
class StoredImage:
    """An image to read with or without the rotation in its EXIF data; used like a `Path`.

    Attributes:
        shard: the file or, for some subclasses, the URL of the file that holds the image.
        upright: apply the rotation.
    """

    shard: Path | str
    upright: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        return str(self.shard)

    @property
    def name(self) -> str:
        return os.path.basename(self.shard)

    def stat(self) -> os.stat_result | SimpleNamespace:
        """Returns the status of the file, because its change is a change of the content."""
        if isinstance(self.shard, Path):
            return self.shard.stat()
        size, changes = identity(self.shard)
        return SimpleNamespace(st_size=size, st_mtime_ns=changes)

    def resolve(self) -> str:
        """Returns a name that no other content has while the file stays as it is."""
        return repr(replace(self, shard=self.shard.resolve()) if isinstance(self.shard, Path) else self)

    def open(self) -> BinaryIO:
        """Returns the content as a file."""
        return open(self.shard, "rb")


@dataclass(frozen=True)
class ShardMember(StoredImage):
    """A file inside a tar file, read in place.

    Attributes:
        offset, size: position and length of the content in the tar file, in bytes.
        member: the file's name inside the tar file.
    """

    offset: int
    size: int
    member: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    def open(self) -> BinaryIO:
        return io.BytesIO(read_range(self.shard, self.offset, self.size))


@dataclass(frozen=True)
class EmbeddedImage(StoredImage):
    """An image in a cell of a Parquet or Arrow file, read when it is needed.

    Attributes:
        column: the name of the column, which holds bytes, or structs with ``bytes``.
        row: counted from 0.
    """

    column: str
    row: int

    def __str__(self) -> str:
        return f"{self.shard}, row {self.row + 1}"

    @property
    def name(self) -> str:
        return f"{os.path.basename(self.shard)}-{self.row + 1}"

    def open(self) -> BinaryIO:
        from training.readers.columnar import read_image  # imports pyarrow

        return io.BytesIO(read_image(Path(self.shard), self.column, self.row))


def upright(image: Path | StoredImage) -> StoredImage:
    """Returns the same image, to be read with the rotation in its EXIF data."""
    return replace(image, upright=True) if isinstance(image, StoredImage) else StoredImage(image, upright=True)


@contextmanager
def naming(flag: str, remedy: str = "") -> Iterator[None]:
    """Puts a flag in front of the message of a ValueError or OSError that its value causes, if it names none itself.

    Args:
        flag: the flag.
        remedy: what to do about a missing file, added to the message.

    Raises:
        FileNotFoundError, ValueError: with the flag.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error) if str(error).startswith("--") else f"{flag} {error}"
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(message + (f"; {remedy}" if remedy else "")) from error
        raise ValueError(message) from error


def is_leftover(name: str) -> bool:
    """Returns whether a path names what systems leave in folders: hidden files and folders, Thumbs.db and others."""
    parts = name.split("/")
    return any((p.startswith(".") and p not in (".", "..")) or p.lower() in _LEFTOVERS for p in parts)


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Applies a function to every item in threads, for functions that wait for the disk; results keep the order."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(function, items))


def read_text(path: Path) -> str:
    """Reads a text file; raises ValueError that names it if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); fetch the file again") from error


def _parsed(text: str, where: str | Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON ({error}); fetch or write it again") from error


def read_json(path: Path) -> object:
    """Reads a UTF-8 JSON file.

    Raises:
        ValueError: the file is broken; the message names the file and the position.
    """
    return _parsed(read_text(path), path)


def read_json_object(path: Path) -> dict:
    """Reads a UTF-8 JSON file of an object.

    Raises:
        ValueError: the file is broken, or contains something else.
    """
    return _object(read_json(path), path)


def _object(value: object, where: str | Path) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """Reads a JSON-lines file of objects.

    Returns:
        (``FILE line N``, object) for each line that is not blank.

    Raises:
        ValueError: a line is broken or not an object; the message names file and line.
    """
    lines = [(f"{path} line {n}", line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    return [(where, _object(_parsed(line, where), where)) for where, line in lines]


def text_field(row: object, key: str, where: str | Path) -> str:
    """Returns ``row[key]``, a string.

    Raises:
        ValueError: `row` is not an object, or has no string under `key`; the message begins with `where`.
    """
    found = _object(row, where)
    if not isinstance(found.get(key), str):
        raise ValueError(f"{where}: expected text under {key!r}, found keys {sorted(found)[:8]}")
    return found[key]


def require_dir(path: str | Path) -> Path:
    """Returns the path of a folder; raises FileNotFoundError if there is no such folder."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    return path


def find_by_name(root: Path, names: Set[str]) -> dict[str, list[Path]]:
    """Returns file name -> its paths, for each of the names that is in a folder or anywhere below it."""
    found: dict[str, list[Path]] = {}
    for folder, _, files in os.walk(root, followlinks=True):
        for name in names & set(files):
            found.setdefault(name, []).append(Path(folder, name))
    return found


def expand_name(name: str) -> list[str]:
    """Returns the names that a name stands for; a file or folder with exactly this name stands for itself.

    Args:
        name: with ``{000..123}``, ``~``, ``${NAME}`` for an environment variable, or as ``file:PATH``. In a
            ``pipe:COMMAND``, the shell expands variables.

    Raises:
        ValueError: a variable is not set.
    """
    from braceexpand import braceexpand

    if not os.path.exists(name) and not name.startswith("pipe:"):
        name = os.path.expanduser(os.path.expandvars(name))
        if missing := re.search(r"\$\{(\w+)\}", name):
            raise ValueError(f"{name}: the environment variable {missing[1]} is not set")
        name = re.sub("^file:(//(localhost)?(?=/))?", "", name)
    return [name] if os.path.exists(name) or "{" not in name else list(braceexpand(name))


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


def file_identity(path: Path | StoredImage) -> object | None:
    """Returns a value that is equal for paths to the same file that is read alike; None if there is no file.

    The value is (device, inode), or the path itself if the file system has no inodes.
    """
    if isinstance(path, StoredImage):
        file = path.shard if isinstance(path.shard, str) else file_identity(path.shard)
        return file and ((file, path.upright) if type(path) is StoredImage else path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else path


def file_system(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Raises:
        ValueError: the kind of URL is unknown, or its package is not installed; the message names it.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from error


@lru_cache(maxsize=10_000)
def identity(url: str) -> tuple[int, str]:
    """Returns (size, a text that changes with the content) of a file at a URL, as its file system reports them."""
    fs, path = file_system(url)
    info = fs.info(path)
    changing = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime")
    return info.get("size") or 0, next((str(info[key]) for key in changing if info.get(key)), "")


def read_range(url: str | Path, offset: int, size: int) -> bytes:
    """Returns a part of a file, local or at a URL."""
    if isinstance(url, str):
        fs, path = file_system(url)
        return fs.cat_file(path, start=offset, end=offset + size)
    with open(url, "rb") as file:
        file.seek(offset)
        return file.read(size)
