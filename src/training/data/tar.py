"""Tar shards, local or remote: reads the samples as bytes and finds where they begin; no content is ever executed."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from webdataset.gopen import Pipe, gopen

from training.readers.files import IMAGE_SUFFIXES
from training.readers.tar import BrokenTarError, Member, TarReader, TarSample, is_local

SUFFIXES = ("json", "txt", *IMAGE_SUFFIXES)  # the files of a sample that are read; others are ignored
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")  # webdataset and other libraries would execute these
MAX_FILE_BYTES = 1 << 28
RETRY_WAITS = (1.0, 4.0, 16.0)  # seconds to wait before each new attempt to reach a shard
_NPY_HEADER = 512  # bytes at the start of an array's file that tell its type
logger = logging.getLogger(__name__)


class BrokenShardError(OSError):
    """A shard that can't be read, or can't be read any further."""

    kind = "broken shard"


class UnreachableShardError(BrokenShardError):
    """A shard that could not be opened or read to its end in several attempts."""

    kind = "unreachable shard"


@dataclass(frozen=True)
class RawSample:
    """A sample before decoding: consecutive members of a shard with the same key, or a row of a table.

    Attributes:
        key: name within the shard, or number of the row.
        source: name of the shard or table.
        files: suffix -> content.
        record: captions of a row; the captions of a shard are in its ``json`` and ``txt`` files.
        image_path: path of a row's image.
        fault: kind of fault that makes the whole sample unusable.
        features: [views, dim] float16, instead of an image; see features.py.
    """

    key: str
    source: str
    files: dict[str, bytes]
    record: dict
    image_path: str | None = None
    fault: str | None = None
    features: np.ndarray | None = None

    @property
    def image(self) -> bytes | None:
        """The content of the image file; None if there is none."""
        return next((self.files[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.files), None)


class Part(NamedTuple):
    """A shard, or consecutive rows of a table.

    `read` yields its samples in file order, and raises BrokenShardError at the place where a file is broken.
    """

    name: str
    size: int
    read: Callable[[], Iterator[RawSample]]


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a local shard begin.

    Attributes:
        offsets: position of each sample in bytes; if there is a fault, the last sample may be incomplete.
        fault: why the list ends before the end of the file; None if it doesn't.
    """

    offsets: list[int]
    fault: str | None


def index_shard(path: str | Path, stop: int | None = None) -> ShardIndex:
    """Finds the samples of a local shard from its headers (about 20 ms per 1,000 samples).

    Args:
        path: the shard.
        stop: maximum number of samples; None reads to the end.

    Raises:
        OSError: the file can't be opened.
    """
    offsets: list[int] = []

    def note(number: int, _: str, member: Member) -> None:
        if number == len(offsets):
            offsets.append(member.start)

    with open(path, "rb", buffering=1 << 16) as file:
        try:
            for _ in islice(TarReader(file, str(path)).samples(note), stop):
                pass
        except BrokenTarError as error:
            return ShardIndex(offsets, str(error))
    return ShardIndex(offsets, None)


def read_samples(url: str, first: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Reads samples of a shard; after a failure of network or disk, tries again from the first sample not yet read.

    Args:
        url: path, URL or ``pipe:COMMAND``, as webdataset opens them.
        first, stop: number of the first sample, and the number before which to stop; None reads to the end.

    Raises:
        BrokenShardError: the shard can't be opened, or is broken; the samples before the break have been yielded.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            for sample in _read_once(url, first, stop):
                yield sample
                first += 1
            return
        except (OSError, ValueError) as error:  # webdataset raises ValueError for a kind of URL that it doesn't know
            # If a remote shard breaks off, the connection may be at fault; a broken local shard will not get better.
            passing = isinstance(error, OSError) or not is_local(url)
            if wait is None or not passing:
                kind = UnreachableShardError if isinstance(error, OSError) else BrokenShardError
                raise kind(_with_name(url, error)) from error
            logger.warning(f"{_with_name(url, error)}; trying again in {wait:g} s")
        time.sleep(wait)


def _with_name(url: str, error: Exception) -> str:
    return str(error) if isinstance(error, BrokenTarError) else f"{url}: {type(error).__name__}: {error}"


def _read_once(url: str, first: int, stop: int | None) -> Iterator[RawSample]:
    if stop is not None and first >= stop:
        return
    begin, begin_number, source = 0, 0, os.path.basename(url)
    if is_local(url) and first:
        offsets = index_shard(url, first + 1).offsets
        if len(offsets) <= first:
            return
        begin, begin_number = offsets[first], first
    stream, to_the_end = open(url, "rb") if is_local(url) else gopen(url), False
    if begin:
        stream.seek(begin)
    tar = TarReader(stream, url, begin)

    def load(number: int, suffix: str, member: Member) -> bytes | None:
        if begin_number + number < first or member.kind != "file" or member.size > MAX_FILE_BYTES:
            return None
        if suffix == "npy":
            return tar.read(member, _NPY_HEADER)
        return tar.read(member) if suffix in SUFFIXES else None

    try:
        for sample in tar.samples(load):
            number = begin_number + sample.number
            if number >= first:
                files = {suffix: content for suffix, content in sample.loaded.items() if suffix != "npy"}
                key = sample.key.encode("utf-8", "backslashreplace").decode()
                yield RawSample(key, source, files, {}, fault=_fault(sample))
            if number + 1 == stop:
                return
        to_the_end = True
    except (OSError, ValueError):
        to_the_end = True
        raise
    finally:
        _close(stream, to_the_end)


def _close(stream: IO[bytes], to_the_end: bool) -> None:
    """Closes a stream; raises OSError if its command failed, unless the stream was not read to the end."""
    if isinstance(stream, Pipe) and not to_the_end:
        stream.ignore_errors = True
        stream.proc.kill()
    stream.close()


def _fault(sample: TarSample) -> str | None:
    if any(suffix in sample.members for suffix in PICKLES) or _holds_objects(sample.loaded.get("npy", b"")):
        return "pickled data"
    if any(sample.members[s].size > MAX_FILE_BYTES for s in SUFFIXES if s in sample.members):
        return "file too large"
    return sample.fault(SUFFIXES)


def _holds_objects(npy: bytes) -> bool:
    """Tells whether an array's header says that its elements are pickled; arrays are never read in any case."""
    header = npy.split(b"\n", 1)[0]
    return b"|O" in header or b"'O" in header


def read_sizes(folder_url: str) -> dict[str, int]:
    """Returns shard name -> number of samples from the ``sizes.json`` beside the shards; empty if there is none."""
    url = f"{folder_url}/sizes.json" if folder_url else "sizes.json"
    try:
        with open(url, "rb") if is_local(url) else gopen(url) as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return {}
    return {str(k): v for k, v in content.items() if isinstance(v, int)} if isinstance(content, dict) else {}
