"""Retrieval metrics: ranks, recall with fair handling of ties, bootstrap intervals. Pure tensors, no files, no model.

Shapes: `image_features` are [num_images, dim], `text_features` are [num_captions, dim], and `image_of_caption`
[num_captions] is the row of each caption's image. Ranks start at 1 (the best).

Ties: if `t` wrong candidates have exactly the same score as the `p` right ones, their order is taken to be random, and
the metrics are expectations over it. A model that gives every pair the same score therefore has R@1 = 1/N, not 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

# Scores count in float64; a smaller difference between two scores is rounding, which depends on the block.
TIE_TOLERANCE = 1e-12
TILES = {"cpu": (512, 4096), "cuda": (8192, 16384)}  # images x captions: for a CPU's cache, and to fill a GPU
MAX_UNSURE, PAIRS_AT_ONCE = 1 / 32, 8192
NUM_PAIRED_RESAMPLES = 10_000


@dataclass(frozen=True)
class RankCounts:
    """For each query, the numbers of candidates that determine its rank; three int64 tensors [num_queries].

    Attributes:
        better: wrong candidates with a higher score than the best right one.
        tied: wrong candidates with the same score as the best right one.
        num_right: right candidates with the best right score (1 unless there are duplicates).
    """

    better: torch.Tensor
    tied: torch.Tensor
    num_right: torch.Tensor


def count_ranks(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_of_caption: torch.Tensor,
    *,
    device: torch.device | str = "cpu",
    tile: tuple[int, int] | None = None,
    both: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[RankCounts, RankCounts]:
    """Compares every image with every caption, in tiles; the result is that of float64.

    A tile is computed in float32. Its rounding error is bounded, so only pairs whose score is closer to that of the
    right pair than the bound are computed again in float64.

    Args:
        image_features: [num_images, dim] float32, on any device.
        text_features: [num_captions, dim] float32, on any device.
        image_of_caption: [num_captions] int64; with `both`, every image has at least one caption.
        device: device that multiplies the tiles.
        tile: numbers of images and of captions of a tile, which needs about 8 bytes per pair; default: see `TILES`.
        both: count for image queries, too; otherwise their counts are 0.
        rank, world_size: with several processes, process `rank` handles every world_size-th row of tiles. `better`
            and `tied` have to be summed over all processes; `num_right` is complete in each.

    Returns:
        Counts for image queries (image to text) and for caption queries (text to image), on the CPU.

    Raises:
        ValueError: an image has no caption, and `both`.
    """
    device = float64_device(device)
    height, width = tile or TILES.get(device.type, TILES["cuda"])
    num_images, num_captions = len(image_features), len(text_features)
    pair_score = _scores_of_pairs(image_features, text_features, image_of_caption, device, width)
    best_score = torch.full((num_images,), -torch.inf, dtype=torch.float64)
    best_score.scatter_reduce_(0, image_of_caption, pair_score, reduce="amax")
    if both and torch.isinf(best_score).any():
        raise ValueError(f"image {int(torch.isinf(best_score).nonzero()[0])} has no caption")
    is_best = pair_score >= best_score[image_of_caption] - TIE_TOLERANCE
    num_right = image_of_caption[is_best].bincount(minlength=num_images)
    margin = rounding_bound(image_features, text_features)
    i2t, t2i = (_Counter(score.to(device), margin) for score in (best_score, pair_score))
    with _true_float32(device):
        for i in range(rank * height, num_images, world_size * height):
            images = image_features[i : i + height].to(device)
            for t in range(0, num_captions, width):
                texts = text_features[t : t + width].to(device)
                score = images.float() @ texts.float().T  # [images, captions]
                if both:
                    i2t.add(score, images, texts, i, dim=1)
                t2i.add(score, images, texts, t, dim=0)
    # Right candidates are subtracted from the ties only once, not once per process.
    ones = torch.ones(num_captions, dtype=torch.int64)
    return i2t.counts(num_right, rank == 0), t2i.counts(ones, rank == 0)


def float64_device(device: torch.device | str) -> torch.device:
    """Returns the device, or the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)


def rounding_bound(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns a bound of the error of any scalar product of two rows that is computed in float32, in any order.

    With n = dim + 2 roundings per term (two for rows that are not float32 themselves) and the unit roundoff u, the
    error is at most n u / (1 - n u) times the norms of both rows (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1). The smallest normal number covers products that are flushed to zero.
    """
    n = (first.shape[1] + 2) * torch.finfo(torch.float32).eps / 2
    norms = [max(float(block.double().norm(dim=1).max()) for block in rows.split(4096)) for rows in (first, second)]
    return n / (1 - n) * norms[0] * norms[1] * (1 + 1e-9) + first.shape[1] * torch.finfo(torch.float32).tiny


@contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """Multiplies float32 matrices in float32, not in TF32 or bfloat16, whatever the rest of the program chose."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Counter:
    """Counts for each query the candidates that are better than its right one, and those that are as good.

    Args:
        target: score of each query's right candidate, [num_queries] float64.
        margin: result of `rounding_bound`.
    """

    def __init__(self, target: torch.Tensor, margin: float):
        self.target = target
        # Above `high` a float32 score is certainly better, below `low` certainly worse.
        infinity = torch.tensor(torch.inf, device=target.device)
        self.high = (target + TIE_TOLERANCE + margin).float().nextafter(infinity)
        self.low = (target - TIE_TOLERANCE - margin).float().nextafter(-infinity)
        self.better, self.not_worse = (torch.zeros(len(target), dtype=torch.int64, device=target.device) for _ in "12")

    def add(self, score: torch.Tensor, images: torch.Tensor, texts: torch.Tensor, first: int, dim: int) -> None:
        """Adds a tile of float32 scores [images, captions]: candidates lie along `dim`, queries begin at `first`."""
        rows = slice(first, first + score.shape[1 - dim])
        better = score > self.high[rows].unsqueeze(dim)
        unsure = (score >= self.low[rows].unsqueeze(dim)).bitwise_xor_(better).flatten()
        on_cpu = unsure.device.type == "cpu"  # where NumPy is ten times as fast
        unsure = torch.from_numpy(np.flatnonzero(unsure.numpy())) if on_cpu else unsure.nonzero()[:, 0]
        if len(unsure) > MAX_UNSURE * score.numel():  # e.g. many equal features
            score = images.double() @ texts.double().T
            target = self.target[rows].unsqueeze(dim)
            self.better[rows] += (score > target + TIE_TOLERANCE).sum(dim)
            self.not_worse[rows] += (score >= target - TIE_TOLERANCE).sum(dim)
            return
        certain = better.sum(dim, dtype=torch.int32)
        self.better[rows] += certain
        self.not_worse[rows] += certain
        for positions in unsure.split(PAIRS_AT_ONCE):
            image, text = positions // score.shape[1], positions % score.shape[1]
            exact = (images[image].double() * texts[text].double()).sum(1)
            query = first + (image if dim else text)
            self.better.index_add_(0, query, (exact > self.target[query] + TIE_TOLERANCE).long())
            self.not_worse.index_add_(0, query, (exact >= self.target[query] - TIE_TOLERANCE).long())

    def counts(self, num_right: torch.Tensor, subtract: bool) -> RankCounts:
        """Returns the counts; with `subtract`, the right candidates are subtracted from the ties."""
        tied = (self.not_worse - self.better).cpu() - subtract * num_right
        return RankCounts(self.better.cpu(), tied, num_right)


def _scores_of_pairs(
    images: torch.Tensor, texts: torch.Tensor, image_of_caption: torch.Tensor, device: torch.device, block_size: int
) -> torch.Tensor:
    """Returns the similarity of each caption with its own image, float64 [num_captions] on the CPU."""
    scores = []
    for index, block in zip(image_of_caption.split(block_size), texts.split(block_size)):
        pairs = images[index.to(images.device)].to(device, torch.float64) * block.to(device, torch.float64)
        scores.append(pairs.sum(dim=1).cpu())
    return torch.cat(scores)


def hit_probability(counts: RankCounts, k: int) -> torch.Tensor:
    """Returns the probability that a right answer is among the first k, for a random order of ties.

    Without ties this is 1.0 if `better` < k, else 0.0. Shape [num_queries], float64.
    """
    num_left = (k - counts.better).clamp(min=0)
    miss = torch.ones(len(counts.better), dtype=torch.float64)
    for drawn in range(k):
        # Tied candidates are drawn without replacement: the probability that the next one is wrong, too.
        wrong_left = (counts.tied - drawn).clamp(min=0).double()
        chance = wrong_left / (wrong_left + counts.num_right)
        miss = torch.where(drawn < num_left, miss * chance, miss)
    return 1.0 - miss


def expected_rank(counts: RankCounts) -> torch.Tensor:
    """Returns the expected rank of the first right answer for a random order of ties. [num_queries], float64."""
    return 1.0 + counts.better.double() + counts.tied / (counts.num_right.double() + 1.0)


def bootstrap_interval(
    values: torch.Tensor, clusters: torch.Tensor | None = None, *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95% percentile-bootstrap interval of the mean over queries.

    Args:
        values: [num_queries], e.g. the probability of a hit.
        clusters: [num_queries] int64; the queries of a cluster are drawn together. Captions of one image form a
            cluster: treating them as independent would make the interval too narrow. None: each query is a cluster.
        num_resamples: number of bootstrap draws.
        seed: seed of the draws.
    """
    groups = np.arange(len(values)) if clusters is None else clusters.numpy()
    low, high = np.percentile(_resampled_means(values.numpy(), groups, num_resamples, seed), [2.5, 97.5])
    return float(low), float(high)


def _resampled_means(values: np.ndarray, clusters: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Draws clusters with replacement and returns the mean of their values in each draw, [num_resamples].

    Clusters with the same sum and size are interchangeable, so a draw is multinomial over the distinct pairs of sum and
    size. Without ties there are only a few such pairs, and a million queries take no longer than a thousand.
    """
    totals = np.stack([np.bincount(clusters, values), np.bincount(clusters)], axis=1).round(9)
    totals = totals[totals[:, 1] > 0]
    kinds, counts = np.unique(totals, axis=0, return_counts=True)
    rng, num_clusters = np.random.default_rng(seed), int(counts.sum())
    means = []
    for start in range(0, num_resamples, 500):  # in parts, because many ties give many kinds
        draws = rng.multinomial(num_clusters, counts / num_clusters, size=min(500, num_resamples - start))
        sums = draws @ kinds
        means.append(sums[:, 0] / sums[:, 1])
    return np.concatenate(means)


class PairedDifference(NamedTuple):
    """Mean of second minus first, its 95% bootstrap interval, and the two-sided p-value for no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(first: np.ndarray, second: np.ndarray, clusters: np.ndarray | None = None) -> PairedDifference:
    """Compares two systems on the same queries, with `NUM_PAIRED_RESAMPLES` draws.

    Args:
        first, second: [num_queries], e.g. 1 where the right answer came first.
        clusters: [num_queries] int; see `bootstrap_interval`.

    Returns:
        The difference; its p-value is at least 2 / (NUM_PAIRED_RESAMPLES + 1).
    """
    change = second.astype(np.float64) - first.astype(np.float64)
    clusters = np.arange(len(change)) if clusters is None else clusters
    means = _resampled_means(change, clusters, NUM_PAIRED_RESAMPLES, seed=0)
    low, high = np.percentile(means, [2.5, 97.5])
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2.0 * (beyond + 1) / (NUM_PAIRED_RESAMPLES + 1))
    return PairedDifference(float(change.mean()), float(low), float(high), float(p))


def summarise(
    counts: RankCounts, ks: Sequence[int] = (1, 5, 10), clusters: torch.Tensor | None = None
) -> dict[str, Any]:
    """Returns recall and ranks over all queries.

    Args:
        counts: counts of all queries.
        ks: values of k for recall at k; the interval is that of the first.
        clusters: see `bootstrap_interval`; for caption queries, the image of each caption.

    Returns:
        ``top1``, ``top5``, ``top10`` (fractions), ``top1-ci95`` [low, high], ``mean-rank`` and ``median-rank``.
    """
    hits = {k: hit_probability(counts, k) for k in ks}
    ranks = expected_rank(counts)
    return {
        **{f"top{k}": float(hit.mean()) for k, hit in hits.items()},
        "top1-ci95": list(bootstrap_interval(hits[ks[0]], clusters)),
        "mean-rank": float(ranks.mean()),
        "median-rank": float(np.median(ranks.numpy())),
    }


def top_matches(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    k: int,
    device: torch.device | str = "cpu",
    tile: tuple[int, int] = (1024, 16384),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k candidates with the highest scores in float64, the precision that decides ranks.

    Args:
        queries: [num_queries, dim], L2-normalised.
        candidates: [num_candidates, dim], L2-normalised.
        k: number of candidates to find; all if there are fewer.
        device: device that multiplies the tiles.
        tile: numbers of queries and of candidates of a tile.

    Returns:
        Indices of the candidates, [num_queries, k] int64, best first, and their scores, float64; on the CPU.
    """
    device = float64_device(device)
    tops, scores = [], []
    for block in queries.split(tile[0]):
        block = block.to(device, torch.float64)
        score = torch.empty(len(block), 0, dtype=torch.float64, device=device)
        top = torch.empty(len(block), 0, dtype=torch.int64, device=device)
        for first in range(0, len(candidates), tile[1]):
            found = block @ candidates[first : first + tile[1]].to(device, torch.float64).T
            found, position = found.topk(min(k, found.shape[1]), dim=1)
            score, position = torch.cat([score, found], 1), torch.cat([top, position + first], 1)
            score, kept = score.topk(min(k, score.shape[1]), dim=1)
            top = position.gather(1, kept)
        tops.append(top.cpu())
        scores.append(score.cpu())
    return torch.cat(tops), torch.cat(scores)
