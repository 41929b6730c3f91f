"""Sources of training samples: tar shards (here) and tables (in tables.py).

A source arranges the samples of an epoch as one sequence of slots. A loader process reads the slots from start to stop,
so any number of processes reads every sample exactly once, for any number of shards. The result depends only on (seed,
epoch, start, stop), so the number of slots read is a position from which reading can continue.
"""

import itertools
import operator
import os
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Protocol

from training.data.features import SUFFIX as FEATURES
from training.data.features import read_features
from training.data.order import SHUFFLE_SHARDS, SHUFFLE_WINDOW, Lane, chosen, mix
from training.data.tables import is_table, read_rows
from training.readers.samples import BrokenShardError, Part, RawSample, lost_sample, read_samples
from training.runtime.messages import warn_once

USUAL_SIZE = 10_000  # assumed number of samples in a shard of unknown size: img2dataset's default


class Source(Protocol):
    """A source of samples, as loader processes use it.

    Attributes:
        num_samples: number of samples in one epoch.
        num_left_out: number of further samples, or rows, that can't be read.
    """

    num_left_out: int

    @property
    def num_samples(self) -> int: ...

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        """Yields the items of the slots from `start` up to, but not including, `stop` of an epoch.

        Each slot gives one item: a sample, or `lost_sample` if it can't be read. `skip` leaves out the first items; the
        order of the others doesn't change.
        """

    def fingerprint(self) -> str:
        """Returns a text that is equal for sources whose `read` gives the same, also after moving their folder."""


@dataclass
class ShardSource:
    """Tar shards, each sample once per epoch; with `factors`, shards are drawn with replacement instead.

    The order of the shards differs between epochs. A process reads several of its shards side by side and mixes their
    samples (see `mix`); starting in the middle only requires reading the samples that are in the buffer then.

    Args:
        urls: the shards.
        sizes: number of samples in each.
        seed: seed of the order.
        window: number of samples in memory.
        lanes: maximum number of shards that are read side by side. The slots of a process are divided into lanes where
            shards begin, so that no shard is opened twice because of it.
        index_cache: folder of `cached_index`.
        factors: weight of each shard in the draw; empty: each shard comes once. An epoch of draws begins at a random
            sample of its first shard, so that every sample is equally likely, however short the epoch is.
        num_drawn: number of samples in an epoch of draws.
    """

    urls: Sequence[str]
    sizes: Sequence[int]
    seed: int
    window: int = SHUFFLE_WINDOW
    lanes: int = SHUFFLE_SHARDS
    index_cache: str | None = None
    factors: Sequence[float] = ()
    num_drawn: int = 0
    num_left_out = 0

    @property
    def num_samples(self) -> int:
        if not self.factors:
            return sum(self.sizes)
        return self.num_drawn if any(map(operator.mul, self.sizes, self.factors)) else 0

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        order, num_before = self._order(epoch)
        ends = [end - num_before for end in itertools.accumulate(self.sizes[i] for i in order)]
        borders = sorted(set(ends[bisect_right(ends, start) : bisect_left(ends, stop)]))
        cuts = [start, *chosen(borders, self.lanes - 1), stop]
        lanes = [
            Lane(end - begin, partial(self._in_order, order, ends, begin, end))
            for begin, end in itertools.pairwise(cuts)
        ]
        yield from mix(lanes, self.window, f"{self.seed}/{epoch}/{start}", skip)

    def parts(self) -> list[Part]:
        """Returns the shards as parts."""
        return [Part(os.path.basename(u), size, partial(read_shard, u)) for u, size in zip(self.urls, self.sizes)]

    def fingerprint(self) -> str:
        """As `Source.fingerprint`."""
        drawn = (list(self.factors), self.num_drawn) if self.factors else ()
        return _fingerprint("shards 3", self.urls, list(self.sizes), self.seed, self.window, self.lanes, *drawn)

    def _order(self, epoch: int) -> tuple[list[int], int]:
        """Returns (numbers of the shards of an epoch in order, number of samples left out at its beginning)."""
        rng, numbers = random.Random(f"{self.seed}/{epoch}/shards"), list(range(len(self.urls)))
        if not self.factors:
            rng.shuffle(numbers)
            return numbers, 0
        order = rng.choices(numbers, self.factors, k=len(numbers))
        num_before = rng.randrange(self.sizes[order[0]] or 1)
        while sum(self.sizes[i] for i in order) < num_before + self.num_drawn:
            order += rng.choices(numbers, self.factors, k=len(order))
        return order, num_before

    def _in_order(self, order: list[int], ends: list[int], start: int, stop: int, num_read: int) -> Iterator[RawSample]:
        for number, end in zip(order, ends):
            url, size = self.urls[number], self.sizes[number]
            first, last = max(start + num_read - end + size, 0), min(stop - end + size, size)
            if first < last:
                yield from read_exactly(url, first, last, size, self.index_cache)


@dataclass
class StreamedShards:
    """Shards of unknown size, such as the output of commands: drawn with replacement, read from their beginning.

    Args:
        urls: the shards.
        factors: weight of each shard in the draw.
        num_samples: number of samples in an epoch.
        seed: seed of the order.
        window, lanes: see `ShardSource`; a lane is not shorter than a shard of usual size.
    """

    urls: Sequence[str]
    factors: Sequence[float]
    num_samples: int
    seed: int
    window: int = SHUFFLE_WINDOW
    lanes: int = SHUFFLE_SHARDS
    num_left_out = 0

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample]:
        name, total = f"{self.seed}/{epoch}/{start}", stop - start
        number = max(1, min(self.lanes, total // USUAL_SIZE))
        sizes = [(total + k) // number for k in range(number)]
        lanes = [Lane(size, partial(self._drawn, f"{name}/lane {k}", size)) for k, size in enumerate(sizes)]
        yield from mix(lanes, self.window, name, skip)

    def fingerprint(self) -> str:
        """As `Source.fingerprint`."""
        order = self.seed, self.window, self.lanes
        return _fingerprint("streamed", self.urls, list(self.factors), self.num_samples, *order)

    def _drawn(self, name: str, size: int, first: int) -> Iterator[RawSample]:
        rng = random.Random(name)
        shards = (_with_fault(*rng.choices(self.urls, self.factors)) for _ in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(shards), first, size)


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
                more = f"has more than the {size:,} samples that sizes.json counts; the others are never read"
                warn_once(f"{url}: {more}")
                return
            yield sample
            first += 1
    except BrokenShardError as error:
        fault = error
    yield from itertools.repeat(lost_sample(fault), stop - first)


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


def _with_fault(url: str) -> Iterator[RawSample]:
    """Yields the samples of a shard, and at the end an error if it is broken or empty."""
    fault: BrokenShardError | None = BrokenShardError(f"{url}: no sample in it")
    try:
        for sample in read_shard(url):
            yield sample
            fault = None
    except BrokenShardError as error:
        fault = error
    if fault:
        yield lost_sample(fault)
