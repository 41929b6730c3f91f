"""Atomic replacement of files, used for all files that this project replaces."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; after the block, the file is flushed to disk and renamed.

    Readers see either the old file or the complete new one, even after a crash or a power failure. The temporary name
    is unique, so several processes may write the same file; the last one wins. If the block raises, the temporary file
    is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise a power failure may undo the rename
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
