"""The effective length of a model's captions: with how many tokens recall reaches 95% of its best value."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.eval.metrics import RankCounts, hit_probability

EFFECTIVE_SHARE = 0.95
NUM_RESAMPLES = 1000
MIN_RIGHT = 10  # with fewer right answers, a curve is considered chance


def effective_length(lengths: Sequence[float], recall: Sequence[float]) -> float | None:
    """Returns the number of tokens at which recall first reaches 95% of its best value.

    Recall is interpolated linearly between measured lengths.

    Args:
        lengths: numbers of tokens, ascending.
        recall: recall at each length.

    Returns:
        The number of tokens, at least the shortest length; None if recall is 0 everywhere.
    """
    target = EFFECTIVE_SHARE * max(recall)
    if target == 0:
        return None
    first = next(n for n, value in enumerate(recall) if value >= target)
    if first == 0:
        return float(lengths[0])
    return float(np.interp(target, recall[first - 1 : first + 1], lengths[first - 1 : first + 1]))


def hits_by_image(owner: torch.Tensor, i2t: RankCounts, t2i: RankCounts) -> np.ndarray:
    """Returns for each image its own hit, the number of hits of its captions, and the number of its captions.

    Returns:
        [num_images, 3].
    """
    captions = np.bincount(owner, hit_probability(t2i, 1).numpy())
    return np.stack([hit_probability(i2t, 1).numpy(), captions, np.bincount(owner)], axis=1)


def effective_lengths(hits: dict[str, dict[int, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Returns effective lengths and their 95% intervals for each set, and for the mean over the sets as ``all``.

    Recall is the mean of both directions. Sets near chance get None. Intervals resample the images of each set.

    Args:
        hits: title -> number of tokens, ascending -> result of `hits_by_image`.

    Returns:
        ``effective_length``: title, and ``all``, -> number of tokens; ``effective_length_ci95``: likewise.
    """
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    curves: list[np.ndarray] = []
    result: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for title, by_length in hits.items():
        lengths, counts = list(by_length), list(by_length.values())
        num_images = len(counts[0])
        # Images with the same hits are interchangeable; the first row of weights is the original set.
        kinds, sizes = np.unique(np.concatenate(counts, axis=1).round(9), axis=0, return_counts=True)
        weights = np.vstack([sizes, rng.multinomial(num_images, sizes / num_images, size=NUM_RESAMPLES)])
        sums = (weights @ kinds).reshape(len(weights), len(lengths), 3)
        recall = (sums[..., 0] / num_images + sums[..., 1] / sums[..., 2]) / 2
        near_chance = recall[0].max() * counts[0][:, 2].sum() < MIN_RIGHT
        result[title], intervals[title] = (None, None) if near_chance else _with_interval(lengths, recall)
        if not near_chance:
            curves.append(recall)
    result["all"], intervals["all"] = _with_interval(lengths, np.mean(curves, axis=0)) if curves else (None, None)
    return {"effective_length": result, "effective_length_ci95": intervals}


def _with_interval(lengths: list[int], recall: np.ndarray) -> tuple[float | None, list[float]]:
    """Returns the effective length of the first row of `recall` [1 + draws, lengths], and the others' 95% interval."""
    drawn = [length for curve in recall[1:] if (length := effective_length(lengths, curve.tolist())) is not None]
    return effective_length(lengths, recall[0].tolist()), [float(b) for b in np.percentile(drawn, [2.5, 97.5])]
