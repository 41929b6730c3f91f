"""Files that are whole or not there: the one way in which this project replaces a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder; when the block ends, the file is flushed to disk and renamed.

    A reader sees the old file or the complete new one, also after a crash or a power cut. The temporary name is unique,
    so several processes may write the same file; the last one wins. If the block raises, nothing is left behind.
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
            os.fsync(folder)  # without this a power cut may undo the rename
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
