"""Opens shards wherever they are: local files, URLs of any fsspec file system, the output of commands, compressed."""

import glob
import io
import os
import shutil
import stat
import subprocess
import tempfile
from collections import Counter
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import IO, cast

from training.readers.files import expand_name, file_system, matching_files, parallel_map
from training.readers.tar import BrokenTarError
from training.runtime.messages import warn_once

BLOCK_BYTES = 1 << 20  # bytes per request to an object store: large enough that its latency does not dominate
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2")
_CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes of the file -> pyarrow's name
_copies: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


class Pipe(io.BufferedReader):
    """The output of a shell command, read as a file.

    Args:
        command: the command; its input is empty.

    Raises:
        OSError: raised by `close` if all output was read and the command failed.
    """

    def __init__(self, command: str):
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        self.process = subprocess.Popen(command, shell=True, bufsize=0, stdin=nothing, stdout=pipe)
        self.at_end = False
        super().__init__(cast(io.RawIOBase, self.process.stdout), 1 << 16)

    def read(self, size: int | None = -1) -> bytes:
        """Reads bytes; fewer than `size` only at the end."""
        data = super().read(size)
        self.at_end |= size is None or len(data) < size or size < 0
        return data

    def close(self) -> None:
        """Ends the command if there is unread output."""
        if self.closed:
            return
        if not self.at_end:
            self.process.kill()
        super().close()
        code = self.process.wait()
        if self.at_end and code not in (0, 141):  # 141: head has closed its input
            raise OSError(f"exit code {code}")


class _Unpacked:
    """The content of a compressed stream, read from its beginning."""

    def __init__(self, packed: io.BufferedReader, codec: str, name: str):
        import pyarrow

        self.content = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), codec)
        self.packed, self.name = packed, name

    def read(self, size: int = -1) -> bytes:
        try:
            return self.content.read(size)
        except Exception as error:  # whatever the codec and the stream below it raise
            raise BrokenTarError(f"{self.name}: broken compression ({error})") from error

    def close(self) -> None:
        self.packed.close()


def is_local(url: str) -> bool:
    """Returns whether a shard is a plain file rather than a URL or ``pipe:COMMAND``."""
    return "://" not in url and not url.startswith("pipe:")


def open_stream(url: str) -> tuple[IO[bytes], int | None]:
    """Opens a shard for reading; compressed ones (gzip, bzip2, zstd) are unpacked while they are read.

    Args:
        url: a path, a URL, or ``pipe:COMMAND``.

    Returns:
        The stream, and its size in bytes; None if it can only be read from beginning to end.

    Raises:
        OSError, ValueError: the file or URL can't be opened; file systems of fsspec may raise other errors.
    """
    stream: io.BufferedReader
    if url.startswith("pipe:"):
        stream, size = Pipe(url.removeprefix("pipe:")), None
    elif is_local(url):
        stream = io.BufferedReader(io.FileIO(url), 1 << 16)
        status = os.fstat(stream.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
    else:
        fs, path = file_system(url)
        remote = fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
        stream, size = io.BufferedReader(remote), remote.size
    head = stream.peek(max(map(len, _CODECS)))
    codec = next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)
    if codec is None:
        return stream, size
    warn_once("compressed shards are read slowly, always from their beginning; plain .tar is faster")
    return cast(IO[bytes], _Unpacked(stream, codec, url)), None


@cache
def local_copy(url: str) -> str:
    """Returns a shard from which parts can be read: the same one, or an unpacked copy that is removed at the end.

    Raises:
        OSError, ValueError: see `open_stream`.
    """
    stream, size = open_stream(url)
    with closing(stream):
        if size is not None:
            return url
        _copies.append(tempfile.TemporaryDirectory(prefix="shards-"))
        path = os.path.join(_copies[-1].name, "shard.tar")
        with open(path, "wb") as file:
            shutil.copyfileobj(stream, file, BLOCK_BYTES)
    return path


def expand_shards(name: str) -> list[str]:
    """Returns the shards that a name stands for; local shards that don't exist are included.

    Args:
        name: a folder (all its ``*.tar``), a URL or ``pipe:COMMAND``, also with ``*``, or an argument of `expand_name`.

    Raises:
        ValueError: the folder has no shard, nothing matches the pattern of a URL, or a variable is not set.
    """
    names = expand_name(name)
    if names and os.path.isdir(names[0]):
        (folder,) = names
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.t*")))
        found = [path for path in paths if path.endswith(".tar")] or [path for path in paths if path.endswith(_PACKED)]
        if not found:
            others = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
            kinds = Counter(sorted("folders" if p.is_dir() else p.suffix or "files without suffix" for p in others))
            found_kinds = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
            raise ValueError(f"{folder}: no *.tar in this folder, which holds {found_kinds}")
        return found
    return [path for paths in parallel_map(_matching, names) for path in paths]


def _matching(name: str) -> list[str]:
    if name.startswith("pipe:"):
        return [name]
    if is_local(name):
        return matching_files(name) or [name]
    pattern = f"{name}*.tar" if name.endswith("/") else name
    if "*" not in pattern:
        return [name]
    fs, path = file_system(pattern)
    try:
        found = sorted(fs.glob(path))
    except Exception as error:  # each of fsspec's file systems has its own exceptions
        raise ValueError(f"{pattern}: can't be listed ({type(error).__name__}: {error})") from error
    if not found:
        raise ValueError(f"{pattern}: nothing there")
    return [fs.unstrip_protocol(path) for path in found]
