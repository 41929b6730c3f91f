"""Mixes the samples of a loader process: it reads several shards side by side and shuffles the samples in memory."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

SHUFFLE_WINDOW = 1000  # number of samples in the memory of a loader process, among which it shuffles
SHUFFLE_SHARDS = 16  # number of shards that it reads side by side
ROUNDS_PER_WINDOW = 8


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
            for item in itertools.islice(streams[k] or (), count):
                while waiting and waiting[0][0] <= now:
                    yield heappop(waiting)[-1]
                # The first window is filled before any item leaves, so a small source is shuffled as a whole.
                leaves = now + 2 * window * rng.random() if now >= window else window * (1 + rng.random())
                heappush(waiting, (leaves, now, item))
                now += 1
            if count and not left[k]:
                next(streams[k], None)  # ends the generator, which closes its file
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
