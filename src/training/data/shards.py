"""Sources of training samples: tar shards (here) and tables (in tables.py).

A source arranges the samples of an epoch as one sequence of slots. A loader process reads the slots from start to stop,
so any number of processes reads every sample exactly once, for any number of shards. The result depends only on (seed,
epoch, start, stop), so the number of slots read is a position from which reading can continue.
"""

import itertools
import logging
import os
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from hashlib import sha256
from typing import Protocol

from training.data.embedded import count_rows, is_table, read_rows
from training.data.features import SUFFIX as FEATURES
from training.data.features import read_features
from training.data.mixing import SHUFFLE_SHARDS, SHUFFLE_WINDOW, Lane, chosen, mix
from training.readers.samples import BrokenShardError, Part, RawSample, index_shard, lost_sample, read_samples
from training.readers.streams import is_local

USUAL_SIZE = 10_000  # assumed number of samples in a shard of unknown size: img2dataset's default


class Source(Protocol):
    """A source of samples, as loader processes use it.

    Attributes:
        num_samples: number of samples in one epoch.
    """

    num_samples: int

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        """Yields the items of the slots from `start` up to, but not including, `stop` of an epoch.

        Each slot gives one item: a sample, or `lost_sample` if it can't be read. `skip` leaves out the first items; the
        order of the others doesn't change.
        """

    def fingerprint(self) -> str:
        """Returns a text that is equal for sources whose `read` gives the same, also after moving their folder."""


@dataclass
class ShardSource:
    """Tar shards, each sample once per epoch.

    The order of the shards differs between epochs. A process reads several of its shards side by side and mixes their
    samples (see `mixing.mix`); starting in the middle only requires reading the samples that are in the buffer then.

    Args:
        urls: the shards.
        sizes: number of samples in each.
        seed: seed of the order.
        window: number of samples in memory.
        lanes: maximum number of shards that are read side by side. The slots of a process are divided into lanes where
            shards begin, so that no shard is opened twice because of it.
        index_cache: folder of `cached_index`.
    """

    urls: Sequence[str]
    sizes: Sequence[int]
    seed: int
    window: int = SHUFFLE_WINDOW
    lanes: int = SHUFFLE_SHARDS
    index_cache: str | None = None
    num_left_out = 0

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
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
        """Returns the shards as parts."""
        return [Part(os.path.basename(u), size, partial(read_shard, u)) for u, size in zip(self.urls, self.sizes)]

    def fingerprint(self) -> str:
        """As `Source.fingerprint`."""
        return _fingerprint("shards 3", self.urls, list(self.sizes), self.seed, self.window, self.lanes)

    def _in_order(self, order, ends, start, stop) -> Iterator[RawSample]:
        for number, end in zip(order, ends):
            url, size = self.urls[number], self.sizes[number]
            first, last = max(start - end + size, 0), min(stop - end + size, size)
            if first < last:
                yield from read_exactly(url, first, last, size, self.index_cache)


@dataclass
class ResampledShards:
    """Tar shards drawn with replacement, with weights.

    A draw reads a shard from a random sample to its end, and then the samples before that one. So every sample is
    equally likely, even if a process reads only part of a shard. A shard of unknown size can only be read from its
    beginning.

    Args:
        urls: the shards.
        factors: weight of each shard in the draw.
        num_samples: number of samples in an epoch.
        seed, window, lanes, index_cache: see `ShardSource`.
        sizes: number of samples in each; None if unknown. A local shard of unknown size is indexed when it is drawn.
    """

    urls: Sequence[str]
    factors: Sequence[float]
    num_samples: int
    seed: int
    window: int = SHUFFLE_WINDOW
    sizes: Sequence[int | None] = ()
    lanes: int = SHUFFLE_SHARDS
    index_cache: str | None = None

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        name, total, number = f"{self.seed}/{epoch}/{start}", stop - start, self._num_lanes(stop - start)

        def lane(k: int) -> Lane:
            size, rng = (total + k) // number, random.Random(f"{name}/lane {k}")
            return Lane(size, lambda done: itertools.islice(self._drawn(rng, done), size - done))

        yield from mix([lane(k) for k in range(number)], self.window, name, skip)

    @cached_property
    def _sizes(self) -> dict[str, int | None]:
        return dict(zip(self.urls, self.sizes))

    def _num_lanes(self, num_samples: int) -> int:
        """Returns the number of lanes for this many slots.

        To start in the middle of a remote shard, everything before has to be read, so each lane is about as long as a
        shard.
        """
        if all(map(is_local, self.urls)):
            return self.lanes
        known = [size for size in self.sizes if size]
        size = sum(known) / len(known) if known else USUAL_SIZE
        return max(1, min(self.lanes, int(num_samples / size)))

    def fingerprint(self) -> str:
        """As `Source.fingerprint`."""
        order = self.seed, self.window, self.lanes
        return _fingerprint("resampled 4", self.urls, list(self.factors), self.num_samples, *order)

    def _drawn(self, rng: random.Random, skip: int) -> Iterator[RawSample]:
        """Yields the items of one draw after another, without the first `skip`.

        If sizes are known, the skipped items are not read.
        """
        while True:
            (url,) = rng.choices(self.urls, self.factors)
            size, fault = self._extent(url)
            first = rng.randrange(size) if size else 0
            if size is None:
                for item in _with_fault(read_shard(url)):
                    if not skip:
                        yield item
                    skip = max(skip - 1, 0)
                continue
            num_items = size + bool(fault)
            if skip >= num_items:
                skip -= num_items
                continue
            yield from read_exactly(url, min(first + skip, size), size, size, self.index_cache)
            yield from read_exactly(url, max(first + skip - size, 0), first, size, self.index_cache)
            if fault:
                yield lost_sample(BrokenShardError(fault))
            skip = 0

    def _extent(self, url: str) -> tuple[int | None, str | None]:
        """Returns (number of readable samples or None if unknown, fault after which a local shard can't be read)."""
        known = self._sizes.get(url)
        size, fault = _local_extent(url) if known is None else (known, None)
        return size, f"{url}: no sample in it" if size == 0 and not fault else fault


@lru_cache(maxsize=10_000)
def _local_extent(url: str) -> tuple[int | None, str | None]:
    try:
        if is_table(url):
            return count_rows(url), None
        if is_local(url):
            index = index_shard(url)
            return len(index.offsets), index.fault
    except (OSError, ValueError) as error:
        return 0, f"{url}: {error}"
    return None, None


def read_exactly(url: str, first: int, stop: int, size: int, index_cache: str | None = None) -> Iterator[RawSample]:
    """Yields stop - first items of a shard; if it is broken or too short, an error instead of each missing sample.

    Args:
        url: the shard.
        first, stop: number of the first sample, and the number before which to stop.
        size: number of samples in the shard according to sizes.json; if there are more, a warning is logged once per
            process.
        index_cache: see `read_samples`.
    """
    fault = BrokenShardError(f"{url}: fewer samples than sizes.json counts")
    try:
        for sample in read_shard(url, first, None if stop == size else stop, index_cache):
            if first == stop:
                _report_more(url, size)
                return
            yield sample
            first += 1
    except BrokenShardError as error:
        fault = error
    yield from itertools.repeat(lost_sample(fault), stop - first)


@cache
def _report_more(url: str, size: int) -> None:
    logging.warning(f"{url}: has more than the {size:,} samples that sizes.json counts; the others are never read")


def read_shard(
    url: str, first: int = 0, stop: int | None = None, index_cache: str | None = None
) -> Iterator[RawSample]:
    """Reads a tar shard, a feature file, or a table with images inside; see `read_samples` for the arguments."""
    if url.endswith(FEATURES):
        return read_features(url, first, stop)
    if is_table(url):
        return read_rows(url, first, stop)
    return read_samples(url, first, stop, index_cache=index_cache)


def _fingerprint(kind: str, urls: Sequence[str], *settings: object) -> str:
    return sha256(repr((kind, list(map(os.path.basename, urls)), *settings)).encode()).hexdigest()


def _with_fault(samples: Iterator[RawSample]) -> Iterator[RawSample]:
    """Yields the samples, and at the end the error if a shard is broken."""
    try:
        yield from samples
    except BrokenShardError as error:
        yield lost_sample(error)
