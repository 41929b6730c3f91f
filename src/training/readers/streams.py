"""Opens shards wherever they are: local files, URLs of any fsspec file system, the output of commands, compressed."""

import atexit
import bz2
import glob
import gzip
import logging
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

from training.readers.files import matching_files, parallel_map
from training.readers.remote import file_system
from training.readers.tar import BrokenTarError

BLOCK_BYTES = 1 << 20  # bytes per request to an object store: large enough that its latency does not dominate
_MAGIC = 6


class Pipe:
    """The output of a shell command, read as a file.

    Args:
        command: the command; its input is empty.

    Raises:
        OSError: raised by `close` if all output was read and the command failed.
    """

    def __init__(self, command: str):
        self.command, self.at_end = command, False
        self.process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def read(self, size: int = -1) -> bytes:
        """Reads bytes; fewer than `size` only at the end."""
        data = self.process.stdout.read(size)
        self.at_end |= len(data) < size or size < 0
        return data

    def close(self) -> None:
        """Ends the command if there is unread output."""
        if not self.at_end:
            self.process.kill()
        self.process.stdout.close()
        code = self.process.wait()
        if self.at_end and code not in (0, 141):  # 141: head has closed its input
            raise OSError(f"exit code {code}")


class _Rest:
    """A stream whose first bytes have been read already."""

    closed = False

    def __init__(self, head: bytes, stream: IO[bytes]):
        self.head, self.stream = head, stream

    def read(self, size: int = -1) -> bytes:
        head, self.head = (self.head, b"") if size < 0 else (self.head[:size], self.head[size:])
        return head + self.stream.read(size - len(head) if size >= 0 else size) if size else b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.stream.close()


class _Unpacked:
    """The content of a compressed stream, read from its beginning."""

    def __init__(self, content: IO[bytes], packed: IO[bytes], name: str):
        self.content, self.packed, self.name = content, packed, name

    def read(self, size: int = -1) -> bytes:
        try:
            return self.content.read(size)
        except Exception as error:  # zlib.error, LZMAError, EOFError and others, which have no common base
            raise BrokenTarError(f"{self.name}: broken compression ({error})") from error

    def close(self) -> None:
        self.packed.close()


def _zstd(stream: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")


_UNPACKERS = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def is_local(url: str) -> bool:
    """Returns whether a shard is a plain file rather than a URL or ``pipe:COMMAND``."""
    return "://" not in url and not url.startswith("pipe:")


def open_stream(url: str) -> tuple[IO[bytes], int | None]:
    """Opens a shard for reading; compressed ones (gzip, bzip2, xz, zstd) are unpacked while they are read.

    Args:
        url: a path, a URL, or ``pipe:COMMAND``.

    Returns:
        The stream, and its size in bytes; None if it can only be read from beginning to end.

    Raises:
        OSError, ValueError: the file or URL can't be opened; file systems of fsspec may raise other errors.
    """
    if url.startswith("pipe:"):
        stream, size = Pipe(url.removeprefix("pipe:")), None
    elif is_local(url):
        stream = open(url, "rb", buffering=1 << 16)
        status = os.fstat(stream.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
    else:
        fs, path = file_system(url)
        stream = fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
        size = stream.size
    head = stream.read(_MAGIC)
    unpack = next((unpack for magic, unpack in _UNPACKERS.items() if head.startswith(magic)), None)
    if size is None or unpack:
        stream = _Rest(head, stream)
    else:
        stream.seek(0)
    if unpack is None:
        return stream, size
    _say_compressed()
    return _Unpacked(unpack(stream), stream, url), None


@cache
def _say_compressed() -> None:
    logging.warning("compressed shards are read slowly, always from their beginning; plain .tar is faster")


@cache
def local_copy(url: str) -> str:
    """Returns a shard from which parts can be read: the same one, or an unpacked copy that is removed at the end.

    Raises:
        OSError, ValueError: see `open_stream`.
    """
    stream, size = open_stream(url)
    if size is not None:
        stream.close()
        return url
    folder = tempfile.mkdtemp(prefix="shards-")
    atexit.register(_remove, folder, os.getpid())
    path = os.path.join(folder, "shard.tar")
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file, BLOCK_BYTES)
    stream.close()
    return path


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in processes that were forked from the owner
        shutil.rmtree(folder, ignore_errors=True)


def expand_shards(name: str) -> list[str]:
    """Returns the shards that a name stands for; local shards that don't exist are included.

    Args:
        name: a file, a folder (all its ``*.tar``), or paths and URLs with ``{000..123}`` or ``*``. ``${NAME}`` is an
            environment variable. A file with exactly this name is returned as it is, whatever its characters.

    Raises:
        ValueError: the folder has no shard, nothing matches the pattern of a URL, or a variable is not set.
    """
    if os.path.isfile(name):
        return [name]
    if not name.startswith("pipe:"):  # the shell expands variables
        name = _with_variables(name)
    if name.startswith("file:"):
        name = re.sub("^file:(//(localhost)?(?=/))?", "", name)
    if os.path.isdir(name):
        found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        packed = [
            path for kind in ("gz", "tgz", "zst", "bz2", "xz") for path in glob.glob(f"{glob.escape(name)}/*.{kind}")
        ]
        found = found or sorted(path for path in packed if ".tar." in path or path.endswith(".tgz"))
        if not found:
            raise ValueError(f"{name}: no *.tar in this folder, which holds {_described(name)}")
        return found
    if os.path.isfile(name):
        return [name]
    return [path for paths in parallel_map(_matching, _without_braces(name)) for path in paths]


def _with_variables(name: str) -> str:
    name = os.path.expanduser(os.path.expandvars(name))
    if missing := re.search(r"\$\{(\w+)\}", name):
        raise ValueError(f"{name}: the environment variable {missing[1]} is not set")
    return name


def _without_braces(name: str) -> list[str]:
    from braceexpand import braceexpand

    return list(braceexpand(name)) if "{" in name else [name]


def _matching(name: str) -> list[str]:
    if name.startswith("pipe:"):
        return [name]
    if is_local(name):
        return matching_files(name) or [name]
    if "*" not in name and not name.endswith("/"):
        return [name]
    pattern = f"{name}*.tar" if name.endswith("/") else name
    fs, path = file_system(pattern)
    try:
        found = sorted(fs.glob(path))
    except Exception as error:  # each of fsspec's file systems has its own exceptions
        raise ValueError(f"{pattern}: can't be listed ({type(error).__name__}: {error})") from error
    if not found:
        raise ValueError(f"{pattern}: nothing there")
    return [fs.unstrip_protocol(path) for path in found]


def _described(folder: str) -> str:
    """Describes what a folder holds, for a message."""
    paths = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
    kinds = [path.suffix.lower() or "files without a suffix" for path in paths if path.is_file()]
    counts = [f"{kinds.count(kind):,} {kind}" for kind in sorted(set(kinds), key=kinds.count, reverse=True)[:4]]
    folders = sum(path.is_dir() for path in paths)
    return ", ".join([*counts, f"{folders:,} folders"] if folders else counts) or "nothing"
