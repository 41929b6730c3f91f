"""Files at URLs, through fsspec."""

from functools import lru_cache
from pathlib import Path
from typing import Any


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
