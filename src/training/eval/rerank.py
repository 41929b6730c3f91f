"""Reranking: the best candidates are scored again by text-conditioned pooling, as in FLAIR's top-k evaluation.

For each image, the k captions with the highest cosine are scored again. Both directions use these scores: a caption is
compared with the images that have it among their candidates, and all other pairs are tied behind those.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast

from training.eval.encode import ComputeOptions, image_batches, load_batches
from training.eval.metrics import TIE_TOLERANCE, RankCounts, summarise
from training.eval.record import Recall, RetrievalResult
from training.eval.report.matches import top_matches
from training.eval.retrieval import RankedSet
from training.model.assembly.factory import EncoderParts
from training.model.towers.flair import conditioned_scores, encode_patches
from training.model.towers.image_encoder import in_parts
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, join_rows, sum_over_ranks


def rerank_sets(
    parts: EncoderParts,
    ranked: Sequence[RankedSet],
    num_candidates: int,
    env: DistEnv,
    options: ComputeOptions,
) -> list[RetrievalResult]:
    """Reranks benchmarks.

    Args:
        parts: a model with `flair.TextConditionedPooling`.
        ranked: benchmarks, ranked by cosine.
        num_candidates: number of captions per image that are scored again.
        env: each rank processes its share of the images.
        options: batch size, workers, precision.

    Returns:
        One result per benchmark, with ``-reranked`` appended to its key.

    Raises:
        BrokenImageError: an image that was read before can no longer be read.
    """
    results = []
    for r in ranked:
        candidates, _ = top_matches(r.images, r.texts, num_candidates, env.device)
        queries = encode_queries(parts, r.pairs.captions, env, options)
        scores = score_candidates(parts, r.pairs.image_paths, queries, candidates, env, options)
        i2t, t2i = count_listed(candidates, scores, r.owner)
        result = replace(
            r.result,
            title=f"{r.result.title}, {candidates.shape[1]} reranked",
            key=f"{r.result.key}-reranked",
            protocol=f"{r.result.protocol}, {candidates.shape[1]} captions of each image reranked",
            i2t=Recall.of(summarise(i2t)),
            t2i=Recall.of(summarise(t2i, clusters=r.owner)),
        )
        results.append(result)
    return results


@torch.no_grad()
def encode_queries(parts: EncoderParts, texts: Sequence[str], env: DistEnv, options: ComputeOptions) -> torch.Tensor:
    """Returns the text features that query the pooling: [num_texts, dim] float32 on the CPU, not normalised.

    Each rank encodes its share of the batches; all get all features.
    """
    size = options.text_batch_size or options.batch_size
    found = []
    for start in range(0, len(texts), size)[env.rank :: env.world_size]:
        ids = parts.tokenizer(list(texts[start : start + size])).to(env.device)
        with get_autocast(options.precision, device_type=env.device.type)():
            found.append((slice(start, start + size), parts.model.encode_text(ids).float().cpu()))
    return join_rows(found, len(texts), env)


@torch.no_grad()
def score_candidates(
    parts: EncoderParts,
    paths: Sequence[Path],
    queries: torch.Tensor,
    candidates: torch.Tensor,
    env: DistEnv,
    options: ComputeOptions,
) -> torch.Tensor:
    """Scores each image with its candidates. Only the patches of one batch of images are in memory at a time.

    Args:
        parts: a model with `flair.TextConditionedPooling`.
        paths: image files.
        queries: result of `encode_queries`.
        candidates: [num_images, k] int64, rows of `queries`.
        env, options: see `rerank_sets`.

    Returns:
        [num_images, k] float32 on the CPU, complete on every rank.

    Raises:
        BrokenImageError: an image can't be read; raised on its rank only.
    """
    scores = torch.zeros(candidates.shape)
    for batch in load_batches(image_batches(parts.preprocess, paths, env, options), "image", env, options):
        if batch.broken:
            raise BrokenImageError(next(iter(batch.broken.values())))
        pixels = batch.inputs.to(env.device, get_input_dtype(options.precision))
        with get_autocast(options.precision, device_type=env.device.type)():
            patches = in_parts(partial(encode_patches, parts.model.visual), pixels)
            own = queries[candidates[batch.positions]].to(env.device, patches.dtype)
            scores[batch.positions] = conditioned_scores(parts.model.visual_proj, own, patches).cpu()
    return sum_over_ranks(scores, env)


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
    scores = scores.double()
    num_images, num_captions = len(candidates), len(image_of_caption)
    image = torch.arange(num_images)[:, None].expand_as(candidates)
    is_right = image_of_caption[candidates] == image
    lowest = torch.tensor(-torch.inf, dtype=torch.float64)

    best = torch.where(is_right, scores, lowest).amax(dim=1, keepdim=True)
    tied, better = (scores - best).abs() <= TIE_TOLERANCE, scores > best + TIE_TOLERANCE
    i2t = RankCounts((better & ~is_right).sum(1), (tied & ~is_right).sum(1), (tied & is_right).sum(1))
    unlisted = ~is_right.any(dim=1)
    num_right = image_of_caption.bincount(minlength=num_images)
    i2t.right[unlisted] = num_right[unlisted]
    i2t.tied[unlisted] = num_captions - candidates.shape[1] - num_right[unlisted]

    own = lowest.repeat(num_captions)
    own[candidates[is_right]] = scores[is_right]
    wrong, wrong_scores = candidates[~is_right], scores[~is_right]
    better = wrong_scores > own[wrong] + TIE_TOLERANCE
    tied = (wrong_scores - own[wrong]).abs() <= TIE_TOLERANCE
    t2i = RankCounts(
        wrong[better].bincount(minlength=num_captions),
        wrong[tied].bincount(minlength=num_captions),
        torch.ones(num_captions, dtype=torch.int64),
    )
    unlisted = own == lowest
    t2i.tied[unlisted] = num_images - 1 - t2i.better[unlisted]
    return i2t, t2i
