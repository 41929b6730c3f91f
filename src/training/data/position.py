"""Where in an epoch every process is, exactly; and how others take over what is left of it. Pure arithmetic.

An epoch is a row of **slots**, each of which holds one sample, good or bad. The nouns of this project:

- slot: one place in the order of an epoch.
- span: neighbouring slots of an epoch, as a source reads them.
- share: the spans of an epoch that one process trains on, and what of them it has done.
- position: how far all processes have come in an epoch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Slots number `first` to `last` of those that ``source.read(epoch, start, stop)`` yields."""

    start: int
    stop: int
    first: int
    last: int


def count_slots(spans: Sequence[Span]) -> int:
    """Returns the number of slots in all spans."""
    return sum(span.last - span.first for span in spans)


def cut(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """Returns slots number `begin` to `end` of spans laid end to end."""
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
        num_batches: batches of this process in the whole epoch, or in what is `left` of one.
        rank, world_size: this process among all.
        batches_done: batches that are done already; the number of workers must then be what it was.
        slots_done: per worker, slots that were read for them.
        left: the spans that an earlier division left of the epoch; empty for the whole epoch.
    """

    batch_size: int
    num_batches: int
    rank: int = 0
    world_size: int = 1
    batches_done: int = 0
    slots_done: tuple[int, ...] = ()
    left: tuple[Span, ...] = ()

    def of_worker(self, worker: int, num_workers: int) -> tuple[list[Span], int]:
        """Returns (spans, number of batches) of a worker; worker w makes the batches w, w + num_workers, .."""
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
        batches_done: batches that each process has done.
        slots_done: per rank and worker, slots that were read for them.
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
        """Restores what `to_dict` gave, perhaps by way of a file."""
        slots_done = tuple(map(tuple, content["slots_done"]))
        left = tuple(Span(*span) for span in content["left"])
        return cls(**{**content, "slots_done": slots_done, "left": left})

    def to_dict(self) -> dict:
        """Returns numbers and tuples alone, for a checkpoint."""
        return asdict(self) | {"left": tuple(map(tuple, self.left))}

    def same_division(self, world_size: int, num_workers: int, batch_size: int) -> bool:
        """Returns whether processes like these can continue in the same order."""
        return (self.world_size, self.num_workers, self.batch_size) == (world_size, num_workers, batch_size)

    def share(self, rank: int) -> Share:
        """Returns one process's share, from here on in the same order."""
        done = self.batches_done, self.slots_done[rank]
        return Share(self.batch_size, self.num_batches, rank, self.world_size, *done, self.left)

    def unread(self) -> tuple[Span, ...]:
        """Returns everything that no process has read."""
        spans = []
        for rank in range(self.world_size):
            for worker in range(self.num_workers):
                own, _ = self.share(rank).of_worker(worker, self.num_workers)
                spans += cut(own, self.slots_done[rank][worker], count_slots(own))
        return tuple(spans)
