"""Samples of tar shards as bytes, and where they begin; no content is ever executed.

A sample is a run of consecutive members whose names agree up to the first full stop of the file name: ``a/0001.jpg``
and ``a/0001.json``. A repeated name begins a new sample, and so does a new archive in a file that was made by
``cat a.tar b.tar``. Hidden files (``._0001.jpg`` of macOS) belong to no sample.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.readers.files import IMAGE_SUFFIXES, identity
from training.readers.streams import is_local, open_stream
from training.readers.tar import BrokenTarError, Member, TarReader, key_and_suffix
from training.runtime.files import atomic_write
from training.runtime.messages import warn_once

if TYPE_CHECKING:
    import numpy as np

TEXT_SUFFIXES = ("json", "txt")
SUFFIXES = (*TEXT_SUFFIXES, *IMAGE_SUFFIXES)  # the files of a sample that are read; others are ignored
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")  # webdataset and other libraries would execute these
MAX_BYTES = dict.fromkeys(TEXT_SUFFIXES, 1 << 24) | dict.fromkeys(IMAGE_SUFFIXES, 1 << 28)
# Advice that evaluation and training give alike.
OF_ONE_SAMPLE = "the files of a sample must be next to each other in the tar: tar --sort=name"
SEVERAL_LINES = (
    "a .txt of several lines; each file is one caption. If each line is a caption of its own, add --caption-lines"
)
RETRY_WAITS = (1.0, 4.0, 16.0)  # seconds to wait before each new attempt to reach a shard
INDEX_CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "lotlip", "shards")
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
        number: index in the shard, from 0.
        members: suffix in lower case -> the file in the shard.
    """

    key: str
    source: str
    files: dict[str, bytes]
    record: dict
    image_path: str | None = None
    fault: str | None = None
    features: "np.ndarray | None" = None
    number: int = 0
    members: Mapping[str, Member] = field(default_factory=dict, compare=False)

    @property
    def image(self) -> bytes | None:
        """The content of the image file; None if there is none."""
        return next((self.files[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.files), None)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.source}/{self.key}" if self.key else self.source

    @property
    def start(self) -> int:
        """The byte of the shard where the sample begins."""
        return min(member.start for member in self.members.values())


def lost_sample(error: BrokenShardError) -> RawSample:
    """Returns what stands for a sample that can't be read because its shard is broken: no key, and the fault."""
    return RawSample("", str(error), {}, {}, fault=error.kind)


class Part(NamedTuple):
    """A shard, or consecutive rows of a table.

    `read` yields its samples in file order, and raises BrokenShardError at the position where a file is broken.
    """

    name: str
    size: int
    read: Callable[[], Iterator[RawSample]]


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard begin.

    Attributes:
        offsets: position of each sample in bytes; if there is a fault, the last sample may be incomplete.
        fault: why the list ends before the end of the file; None if it doesn't.
    """

    offsets: list[int]
    fault: str | None


def index_shard(url: str | Path, stop: int | None = None) -> ShardIndex:
    """Finds the samples of a shard from its headers (about 20 ms per 1,000 samples on a local disk).

    Args:
        url: the shard.
        stop: maximum number of samples; None reads to the end.

    Raises:
        OSError: the file can't be opened, or not be read in several attempts.
    """
    offsets: list[int] = []
    try:
        samples = read_samples(str(url), load=(), waits=() if is_local(str(url)) else None)
        for sample in islice(samples, stop):
            offsets.append(sample.start)
    except BrokenShardError as error:
        cause = error.__cause__
        if not isinstance(cause, BrokenTarError):
            raise cause if isinstance(cause, OSError) else error
        return ShardIndex(offsets if cause.sample_start is None else [*offsets, cause.sample_start], str(error))
    return ShardIndex(offsets, None)


def cached_index(url: str, folder: str) -> ShardIndex:
    """Returns the index of a shard at a URL, from a file in `folder` if the shard has not changed since.

    Raises:
        OSError: see `index_shard`.
    """
    path, now = _cache_file(url, folder), list(identity(url))
    known = _load_index(path)
    if known and known["identity"] == now:
        return ShardIndex(known["offsets"], known["fault"])
    index = index_shard(url)
    try:
        with atomic_write(path) as temporary:
            content = {"url": url, "identity": now, "offsets": index.offsets, "fault": index.fault}
            temporary.write_text(json.dumps(content))
        _load_index.cache_clear()
    except OSError as error:
        warn_once(f"--index-cache {folder}: can't be written ({error}); shards are indexed again in the next run")
    return index


def _cache_file(url: str, folder: str) -> Path:
    return Path(folder) / f"{sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"


@lru_cache(maxsize=64)
def _load_index(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_samples(
    url: str,
    first: int = 0,
    stop: int | None = None,
    load: Sequence[str] = SUFFIXES,
    index_cache: str | None = None,
    waits: Sequence[float] | None = None,
) -> Iterator[RawSample]:
    """Reads samples of a shard; after a failure of network or disk, tries again from the first sample not yet read.

    Args:
        url: path, URL or ``pipe:COMMAND``.
        first, stop: number of the first sample, and the number before which to stop; None reads to the end.
        load: suffixes of the files whose content is read; the others are passed over.
        index_cache: folder of `cached_index`, which tells where samples of remote shards begin.
        waits: seconds to wait before each new attempt; None means `RETRY_WAITS`.

    Raises:
        BrokenShardError: the shard can't be opened, or is broken; the samples before the break have been yielded.
    """
    known = _load_index(_cache_file(url, index_cache)) if first and index_cache and not is_local(url) else None
    position = (first, known["offsets"][first]) if known and first < len(known["offsets"]) else (0, 0)
    for wait in (*(RETRY_WAITS if waits is None else waits), None):
        try:
            if stop is not None and first >= stop:
                return
            for sample in _read_once(url, first, stop, position, load):
                yield sample
                first, position = sample.number + 1, (sample.number, sample.start)
            return
        except Exception as error:  # each of fsspec's file systems has its own exceptions
            # If a remote shard breaks off, the connection may be at fault; a broken local shard will not get better.
            passing = isinstance(error, OSError) or not is_local(url)
            broken = isinstance(error, BrokenTarError)
            if not passing and not isinstance(error, ValueError):
                raise
            name = str(error) if broken else f"{url}: {type(error).__name__}: {error}"
            if wait is None or not passing:
                raise (BrokenShardError if broken else UnreachableShardError)(name) from error
            logger.warning(f"{name}; trying again in {wait:g} s")
        time.sleep(wait)


def _read_once(
    url: str, first: int, stop: int | None, position: tuple[int, int], load: Sequence[str]
) -> Iterator[RawSample]:
    stream, size = open_stream(url)
    number, begin = position if size is not None else (0, 0)
    source, num_pickles = os.path.basename(url), 0
    try:
        if begin:
            stream.seek(begin)
        for key, members, files in _grouped(TarReader(stream, url, size, begin), max(first - number, 0), load):
            num_pickles += sum(suffix in members for suffix in PICKLES)
            if number >= first:
                key = key.encode("utf-8", "backslashreplace").decode()
                yield RawSample(key, source, files, {}, fault=_fault(members), number=number, members=members)
            number += 1
            if number == stop:
                return
        if num_pickles:
            warn_once(f"{source}: {num_pickles:,} files of pickled data ({', '.join(PICKLES)}) are left out")
    finally:
        stream.close()


def _grouped(
    tar: TarReader, skip: int, load: Sequence[str]
) -> Iterator[tuple[str, dict[str, Member], dict[str, bytes]]]:
    """Yields (key, suffix -> member, suffix -> content) of each sample; contents are not loaded for the first `skip`.

    Raises:
        BrokenTarError: see `TarReader.members`; raised instead of yielding the sample that is incomplete.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    files: dict[str, bytes] = {}
    try:
        for member in chain(tar.members(), [None]):  # None: an archive ends
            its_key, suffix = key_and_suffix(member.name) if member and member.kind != "other" else (None, "")
            if member and its_key is None:
                continue
            if key is not None and members and (its_key != key or suffix in members):
                yield key, members, files
                members, files, skip = {}, {}, skip - 1
            if member:
                key, members[suffix] = its_key, member
                if skip <= 0 and suffix in load and not _fault({suffix: member}):
                    files[suffix] = tar.read(member)
    except BrokenTarError as error:
        error.sample_start = min((member.start for member in members.values()), default=None)
        raise


def _fault(members: Mapping[str, Member]) -> str | None:
    """Returns why a sample can't be used: a caption or image that can't be read or is larger than one can be."""
    used = {suffix: members[suffix] for suffix in SUFFIXES if suffix in members}
    kinds = {member.kind for member in used.values()}
    if any(member.size > MAX_BYTES[suffix] for suffix, member in used.items()):
        return "file too large"
    return "sparse file" if "sparse" in kinds else "link in the tar" if "link" in kinds else None
