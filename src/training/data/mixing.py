"""Mixes what a loader process reads: it reads several shards side by side and shuffles the samples that it holds."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

SHUFFLE_WINDOW = 1000  # samples that a loader process holds, among which it shuffles
SHUFFLE_SHARDS = 16  # shards that it reads side by side
ROUNDS_PER_WINDOW = 8


class Lane(NamedTuple):
    """A sequence of items that is read from beginning to end, beside others.

    Attributes:
        size: number of items.
        read: n -> the items from number n on, and no more than `size` in all.
    """

    size: int
    read: Callable[[int], Iterator]


def mix(lanes: Sequence[Lane], window: int, name: str, skip: int = 0) -> Iterator:
    """Yields the items of all lanes in an order that depends on the arguments alone.

    Each round reads a few items from every lane, in proportion to what is left of it, so that all lanes end together.
    Each item then waits while a random number of others arrive, up to ``2 * window`` of them. In the same memory, this
    separates the neighbours in a lane further than shuffling one window after another would.

    Args:
        lanes: what to mix.
        window: number of items in memory.
        name: seeds the order.
        skip: number of items to leave out. Only the last ``2 * window`` of them, and at most a round more, are read.
    """
    round_size = max(window // ROUNDS_PER_WINDOW, 1)
    # An item leaves before 2 * window later ones have arrived, so every item of these rounds leaves before number skip.
    num_unread_rounds = max(skip - 2 * window, 0) // round_size
    order = _mixed(lanes, window, round_size, name, num_unread_rounds)
    return itertools.islice(order, skip - num_unread_rounds * round_size, None)


def _mixed(lanes: Sequence[Lane], window: int, round_size: int, name: str, num_unread_rounds: int) -> Iterator:
    left = [lane.size for lane in lanes]
    streams: list[Iterator | None] = [None] * len(lanes)
    waiting: list[tuple[float, int, object]] = []  # a heap of (time to leave, time of arrival, item)
    for number in itertools.count():
        counts = _shares(left, round_size)
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
            for item in itertools.islice(streams[k] or (), count):
                while waiting and waiting[0][0] <= now:
                    yield heappop(waiting)[-1]
                # The first window is filled before any item leaves: a small source is shuffled as a whole.
                leaves = now + 2 * window * rng.random() if now >= window else window * (1 + rng.random())
                heappush(waiting, (leaves, now, item))
                now += 1
            if count and not left[k]:
                next(streams[k], None)  # ends it: it closes its file
    while waiting:
        yield heappop(waiting)[-1]


def _shares(left: Sequence[int], number: int) -> list[int]:
    """Divides `number` items, or all if fewer are left, among lanes in proportion to what is left of each."""
    total = sum(left)
    number = min(number, total)
    ends = [number * end // total for end in itertools.accumulate(left)] if total else []
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


def chosen(places: Sequence[int], number: int) -> list[int]:
    """Returns at most `number` of the places, evenly spread among them."""
    if len(places) <= number:
        return list(places)
    return [places[(k + 1) * (len(places) + 1) // (number + 1) - 1] for k in range(number)]
