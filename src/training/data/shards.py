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
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from hashlib import sha256
from typing import Protocol

from training.data.embedded import count_rows, read_rows
from training.data.features import SUFFIX as FEATURES
from training.data.features import count_features, feature_files, is_feature_folder, read_features
from training.data.mixing import SHUFFLE_SHARDS, SHUFFLE_WINDOW, Lane, chosen, mix
from training.data.tar import BrokenShardError, Part, RawSample, index_shard, read_samples, read_sizes
from training.readers.files import parallel_map
from training.readers.table_files import COLUMNAR
from training.readers.tar import expand_shards, is_local

USUAL_SIZE = 10_000  # assumed number of samples in a shard of unknown size: img2dataset's default
MAX_CHECKED_BYTES = 1 << 28  # total size of the shards whose samples are counted to check sizes.json


class Source(Protocol):
    """A source of samples, as loader processes use it.

    Attributes:
        num_samples: number of samples in one epoch.
    """

    num_samples: int

    def read(self, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[RawSample | BrokenShardError]:
        """Yields the items of the slots from `start` up to, but not including, `stop` of an epoch.

        Each slot gives one item: a sample, or the error because of which it can't be read. `skip` leaves out the first
        items; the order of the others doesn't change.
        """

    def fingerprint(self) -> str:
        """Returns a text that is equal for sources whose `read` gives the same, also after moving their folder."""


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
        """Returns the shards as parts."""
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
    """Tar shards drawn with replacement, with weights.

    A draw reads a shard from a random sample to its end, and then the samples before that one. So every sample is
    equally likely, even if a process reads only part of a shard. A shard of unknown size can only be read from its
    beginning.

    Args:
        urls: the shards.
        factors: weight of each shard in the draw.
        num_samples: number of samples in an epoch.
        seed, window, lanes: see `ShardSource`.
        sizes: number of samples in each; None if unknown. A local shard of unknown size is indexed when it is drawn.
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
        """Returns the number of lanes for this many slots.

        To start in the middle of a remote shard, everything before has to be read, so each lane is about as long as a
        shard.
        """
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
        """Yields the items of one draw after another, without the first `skip`.

        If sizes are known, the skipped items are not read.
        """
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
        """Returns (number of readable samples or None if unknown, fault after which a local shard can't be read)."""
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
    """Yields stop - first items of a shard; if it is broken or too short, an error instead of each missing sample.

    Args:
        url: the shard.
        first, stop: number of the first sample, and the number before which to stop.
        size: number of samples in the shard according to sizes.json; if there are more, a warning is logged once per
            process.
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
    logging.warning(f"{url}: has more than the {size:,} samples that sizes.json counts; the others are never read")


def read_shard(url: str, first: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Reads a tar shard, a feature file, or a table with images inside; see `tar.read_samples` for the arguments."""
    if url.endswith(FEATURES):
        return read_features(url, first, stop)
    return read_rows(url, first, stop) if url.endswith(COLUMNAR) else read_samples(url, first, stop)


def _names(urls: Sequence[str]) -> list[str]:
    return [os.path.basename(url) for url in urls]


def _fingerprint(*parts: object) -> str:
    return sha256(repr(parts).encode()).hexdigest()


def _with_fault(samples: Iterator[RawSample]) -> Iterator[RawSample | BrokenShardError]:
    """Yields the samples, and at the end the error if a shard is broken."""
    try:
        yield from samples
    except BrokenShardError as error:
        yield error


def expand_sources(spec: str) -> list[list[str]]:
    """Returns the shards of each source in the value of a flag.

    Args:
        spec: sources separated by ``::``; each is an argument of `expand_shards`, or a folder of image features.

    Raises:
        FileNotFoundError, ValueError: a local shard or folder doesn't exist, or a folder has no shard.
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
    """Returns the number of samples of each shard by the ``sizes.json`` beside it; None if it has no entry."""
    folders = {os.path.dirname(url) for url in urls if not url.startswith("pipe:")}
    sizes = {folder: read_sizes(folder) for folder in folders}
    return [sizes.get(os.path.dirname(url), {}).get(os.path.basename(url)) for url in urls]


def trusted_sizes(urls: Sequence[str]) -> list[int | None]:
    """Returns `known_sizes`, after checking them for the smallest local shards, up to `MAX_CHECKED_BYTES` in total.

    Raises:
        ValueError: ``sizes.json`` counts too few samples in a shard, so the others would never be read.
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
            raise ValueError(f"{path}: counts {size:,} samples in {url}, which has {found:,}; remove or correct it")
    return known


def count_samples(urls: Sequence[str]) -> list[int]:
    """Returns the number of samples of each shard, from ``sizes.json`` or else from the headers of local files.

    In a broken shard, the samples before the break are counted, with a warning.

    Raises:
        ValueError: a remote shard has no entry in sizes.json, a local shard is not a tar file, or sizes.json is wrong.
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
