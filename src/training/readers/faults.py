"""Why a sample or file can't be used: one list of kinds for training, evaluation and preparation, and their counts."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml

# Kind of fault -> what to do.
FAULT_KINDS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("faults.yaml").read_text(encoding="utf-8"))
LFS_POINTER = b"version https://git-lfs"
IS_POINTER = "a Git LFS pointer, not the file itself; fetch it with git lfs pull"


class BadSample(ValueError):
    """A sample that can't be used.

    Attributes:
        kind: one of `FAULT_KINDS`; the message itself if none is given.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind or message


def refuse_pointer(head: bytes, name: str | Path) -> None:
    """Raises ValueError if a file's first bytes are those of a Git LFS pointer, which a clone without LFS leaves."""
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{name}: {IS_POINTER}")


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
