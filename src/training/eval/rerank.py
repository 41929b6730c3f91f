"""Reranking: the best candidates are scored again by text-conditioned pooling, as in FLAIR's top-k evaluation.

For each image, the k captions with the highest cosine are scored again. Both directions use these scores: a caption is
compared with the images that have it among their candidates, and all other pairs are tied behind those.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast

from training.eval.encode import Encoder
from training.eval.metrics import TIE_TOLERANCE, RankCounts, summarise, top_matches
from training.eval.record import Recall, RetrievalResult
from training.eval.retrieval import RankedSet
from training.model.towers.encoders import in_chunks
from training.model.towers.flair import conditioned_scores, encode_with_patches
from training.readers.images import BrokenImageError
from training.runtime.distributed import sum_over_ranks


def rerank_sets(encoder: Encoder, ranked: Sequence[RankedSet], num_candidates: int) -> list[RetrievalResult]:
    """Reranks benchmarks.

    Args:
        encoder: a model with `flair.TextConditionedPooling`.
        ranked: benchmarks, ranked by cosine.
        num_candidates: number of captions per image that are scored again.

    Returns:
        One result per benchmark, with ``-reranked`` appended to its key.

    Raises:
        BrokenImageError: an image that was read before can no longer be read.
    """
    results = []
    for r in ranked:
        candidates, _ = top_matches(r.images, r.texts, num_candidates, encoder.env.device)
        queries = encoder.texts(r.pairs.captions, count_lost=False, normalise=False)
        scores = score_candidates(encoder, r.pairs.image_paths, queries.features, candidates)
        i2t, t2i = count_listed(candidates, scores, r.owner)
        listed = f"{candidates.shape[1]} captions of each image reranked"
        about: dict[str, Any] = {"title": f"{r.result.title}, {candidates.shape[1]} reranked"}
        about |= {"key": f"{r.result.key}-reranked", "protocol": f"{r.result.protocol}, {listed}"}
        about |= {"i2t": Recall.of(summarise(i2t)), "t2i": Recall.of(summarise(t2i, clusters=r.owner))}
        results.append(replace(r.result, **about))
    return results


@torch.no_grad()
def score_candidates(
    encoder: Encoder, paths: Sequence[Path], queries: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """Scores each image with its candidates. Only the patches of one batch of images are in memory at a time.

    Args:
        encoder: a model with `flair.TextConditionedPooling`.
        paths: image files.
        queries: text features that query the pooling, [num_texts, dim], not normalised.
        candidates: [num_images, k] int64, rows of `queries`.

    Returns:
        [num_images, k] float32 on the CPU, complete on every rank.

    Raises:
        BrokenImageError: an image can't be read; raised on its rank only.
    """
    model: Any = encoder.parts.model
    device, precision = encoder.env.device, encoder.options.precision
    scores = torch.zeros(candidates.shape)
    for batch in encoder.load_images(paths):
        if batch.broken or batch.inputs is None:
            raise BrokenImageError(next(iter(batch.broken.values())))
        pixels = batch.inputs.to(device, get_input_dtype(precision))
        with get_autocast(precision, device_type=device.type)():
            patches = in_chunks(lambda chunk: encode_with_patches(model.visual, chunk)[1], pixels)
            chosen = queries[candidates[batch.positions]].to(device, patches.dtype)
            scores[batch.positions] = conditioned_scores(model.visual_proj, chosen, patches).cpu()
    return sum_over_ranks(scores, encoder.env)


def count_listed(
    candidates: torch.Tensor, scores: torch.Tensor, image_of_caption: torch.Tensor
) -> tuple[RankCounts, RankCounts]:
    """Does what `metrics.count_ranks` does, if each image has scores for some captions only.

    Args:
        candidates: captions with a score for each image, [num_images, k] int64.
        scores: [num_images, k]; the score of all other pairs is taken to be minus infinity.
        image_of_caption: [num_captions] int64; every image has at least one caption.

    Returns:
        Counts for image queries and for caption queries.
    """
    num_images, num_captions = len(candidates), len(image_of_caption)
    image, caption = torch.arange(num_images).repeat_interleave(candidates.shape[1]), candidates.flatten()
    pairs = (scores.double().flatten(), image_of_caption[caption] == image)
    num_right = image_of_caption.bincount(minlength=num_images)
    i2t = _count(image, *pairs, num_right, num_captions)
    return i2t, _count(caption, *pairs, torch.ones(num_captions, dtype=torch.int64), num_images)


def _count(
    query: torch.Tensor, scores: torch.Tensor, is_right: torch.Tensor, num_right: torch.Tensor, num_candidates: int
) -> RankCounts:
    """Counts the candidates of each query.

    Args:
        query, scores, is_right: of each pair that has a score, [num_pairs].
        num_right: number of right candidates of each query, [num_queries], with and without a score.
        num_candidates: number of candidates with and without a score.
    """
    best = torch.full((len(num_right),), -torch.inf, dtype=torch.float64)
    best.scatter_reduce_(0, query[is_right], scores[is_right], reduce="amax")
    is_better, is_tied = scores > best[query] + TIE_TOLERANCE, (scores - best[query]).abs() <= TIE_TOLERANCE
    kinds = (is_better & ~is_right, is_tied & ~is_right, is_tied & is_right)
    better, tied, num_best = (query[kind].bincount(minlength=len(num_right)) for kind in kinds)
    unlisted = best.isinf()
    return RankCounts(
        better,
        torch.where(unlisted, num_candidates - better - num_right, tied),
        torch.where(unlisted, num_right, num_best),
    )
