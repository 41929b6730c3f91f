"""Where in an epoch every process is, exactly; and how others take over what is left of it. Pure arithmetic."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

SHUFFLE_WINDOW = 1000  # samples of a stretch that are shuffled together


class Segment(NamedTuple):
    """Items number `first` to `last` of what ``source.read(epoch, start, stop)`` yields."""

    start: int
    stop: int
    first: int
    last: int


def count_items(segments: Sequence[Segment]) -> int:
    """Items in all of them."""
    return sum(segment.last - segment.first for segment in segments)


def cut(segments: Sequence[Segment], begin: int, end: int) -> list[Segment]:
    """Items number `begin` to `end` of segments laid end to end."""
    parts, passed = [], 0
    for start, stop, first, last in segments:
        low, high = max(begin - passed, 0), min(end - passed, last - first)
        if low < high:
            parts.append(Segment(start, stop, first + low, first + high))
        passed += last - first
    return parts


@dataclass(frozen=True)
class Stretch:
    """The part of an epoch that one process of `world_size` trains on, and how far it has come.

    Attributes:
        batch_size: of this process.
        num_batches: of this process, in the whole epoch, or in what is `left` of one.
        rank, world_size: this process among all.
        num_done: batches that are done already; the number of workers must then be what it was.
        used_slots: per worker, slots of its part used up for them.
        left: what other processes left of the epoch; empty: the whole of it.
    """

    batch_size: int
    num_batches: int
    rank: int = 0
    world_size: int = 1
    num_done: int = 0
    used_slots: tuple[int, ...] = ()
    left: tuple[Segment, ...] = ()

    def of_worker(self, worker: int, num_workers: int) -> tuple[list[Segment], int]:
        """Returns (segments, number of batches) of a worker; worker w makes the batches w, w + num_workers, .."""
        shares = [len(range(w, self.num_batches, num_workers)) for w in range(num_workers)]
        begin = (self.rank * self.num_batches + sum(shares[:worker])) * self.batch_size
        end = begin + shares[worker] * self.batch_size
        if self.left:
            return cut(self.left, begin, end), shares[worker]
        return [Segment(begin, end, 0, end - begin)] if begin < end else [], shares[worker]


@dataclass(frozen=True)
class EpochPosition:
    """How far all processes have come in an epoch.

    Attributes:
        world_size, num_workers, batch_size, num_batches: how the epoch was divided.
        num_done: batches that each process has done.
        used: per rank and worker, slots used up for them.
        left: as of `Stretch`.
    """

    world_size: int
    num_workers: int
    batch_size: int
    num_batches: int
    num_done: int
    used: tuple[tuple[int, ...], ...]
    left: tuple[Segment, ...] = ()

    @classmethod
    def from_dict(cls, content: dict) -> "EpochPosition":
        """Takes back what `to_dict` gave, perhaps by way of a file."""
        used = tuple(map(tuple, content["used"]))
        left = tuple(Segment(*segment) for segment in content["left"])
        return cls(**{**content, "used": used, "left": left})

    def to_dict(self) -> dict:
        """Numbers and tuples alone, for a checkpoint."""
        return asdict(self) | {"left": tuple(map(tuple, self.left))}

    def same_division(self, world_size: int, num_workers: int, batch_size: int) -> bool:
        """Whether processes like these can go on in the same order."""
        return (self.world_size, self.num_workers, self.batch_size) == (world_size, num_workers, batch_size)

    def stretch(self, rank: int) -> Stretch:
        """One process's part, from here on in the same order."""
        done = self.num_done, self.used[rank]
        return Stretch(self.batch_size, self.num_batches, rank, self.world_size, *done, self.left)

    def unused(self) -> tuple[Segment, ...]:
        """Everything that no process has used up."""
        segments = []
        for rank in range(self.world_size):
            for worker in range(self.num_workers):
                own, _ = self.stretch(rank).of_worker(worker, self.num_workers)
                segments += cut(own, self.used[rank][worker], count_items(own))
        return tuple(segments)
