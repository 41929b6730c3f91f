"""The exact position of every process in an epoch, and how the rest of it is divided among other processes.

This is pure arithmetic. An epoch is a sequence of **slots**, each of which holds one sample, good or bad. Terms:

- slot: one place in the order of an epoch.
- span: consecutive slots of an epoch, as a source reads them.
- share: the spans of an epoch that one process trains on, and how far it has come in them.
- position: how far all processes have come in an epoch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class EpochPosition:
    """How far all processes have come in an epoch.

    Attributes:
        world_size, num_workers, batch_size, num_batches: how the epoch was divided.
        batches_done: number of batches that each process has done.
        slots_done: for each rank and worker, the number of slots read for these batches.
        left: see `Share`.
    """

    world_size: int
    num_workers: int
    batch_size: int
    num_batches: int
    batches_done: int
    slots_done: tuple[tuple[int, ...], ...]
    left: tuple[Span, ...] = ()

    @classmethod
    def from_dict(cls, content: dict) -> "EpochPosition":
        """Restores what `to_dict` returned, also after it was written to a file."""
        slots_done = tuple(map(tuple, content["slots_done"]))
        left = tuple(Span(*span) for span in content["left"])
        return cls(**{**content, "slots_done": slots_done, "left": left})

    def to_dict(self) -> dict:
        """Returns only numbers and tuples, for a checkpoint."""
        return asdict(self) | {"left": tuple(map(tuple, self.left))}

    def same_division(self, world_size: int, num_workers: int, batch_size: int) -> bool:
        """Returns whether these processes can continue in the same order, because the epoch is divided the same way."""
        return (self.world_size, self.num_workers, self.batch_size) == (world_size, num_workers, batch_size)

    def share(self, rank: int) -> Share:
        """Returns the share of one process, which continues from this position in the same order."""
        done = self.batches_done, self.slots_done[rank]
        return Share(self.batch_size, self.num_batches, rank, self.world_size, *done, self.left)

    def unread(self) -> tuple[Span, ...]:
        """Returns the spans that no process has read."""
        unread = []
        for rank in range(self.world_size):
            for worker in range(self.num_workers):
                spans, _ = self.share(rank).of_worker(worker, self.num_workers)
                unread += cut(spans, self.slots_done[rank][worker], count_slots(spans))
        return tuple(unread)
