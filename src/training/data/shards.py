"""Where training samples come from: tar shards here, tables in tables.py.

A source lays the samples of an epoch out as one sequence of slots. A loader process takes a stretch of it, start to
stop, so any number of processes sees every sample exactly once, however many shards there are. What is read from a
stretch is a function of (seed, epoch, start, stop): the number of slots read is a position to go on from.
"""

import itertools
import logging
import os
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from hashlib import sha256
from typing import Protocol

from dataloaders.files import parallel_map
from dataloaders.table_files import COLUMNAR
from dataloaders.tar import expand_shards, is_local
from training.data.embedded import count_rows, read_rows
from training.data.features import SUFFIX as FEATURES
from training.data.features import count_features, feature_files, is_feature_folder, read_features
from training.data.mixing import SHUFFLE_SHARDS, SHUFFLE_WINDOW, Lane, chosen, mix
from training.data.tar import BrokenShardError, Part, RawSample, index_shard, read_samples, read_sizes

USUAL_SIZE = 10_000  # samples of a shard of unknown size, such as img2dataset writes
MAX_CHECKED_BYTES = 1 << 28  # of shards whose samples are counted to check sizes.json


class Source(Protocol):
    """What a loader process needs.

    Attributes:
        num_samples: in one epoch.
    """

    num_samples: int

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample | BrokenShardError]:
        """Yields what is in slots start..stop of the epoch, without the first `skip` that a call without it yields.

        Each slot gives one item: a sample, or the reason why it can't be read.
        """

    def fingerprint(self) -> str:
        """Returns the same text for sources of which `read` gives the same; a folder may have moved."""


class ShardSource:
    """Tar shards, each sample once an epoch.

    The shards are shuffled anew each epoch. A process reads several shards of its stretch at once and shuffles what it
    reads among windows, so that starting in the middle costs one window, not the epoch.

    Args:
        urls: shards.
        sizes: samples in each.
        seed: of the order.
        window: samples shuffled together.
        lanes: shards read at once, at most. Stretches are cut where shards begin, so that none is read twice for it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sizes: Sequence[int],
        seed: int,
        window: int = SHUFFLE_WINDOW,
        lanes: int = SHUFFLE_SHARDS,
    ):
        self.urls, self.sizes = list(urls), list(sizes)
        self.seed, self.window, self.lanes = seed, window, lanes
        self.num_samples = sum(sizes)

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample | BrokenShardError]:
        order = list(range(len(self.urls)))
        random.Random(f"{self.seed}/{epoch}/shards").shuffle(order)
        ends = list(itertools.accumulate(self.sizes[i] for i in order))
        borders = sorted(set(ends[bisect_right(ends, start) : bisect_left(ends, stop)]))
        cuts = [start, *chosen(borders, self.lanes - 1), stop]
        lanes = [
            Lane(end - begin, lambda done, begin=begin, end=end: self._in_order(order, ends, begin + done, end))
            for begin, end in itertools.pairwise(cuts)
        ]
        yield from mix(lanes, self.window, f"{self.seed}/{epoch}/{start}", skip)

    def parts(self) -> list[Part]:
        """The shards."""
        return [Part(os.path.basename(u), size, partial(read_shard, u)) for u, size in zip(self.urls, self.sizes)]

    def fingerprint(self) -> str:
        """As `Source.fingerprint`."""
        return _fingerprint("shards 3", _names(self.urls), self.sizes, self.seed, self.window, self.lanes)

    def _in_order(self, order, ends, start, stop) -> Iterator[RawSample | BrokenShardError]:
        for place in range(bisect_right(ends, start), len(order)):
            url, size = self.urls[order[place]], self.sizes[order[place]]
            begin = ends[place] - size
            if begin >= stop:
                return
            yield from read_exactly(url, max(start - begin, 0), min(stop - begin, size), size)


class ResampledShards:
    """Tar shards drawn with replacement, as often as their source's factor says.

    A draw reads a whole shard from a random sample on, and then the samples before that one. So every sample is equally
    likely, however short the share of a process is. A shard of unknown size can only be read from its beginning.

    Args:
        urls: shards.
        factors: how often to draw each, relative to the others.
        num_samples: what counts as an epoch.
        seed, window, lanes: as of `ShardSource`.
        sizes: samples in each, None where that is unknown; local shards are then indexed when they are drawn.
    """

    def __init__(
        self,
        urls: Sequence[str],
        factors: Sequence[float],
        num_samples: int,
        seed: int,
        window: int = SHUFFLE_WINDOW,
        sizes: Sequence[int | None] = (),
        lanes: int = SHUFFLE_SHARDS,
    ):
        self.urls, self.factors = list(urls), list(factors)
        self.num_samples, self.seed, self.window, self.lanes = num_samples, seed, window, lanes
        self.sizes = dict(zip(self.urls, sizes))

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample | BrokenShardError]:
        name, total, number = f"{self.seed}/{epoch}/{start}", stop - start, self._num_lanes(stop - start)

        def lane(k: int) -> Lane:
            size, rng = (total + k) // number, random.Random(f"{name}/lane {k}")
            return Lane(size, lambda done: itertools.islice(self._drawn(rng, done), size - done))

        yield from mix([lane(k) for k in range(number)], self.window, name, skip)

    def _num_lanes(self, num_samples: int) -> int:
        """Lanes of a stretch: a remote shard is read up to where a lane begins, so each lane is as long as a shard."""
        if all(map(is_local, self.urls)):
            return self.lanes
        known = [size for size in self.sizes.values() if size]
        size = sum(known) / len(known) if known else USUAL_SIZE
        return max(1, min(self.lanes, int(num_samples / size)))

    def fingerprint(self) -> str:
        """As `Source.fingerprint`."""
        order = self.seed, self.window, self.lanes
        return _fingerprint("resampled 4", _names(self.urls), self.factors, self.num_samples, *order)

    def _drawn(self, rng: random.Random, skip: int) -> Iterator[RawSample | BrokenShardError]:
        """Yields what one draw after another gives, without the first `skip` items, which are not read if sizes are
        known."""
        while True:
            (url,) = rng.choices(self.urls, self.factors)
            size, fault = self._extent(url)
            first = rng.randrange(size) if size else 0
            if size is None:
                for item in _with_fault(read_shard(url)):
                    if skip:
                        skip -= 1
                    else:
                        yield item
                continue
            num_items = size + bool(fault)
            if skip >= num_items:
                skip -= num_items
                continue
            yield from read_exactly(url, min(first + skip, size), size, size)
            yield from read_exactly(url, max(first + skip - size, 0), first, size)
            if fault:
                yield BrokenShardError(fault)
            skip = 0

    def _extent(self, url: str) -> tuple[int | None, str | None]:
        """Returns (number of readable samples, None if unknown; why a local shard breaks off after them)."""
        size, fault = (self.sizes[url], None) if self.sizes.get(url) is not None else _local_extent(url)
        return size, f"{url}: no sample in it" if size == 0 and not fault else fault


@lru_cache(maxsize=10_000)
def _local_extent(url: str) -> tuple[int | None, str | None]:
    try:
        if url.endswith(FEATURES):
            return count_features(url), None
        if url.endswith(COLUMNAR):
            return count_rows(url), None
        if is_local(url):
            index = index_shard(url)
            return len(index.offsets), index.fault
    except (OSError, ValueError) as error:
        return 0, f"{url}: {error}"
    return None, None


def read_exactly(url: str, first: int, stop: int, size: int) -> Iterator[RawSample | BrokenShardError]:
    """Yields stop - first items of a shard; where it breaks off or is shorter, the reason in place of each sample.

    Args:
        url: the shard.
        first, stop: sample numbers.
        size: samples that it is said to hold; more of them are reported once per process.
    """
    fault = BrokenShardError(f"{url}: fewer samples than sizes.json counts")
    try:
        for sample in read_shard(url, first, None if stop == size else stop):
            if first == stop:
                _report_more(url, size)
                return
            yield sample
            first += 1
    except BrokenShardError as error:
        fault = error
    yield from itertools.repeat(fault, stop - first)


@cache
def _report_more(url: str, size: int) -> None:
    logging.warning(f"{url}: holds more than the {size:,} samples that sizes.json counts; the others are never read")


def read_shard(url: str, first: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Reads a tar shard, a file of features, or a table with images inside: see `tar.read_samples`."""
    if url.endswith(FEATURES):
        return read_features(url, first, stop)
    return read_rows(url, first, stop) if url.endswith(COLUMNAR) else read_samples(url, first, stop)


def _names(urls: Sequence[str]) -> list[str]:
    return [os.path.basename(url) for url in urls]


def _fingerprint(*parts: object) -> str:
    return sha256(repr(parts).encode()).hexdigest()


def _with_fault(samples: Iterator[RawSample]) -> Iterator[RawSample | BrokenShardError]:
    """Ends with the reason where a shard breaks off."""
    try:
        yield from samples
    except BrokenShardError as error:
        yield error


def expand_sources(spec: str) -> list[list[str]]:
    """Expands the flag: sources separated by ``::``, each as `expand_shards` takes it, or a folder of image features.

    Raises:
        FileNotFoundError, ValueError: a local shard or folder is not there, or a folder holds none.
    """
    sources = []
    for part in spec.split("::"):
        if is_feature_folder(part):
            urls = feature_files(part)
        else:
            urls = expand_shards(part)
        sources.append(urls)
    local = [url for urls in sources for url in urls if is_local(url)]
    missing = [url for url, is_there in zip(local, parallel_map(os.path.isfile, local)) if not is_there]
    if missing:
        total = sum(map(len, sources))
        shown = ", ".join(missing[:3]) + (", .." if len(missing) > 3 else "")
        raise FileNotFoundError(f"{spec}: {len(missing):,} of {total:,} shards are missing: {shown}")
    return sources


def known_sizes(urls: Sequence[str]) -> list[int | None]:
    """Returns what ``sizes.json`` beside each shard says, None where it says nothing."""
    folders = {os.path.dirname(url) for url in urls if not url.startswith("pipe:")}
    sizes = {folder: read_sizes(folder) for folder in folders}
    return [sizes.get(os.path.dirname(url), {}).get(os.path.basename(url)) for url in urls]


def trusted_sizes(urls: Sequence[str]) -> list[int | None]:
    """Returns `known_sizes`, after a count of the smallest local shards, `MAX_CHECKED_BYTES` in all.

    Raises:
        ValueError: ``sizes.json`` counts too few samples in a shard: the others would never be seen.
    """
    known = known_sizes(urls)
    local = [(url, size) for url, size in zip(urls, known) if size and is_local(url)]
    counted = sorted((n, *pair) for n, pair in zip(parallel_map(os.path.getsize, [url for url, _ in local]), local))
    ends = itertools.accumulate(num_bytes for num_bytes, _, _ in counted)
    for (_, url, size), end in zip(counted, ends):
        if end > MAX_CHECKED_BYTES:
            break
        found = len(index_shard(url).offsets)
        if found > size:
            path = os.path.join(os.path.dirname(url), "sizes.json")
            raise ValueError(f"{path}: counts {size:,} samples in {url}, where {found:,} are; remove or correct it")
    return known


def count_samples(urls: Sequence[str]) -> list[int]:
    """Counts the samples of shards: from ``sizes.json`` beside them, else from the headers of local files.

    A shard that breaks off counts as far as it goes, with a warning.

    Raises:
        ValueError: a remote shard that no sizes.json counts, a local one that is no tar file, or a wrong sizes.json.
    """
    if all(url.endswith(FEATURES) for url in urls):
        return [count_features(url) for url in urls]
    if all(url.endswith(COLUMNAR) for url in urls):
        return [count_rows(url) for url in urls]
    known = trusted_sizes(urls)
    unknown = [url for url, size in zip(urls, known) if size is None]
    remote = [url for url in unknown if not is_local(url)]
    if remote:
        raise ValueError(
            f"{remote[0]}: number of samples unknown (of {len(remote):,} remote shards); put sizes.json "
            f'({{"00000.tar": 10000, ..}}) beside them, or add --dataset-resampled and --train-num-samples'
        )
    with ThreadPoolExecutor(16) as pool:
        counted = dict(zip(unknown, pool.map(index_shard, unknown)))
    for url, index in counted.items():
        if index.fault and not index.offsets:
            raise ValueError(index.fault)
        if index.fault:
            logging.warning(f"{index.fault}; its {len(index.offsets):,} samples before that are used")
        elif not index.offsets:
            logging.warning(f"{url}: no sample in it")
    return [len(counted[url].offsets) if size is None else size for url, size in zip(urls, known)]
