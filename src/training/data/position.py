"""The exact position of every process in an epoch, and how the rest of it is divided among other processes.

This is pure arithmetic. An epoch is a sequence of **slots**, each of which holds one sample, good or bad. Terms:

- slot: one place in the order of an epoch.
- span: consecutive slots of an epoch, as a source reads them.
- share: the spans of an epoch that one process trains on, and how far it has come in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


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
