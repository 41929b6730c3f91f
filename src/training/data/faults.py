"""Counts of bad samples."""

from collections import Counter
from dataclasses import dataclass, field


class TooManyBadSamplesError(RuntimeError):
    """More samples were skipped than the user allows; raised on all ranks."""


@dataclass
class Totals:
    """Counts of the samples that loaders have read.

    Attributes:
        num_seen: number of all samples, bad ones included.
        faults: kind of fault -> number of samples skipped because of it.
    """

    num_seen: int = 0
    faults: Counter = field(default_factory=Counter)

    @classmethod
    def from_dict(cls, content: dict) -> "Totals":
        """Restores what `to_dict` returned."""
        return cls(content["seen"], Counter(content["skipped"]))

    def to_dict(self) -> dict:
        """Returns plain numbers, for checkpoints and results."""
        return {"seen": self.num_seen, "skipped": dict(self.faults)}

    def add(self, other: "Totals") -> None:
        """Adds the counts of another."""
        self.num_seen += other.num_seen
        self.faults.update(other.faults)

    @property
    def num_bad(self) -> int:
        """Number of skipped samples."""
        return sum(self.faults.values())

    def describe(self) -> str:
        """Returns, for example, ``12,000 samples read, 3 skipped (2 no image, 1 broken JSON)``."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.faults.items()))
        return f"{self.num_seen:,} samples read, {self.num_bad:,} skipped" + (f" ({kinds})" if kinds else "")
