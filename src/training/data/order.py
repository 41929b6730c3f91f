"""The order of an epoch, as pure arithmetic: a permutation, the mixing of shards, and the position of every process.

An epoch is a sequence of **slots**, each of which holds one sample, good or bad. Terms:

- slot: one place in the order of an epoch.
- span: consecutive slots of an epoch, as a source reads them.
- share: the spans of an epoch that one process trains on, and how far it has come in them.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

SHUFFLE_WINDOW = 1000  # number of samples in the memory of a loader process, among which it shuffles
SHUFFLE_SHARDS = 16  # number of shards that it reads side by side
ROUNDS_PER_WINDOW = 8
_ROUNDS = 6
_CHUNK = 1024
_STEP, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def permuted(size: int, name: str, start: int, stop: int) -> Iterator[int]:
    """Yields the items at positions `start` up to, but not including, `stop` of a permutation of ``range(size)``.

    The permutation is a Feistel network over a power of four that is at least `size`; numbers outside the range are
    encrypted again until they fall into it (cycle walking). Memory doesn't grow with `size`.

    Args:
        size: number of items, below 2**62.
        name: seeds the permutation; the same name always gives the same order.
        start, stop: positions, 0 <= start, stop <= size.

    Raises:
        ValueError: `stop` is larger; positions beyond the size have no number, so the walk would never end.
    """
    if stop > size:
        raise ValueError(f"position {stop} of {size} items")
    keys = np.frombuffer(sha256(name.encode()).digest() + sha256(name.encode() + b"/").digest(), np.uint64)[:_ROUNDS]
    half_bits = max(((size - 1).bit_length() + 1) // 2, 4)  # with fewer bits, the order is visibly non-uniform
    for begin in range(start, stop, _CHUNK):
        numbers = _encrypt(np.arange(begin, min(begin + _CHUNK, stop), dtype=np.uint64), keys, half_bits)
        while (outside := numbers >= size).any():
            numbers[outside] = _encrypt(numbers[outside], keys, half_bits)
        yield from numbers.tolist()


def _encrypt(numbers: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permutes the numbers below 4**half_bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = numbers >> shift, numbers & mask
    for key in keys:
        # SplitMix64's finaliser: every bit of the input changes every bit of the output.
        mixed = right * _STEP + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << shift) | right


class Lane(NamedTuple):
    """A sequence of items that is read from beginning to end, side by side with other sequences.

    Attributes:
        size: number of items.
        read: function that takes a number n and yields the items from number n on; the lane has at most `size` items.
    """

    size: int
    read: Callable[[int], Iterator]


def mix(lanes: Sequence[Lane], window: int, name: str, skip: int = 0) -> Iterator:
    """Yields the items of all lanes in an order that depends only on the arguments.

    Each round reads a few items from every lane, in proportion to the number of items left in it, so that all lanes end
    together. Each item then waits until a random number of further items has arrived, at most ``2 * window``. With the
    same memory, this separates neighbours in a lane further than shuffling one window after another.

    Args:
        lanes: the lanes to mix.
        window: number of items in memory.
        name: seed of the order.
        skip: number of items to leave out. Of these, only the last ``2 * window`` and at most one more round are read.
    """
    round_size = max(window // ROUNDS_PER_WINDOW, 1)
    # An item leaves before 2 * window further items have arrived, so all items of these rounds are among the skipped.
    num_unread_rounds = max(skip - 2 * window, 0) // round_size
    order = _mixed(lanes, window, round_size, name, num_unread_rounds)
    return itertools.islice(order, skip - num_unread_rounds * round_size, None)


def _mixed(lanes: Sequence[Lane], window: int, round_size: int, name: str, num_unread_rounds: int) -> Iterator:
    left = [lane.size for lane in lanes]
    streams: list[Iterator | None] = [None] * len(lanes)
    waiting: list[tuple[float, int, object]] = []  # a heap of (time to leave, time of arrival, item)
    for number in itertools.count():
        counts = _divide(left, round_size)
        if not any(counts):
            break
        begins = [lane.size - rest for lane, rest in zip(lanes, left)]
        left = [rest - count for rest, count in zip(left, counts)]
        if number < num_unread_rounds:
            continue
        now, rng = number * round_size, random.Random(f"{name}/{number}")
        for k, count in enumerate(counts):
            if count and streams[k] is None:
                streams[k] = lanes[k].read(begins[k])
            stream = streams[k] or iter(())
            for item in itertools.islice(stream, count):
                while waiting and waiting[0][0] <= now:
                    yield heappop(waiting)[-1]
                # The first window is filled before any item leaves, so a small source is shuffled as a whole.
                leaves = now + 2 * window * rng.random() if now >= window else window * (1 + rng.random())
                heappush(waiting, (leaves, now, item))
                now += 1
            if count and not left[k]:
                next(stream, None)  # ends the generator, which closes its file
    while waiting:
        yield heappop(waiting)[-1]


def _divide(left: Sequence[int], number: int) -> list[int]:
    """Divides `number` items (or all, if fewer are left) among lanes in proportion to the items left in each."""
    total = sum(left)
    number = min(number, total)
    ends = [number * end // total for end in itertools.accumulate(left)] if total else []
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


def chosen(places: Sequence[int], number: int) -> list[int]:
    """Returns at most `number` of the places, evenly spread among them."""
    if len(places) <= number:
        return list(places)
    return [places[(k + 1) * (len(places) + 1) // (number + 1) - 1] for k in range(number)]


class Span(NamedTuple):
    """The slots from number `first` up to, but not including, `last` among ``source.read(epoch, start, stop)``."""

    start: int
    stop: int
    first: int
    last: int


def count_slots(spans: Sequence[Span]) -> int:
    """Returns the number of slots in all spans."""
    return sum(span.last - span.first for span in spans)


def cut(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """Returns the slots from number `begin` up to, but not including, `end` of the concatenated spans."""
    parts, passed = [], 0
    for start, stop, first, last in spans:
        low, high = max(begin - passed, 0), min(end - passed, last - first)
        if low < high:
            parts.append(Span(start, stop, first + low, first + high))
        passed += last - first
    return parts


@dataclass(frozen=True)
class Share:
    """The part of an epoch that one process of `world_size` trains on, and how far it has come.

    Attributes:
        batch_size: samples in a batch of this process.
        num_batches: batches of this process in the whole epoch, or in the rest that `left` describes.
        rank, world_size: number of this process, and of all processes.
        batches_done: batches that are done already; if there are any, the number of workers must not change.
        slots_done: for each worker, the number of slots it read for these batches.
        left: the spans that were still unread when the epoch was divided again; empty for a whole epoch.
    """

    batch_size: int
    num_batches: int
    rank: int = 0
    world_size: int = 1
    batches_done: int = 0
    slots_done: tuple[int, ...] = ()
    left: tuple[Span, ...] = ()

    def of_worker(self, worker: int, num_workers: int) -> tuple[list[Span], int]:
        """Returns (spans, number of batches) of a worker; worker w makes batches w, w + num_workers and so on."""
        batches = [len(range(w, self.num_batches, num_workers)) for w in range(num_workers)]
        begin = (self.rank * self.num_batches + sum(batches[:worker])) * self.batch_size
        end = begin + batches[worker] * self.batch_size
        if self.left:
            return cut(self.left, begin, end), batches[worker]
        return [Span(begin, end, 0, end - begin)] if begin < end else [], batches[worker]

    def unread(self) -> list[Span]:
        """Returns the spans that this process has not read."""
        spans = []
        for worker, num_done in enumerate(self.slots_done):
            of_worker, _ = self.of_worker(worker, len(self.slots_done))
            spans += cut(of_worker, num_done, count_slots(of_worker))
        return spans
