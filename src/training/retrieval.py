"""Long text-image retrieval: benchmarks -> features -> ranks -> numbers.

Adding a benchmark: a reader in dataloaders/, a flag in params.py, a line in `read_benchmarks`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dataloaders.dci import read_dci
from dataloaders.iiw import read_iiw
from dataloaders.images import BrokenImageError
from dataloaders.pairs import FoundImages, RetrievalSet, describe_missing, find_images
from dataloaders.share4v import read_share4v
from dataloaders.urban1k import read_urban1k
from training.distributed import DistEnv, sum_over_ranks
from training.encode import ComputeOptions, Encoding, encode_images, encode_texts
from training.feature_cache import image_key, open_caches, text_key
from training.metrics import RankCounts, count_ranks, summarise
from training.model.factory import EncoderParts
from training.model.truncation import count_lost_tokens


@dataclass(frozen=True)
class RetrievalWork:
    """Everything to encode, each image file and each caption once, and which set uses what.

    Attributes:
        sets: the benchmarks in the published order.
        images: distinct image files, and per set the file of each image.
        texts: distinct captions.
        text_index: per set, for each caption its position in `texts`.
    """

    sets: list[RetrievalSet]
    images: FoundImages
    texts: tuple[str, ...]
    text_index: list[list[int]]


def read_benchmarks(args: argparse.Namespace) -> list[RetrievalSet]:
    """Reads every benchmark that the flags name, in the order of the published table."""
    sets = []
    if args.dci_retrieval:
        sets.append(read_dci(args.dci_retrieval))
    if args.iiw_retrieval:
        sets.append(read_iiw(args.iiw_retrieval, args.iiw_anno))
    if args.share4v_retrieval:
        sets.extend(read_share4v(args.share4v_retrieval, args.share4v_anno, args.share4v_val_num))
    if args.urban1k_retrieval:
        sets.append(read_urban1k(args.urban1k_retrieval))
    return sets


def plan_retrieval(sets: list[RetrievalSet], allow_missing: bool) -> RetrievalWork:
    """Checks that all images are there and finds what the sets share.

    Raises:
        FileNotFoundError: images or annotations are missing and may not be; names the first ten per set.
        ValueError: a set has no pair left.
    """
    sets, images = find_images(sets)
    incomplete = [describe_missing(s) for s in sets if s.missing]
    if incomplete and not allow_missing:
        raise FileNotFoundError(
            "\n".join(incomplete + ["Complete the data, or add --allow-missing to evaluate the rest."])
        )
    for s in sets:
        if not s.captions:
            detail = describe_missing(s) if s.missing else f"{s.title}: no pairs found; {s.source}"
            raise ValueError(f"{s.title} is empty.\n{detail}")
    texts = {text: position for position, text in enumerate(dict.fromkeys(c for s in sets for c in s.captions))}
    return RetrievalWork(sets, images, tuple(texts), [[texts[c] for c in s.captions] for s in sets])


def evaluate_retrieval(
    parts: EncoderParts,
    work: RetrievalWork,
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
    cache: str | None = None,
) -> list[dict[str, object]]:
    """Encodes every distinct image and caption once, over all ranks, and ranks every set.

    Args:
        parts: model and what it reads through.
        work: of `plan_retrieval`.
        env: this process.
        options: batch size, workers, precision.
        allow_broken: leave unreadable images out instead of raising.
        cache: folder of features that were encoded earlier, and of those that are encoded now.

    Returns:
        Records as of `rank_sets`.

    Raises:
        BrokenImageError: an unreadable image, unless allowed; or not one readable image is left in a set.
        FloatingPointError: the model returned NaN or infinity.
    """
    paths, count_lost = work.images.paths, partial(count_lost_tokens, parts.tokenizer)

    def images_at(positions: Sequence[int]) -> Encoding:
        chosen = [paths[p] for p in positions]
        return encode_images(parts.model, parts.preprocess, chosen, env, options, allow_broken)

    def texts_at(positions: Sequence[int]) -> Encoding:
        chosen = [work.texts[p] for p in positions]
        return encode_texts(parts.model, parts.tokenizer, count_lost, chosen, env, options)

    if not cache:
        return rank_sets(work, images_at(range(len(paths))), texts_at(range(len(work.texts))), env)
    image_cache, text_cache = open_caches(cache, parts, options.precision, env)
    images = image_cache.encode([image_key(path) for path in paths], images_at)
    return rank_sets(work, images, text_cache.encode([text_key(text) for text in work.texts], texts_at), env)


def rank_sets(
    work: RetrievalWork, images: Encoding, texts: Encoding, env: DistEnv, block_size: int = 4096
) -> list[dict[str, object]]:
    """Ranks every set.

    Args:
        work: sets and where their items lie among the encoded ones.
        images: features of `work.images.paths`; sets lose the pairs whose image is broken.
        texts: features of `work.texts`.
        env: each rank counts its share of the blocks; all get the same result.
        block_size: rows of the similarity matrix that are held at a time.

    Returns:
        One record per set: title, key, counts of pairs, truncation, and under ``i2t`` and ``t2i`` what
        `metrics.summarise` gives.

    Raises:
        BrokenImageError: not one readable image is left in a set.
    """
    records = []
    for number, whole in enumerate(work.sets):
        files = work.images.index[number]
        broken = {i: images.broken[file] for i, file in enumerate(files) if file in images.broken}
        kept = whole.without_images(broken)
        if not kept.captions:
            raise BrokenImageError(f"{kept.title}: no readable image is left.\n{describe_missing(kept)}")
        own_images = [file for i, file in enumerate(files) if i not in broken]
        own_texts = [t for t, i in zip(work.text_index[number], whole.image_of_caption) if i not in broken]
        i2t, t2i = count_ranks(
            images.features[own_images],
            texts.features[own_texts],
            torch.tensor(kept.image_of_caption),
            device=env.device,
            block_size=block_size,
            rank=env.rank,
            world_size=env.world_size,
        )
        records.append(
            {
                "title": kept.title,
                "key": kept.key,
                "num_pairs": len(kept.captions),
                "num_expected": max(kept.num_published or 0, len(kept.captions) + len(kept.missing)),
                "num_broken": len(broken),
                "num_missing": len(kept.missing) - len(broken),
                **_truncation(texts.lost_tokens[own_texts]),
                "i2t": summarise(_sum_counts(i2t, env)),
                "t2i": summarise(_sum_counts(t2i, env)),
            }
        )
    return records


def _sum_counts(counts: RankCounts, env: DistEnv) -> RankCounts:
    return RankCounts(sum_over_ranks(counts.better, env), sum_over_ranks(counts.tied, env), counts.right)


def _truncation(lost_tokens: torch.Tensor) -> dict[str, float]:
    """Share of captions that were cut, and the mean number of tokens that a cut caption lost."""
    cut = lost_tokens[lost_tokens > 0].double()
    return {
        "truncated_share": len(cut) / len(lost_tokens),
        "truncated_mean_tokens_lost": float(cut.mean()) if len(cut) else 0.0,
    }
