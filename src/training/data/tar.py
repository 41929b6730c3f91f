"""Tar shards: how many samples are inside, and the samples as bytes. Nothing in them is unpickled or run."""

import json
import logging
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

SUFFIXES = ("json", "txt", "jpg", "jpeg", "png", "webp")  # what is read of a sample; the rest is passed over
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")  # webdataset and others would run these
MAX_FILE_BYTES = 1 << 28
RETRY_WAITS = (1.0, 4.0, 16.0)  # seconds before each further attempt at a shard that can't be reached
_BLOCK = 512
_NAME_KINDS = (b"L", b"x")  # a member that holds the next one's long name
logger = logging.getLogger(__name__)


class BrokenShardError(OSError):
    """A shard that can't be read (on), whatever it is asked."""

    kind = "broken shard"


class UnreachableShardError(BrokenShardError):
    """A shard that could not be opened or read to its end in several attempts."""

    kind = "unreachable shard"


@dataclass(frozen=True)
class RawSample:
    """Neighbouring members of a shard with the same key, as bytes by suffix; or a table's row.

    Attributes:
        key: name within the shard, or the row's number.
        source: shard's or table's name.
        files: suffix -> content.
        record: captions that come with the row; those of a shard are in its ``json`` and ``txt``.
        image_path: where a row's image is.
        fault: kind of fault that makes the whole sample unusable.
        features: [views, dim] float16 in place of an image: see features.py.
    """

    key: str
    source: str
    files: dict[str, bytes]
    record: dict
    image_path: str | None = None
    fault: str | None = None
    features: np.ndarray | None = None


class Part(NamedTuple):
    """A shard, or a stretch of a table: `read` yields its samples in the order they lie there.

    A part that breaks off raises BrokenShardError.
    """

    name: str
    size: int
    read: Callable[[], Iterator[RawSample]]


def is_local(url: str) -> bool:
    """Whether a shard is a plain file."""
    return "://" not in url and not url.startswith("pipe:")


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a local shard begin.

    Attributes:
        offsets: in bytes, one per sample.
        fault: why the list ends before the file does; None for a whole shard.
    """

    offsets: list[int]
    fault: str | None


def index_shard(path: str | Path) -> ShardIndex:
    """Finds the samples of a local shard by reading its headers only (about 8 ms per 1,000 samples).

    Raises:
        OSError: can't be opened.
    """
    offsets, last_key, long_name, position, member_start = [], None, None, 0, 0
    size_on_disk = os.path.getsize(path)
    with open(path, "rb", buffering=1 << 16) as file:
        while len(header := file.read(_BLOCK)) == _BLOCK and header != bytes(_BLOCK):
            size = _number(header[124:136])
            if header[257:262] != b"ustar" or size is None:
                return ShardIndex(offsets, f"{path}: not a tar file, or broken at byte {position:,}")
            kind = header[156:157]
            body = -(-size // _BLOCK) * _BLOCK
            if kind in _NAME_KINDS:
                content = file.read(body)[:size]
                long_name = content.rstrip(b"\0").decode("utf-8", "replace") if kind == b"L" else _pax_path(content)
            else:
                key = base_plus_ext(long_name or _member_name(header))[0] if kind in (b"0", b"\0") else None
                if key is not None and key != last_key:
                    offsets.append(member_start)
                    last_key = key
                long_name = None
                file.seek(body, os.SEEK_CUR)
            position += _BLOCK + body
            if kind not in _NAME_KINDS:
                member_start = position
    if 0 < len(header) < _BLOCK:
        position += _BLOCK
    if position > size_on_disk:
        return ShardIndex(offsets, f"{path}: cut short, {size_on_disk:,} of at least {position:,} bytes are there")
    return ShardIndex(offsets, None)


def _member_name(header: bytes) -> str:
    name, prefix = (
        header[part].split(b"\0", 1)[0].decode("utf-8", "replace") for part in (slice(100), slice(345, 500))
    )
    return f"{prefix}/{name}" if prefix else name


def _number(field: bytes) -> int | None:
    """A tar header's number, octal text or base 256 for large files; None if it is none."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return None


def _pax_path(content: bytes) -> str | None:
    for line in content.split(b"\n"):
        _, _, entry = line.partition(b" ")
        if entry.startswith(b"path="):
            return entry[5:].decode("utf-8", "replace")
    return None


def read_samples(url: str, first: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Reads the samples number `first` to `stop` of a shard; where the network or disk fails, tries again from there.

    Args:
        url: path, URL or ``pipe:COMMAND``, as webdataset opens them.
        first, stop: sample numbers; None reads to the end.

    Raises:
        BrokenShardError: the shard can't be opened, or breaks off; samples before that have been yielded.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            for sample in _read_once(url, first, stop):
                yield sample
                first += 1
            return
        except (OSError, tarfile.TarError, EOFError, ValueError, IndexError) as error:
            # A remote shard that breaks off may be the connection's fault; a local one is what it is.
            passing = isinstance(error, OSError) or not is_local(url)
            if wait is None or not passing:
                kind = UnreachableShardError if isinstance(error, OSError) else BrokenShardError
                raise kind(f"{url}: {type(error).__name__}: {error}") from error
            logger.warning(f"{url}: {type(error).__name__}: {error}; trying again in {wait:g} s")
        time.sleep(wait)


def _read_once(url: str, first: int, stop: int | None) -> Iterator[RawSample]:
    if stop is not None and first >= stop:
        return
    number, source = 0, os.path.basename(url)
    if is_local(url):
        stream = open(url, "rb")
        if first:
            stream.seek(index_shard(url).offsets[first])
            number = first
    else:
        stream = gopen(url)
    with stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        sample = None
        for member in tar:
            base, suffix = base_plus_ext(member.name) if member.isreg() else (None, None)
            if base is None:
                continue
            if sample is None or base != sample.key:
                if sample is not None:
                    if number >= first:
                        yield sample
                    number += 1
                if number == stop:
                    return
                sample = RawSample(base, source, {}, {})
            if number >= first:
                sample = _with_file(sample, suffix.lower(), tar, member)
        if sample is not None and number >= first:
            yield sample


def _with_file(sample: RawSample, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> RawSample:
    if suffix in PICKLES or (suffix == "npy" and _holds_objects(tar.extractfile(member).read(_BLOCK))):
        return replace(sample, fault="pickled data")
    if suffix not in SUFFIXES:
        return sample
    if member.size > MAX_FILE_BYTES:
        return replace(sample, fault="file too large")
    sample.files[suffix] = tar.extractfile(member).read()
    return sample


def _holds_objects(npy: bytes) -> bool:
    """Whether an array's header says that its elements are pickled; one that can't be read is passed over anyway."""
    header = npy.split(b"\n", 1)[0]
    return b"|O" in header or b"'O" in header


def read_sizes(folder_url: str) -> dict[str, int]:
    """Returns shard name -> samples from the ``sizes.json`` beside the shards; empty if there is none."""
    url = f"{folder_url}/sizes.json" if folder_url else "sizes.json"
    try:
        with open(url, "rb") if is_local(url) else gopen(url) as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return {}
    return {str(k): v for k, v in content.items() if isinstance(v, int)} if isinstance(content, dict) else {}
