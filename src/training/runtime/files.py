"""Atomic replacement of files, and appending of whole lines."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

# What file systems without fsync answer: CIFS, FUSE and shared folders of virtual machines.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOTTY, errno.EPERM}


@contextmanager
def atomic_write(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder; after the block, the file is flushed to disk and renamed.

    Readers see either the old file or the complete new one, even after a crash or a power failure. The temporary name
    is unique, so several processes may write the same file; the last one wins. If the block raises, the temporary file
    is removed. Storage that can't flush is used without flushing.

    Args:
        path: the file.
        flush: False for a cache of files with checksums: faster, but a power failure may leave a broken file.

    Raises:
        OSError: the file could not be written or flushed, such as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        if flush:
            _flush(temporary)
        os.replace(temporary, path)
        if flush:
            with suppress(OSError):  # the file is complete; without this, a power failure may undo the rename
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise


def append_line(path: Path, line: str) -> None:
    """Appends a line in one write, so that processes do not mix their lines; ends half a line that a crash left.

    Raises:
        OSError: the file can't be written; on a full disk, nothing of the line is left.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # storage without locks
            fcntl.flock(file, fcntl.LOCK_EX)  # otherwise a line that is just being written looks like half a line
        size = os.fstat(file).st_size
        is_whole = not size or os.pread(file, 1, size - 1) == b"\n"
        content = (b"" if is_whole else b"\n") + line.encode("utf-8", "backslashreplace") + b"\n"
        if os.write(file, content) < len(content):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)
