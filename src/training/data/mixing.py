"""Mixes what a loader process reads: several shards at once, then a shuffle among the samples that it holds."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

SHUFFLE_WINDOW = 1000  # samples that a loader process holds and shuffles together
SHUFFLE_SHARDS = 8  # shards that it reads at once


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

    A window takes items from every lane in proportion to what is left of it, so that all lanes end together, and is
    shuffled. The first window has a random length: the same lanes under another name are cut at other places.

    Args:
        lanes: what to mix.
        window: items held in memory at most.
        name: seeds the order.
        skip: leaves out so many items; windows before them are not read.
    """
    left = [lane.size for lane in lanes]
    streams: list[Iterator | None] = [None] * len(lanes)
    first = random.Random(f"{name}/first").randint(1, window) if sum(left) > window else window
    for number in itertools.count():
        taken = _shares(left, window if number else first)
        if not any(taken):
            return
        begins = [lane.size - rest for lane, rest in zip(lanes, left)]
        left = [rest - count for rest, count in zip(left, taken)]
        if skip >= sum(taken):
            skip -= sum(taken)
            continue
        items = []
        for k, count in enumerate(taken):
            if count:
                streams[k] = streams[k] or lanes[k].read(begins[k])
                items += itertools.islice(streams[k], count)
                if not left[k]:
                    next(streams[k], None)  # ends it: it closes its file
        random.Random(f"{name}/{number}").shuffle(items)
        del items[len(items) - skip :]
        skip = 0
        while items:
            yield items.pop()


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
