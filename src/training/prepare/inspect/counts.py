"""Counts of a shard set, and their sum over shards."""

import heapq
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

MAX_TOKENS = 2048  # longer captions are counted with this length


@dataclass
class Counts:
    """Counts of one or several shards.

    Attributes:
        samples: number of all samples, bad ones included.
        bad: kind of fault -> number of samples.
        captions: key -> number of samples that have such a caption.
        lengths: key -> int64 [MAX_TOKENS + 1], number of captions with 0, 1, 2 and so on tokens.
        refused: key -> number of captions in which a model refuses to answer.
        with_short, with_long: number of samples with a short and with a long caption, by training's default keys.
        widths, heights: pixels -> number of images.
        hashes: ``key``, ``url``, ``image`` -> 64-bit hashes of these.
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
        """Adds the counts of other shards; keeps `num_picked` of the samples to show."""
        for name in ("samples", "with_short", "with_long"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("bad", "captions", "refused", "widths", "heights"):
            getattr(self, name).update(getattr(other, name))
        for key, histogram in other.lengths.items():
            self.lengths[key] = self.lengths.get(key, 0) + histogram
        for name, arrays in other.hashes.items():
            self.hashes.setdefault(name, []).extend(arrays)
        self.picked = heapq.nsmallest(num_picked, [*self.picked, *other.picked], key=lambda p: p[0])
