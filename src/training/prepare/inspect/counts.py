"""What is counted of a shard set, and adding it up."""

import heapq
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

MAX_TOKENS = 2048  # lengths of this and more are counted as one


@dataclass
class Counts:
    """What was found in one shard, or in several.

    Attributes:
        samples: all, bad ones included.
        bad: kind of fault -> samples.
        captions: key -> how many samples have such a caption.
        lengths: key -> number of captions with 0, 1, 2, .. tokens.
        refused: key -> captions in which a model refuses.
        with_short, with_long: samples that have one, by training's default keys.
        widths, heights: pixels -> images.
        hashes: ``key``, ``url``, ``image`` -> 64 bits of each.
        picked: samples to show, as (order, shard, key, captions, image).
    """

    samples: int = 0
    bad: Counter = field(default_factory=Counter)
    captions: Counter = field(default_factory=Counter)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    refused: Counter = field(default_factory=Counter)
    with_short: int = 0
    with_long: int = 0
    widths: Counter = field(default_factory=Counter)
    heights: Counter = field(default_factory=Counter)
    hashes: dict[str, list[np.ndarray]] = field(default_factory=dict)
    picked: list[tuple] = field(default_factory=list)

    def add(self, other: "Counts", num_picked: int) -> None:
        """Adds another's counts to these."""
        for name in ("samples", "with_short", "with_long"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("bad", "captions", "refused", "widths", "heights"):
            getattr(self, name).update(getattr(other, name))
        for key, histogram in other.lengths.items():
            self.lengths[key] = self.lengths.get(key, 0) + histogram
        for name, arrays in other.hashes.items():
            self.hashes.setdefault(name, []).extend(arrays)
        self.picked = heapq.nsmallest(num_picked, [*self.picked, *other.picked], key=lambda p: p[0])
