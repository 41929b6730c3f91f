"""Long text-image retrieval: reads and encodes benchmarks, ranks them, and computes recall.

Benchmarks come from `dataloaders.registry`; a new benchmark is one new file in dataloaders/.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dataloaders.pairs import ClassificationSet, FoundImages, RetrievalSet, describe_missing, find_images
from dataloaders.registry import benchmarks, destination
from training.eval.encode import ComputeOptions, Encoding, encode_texts
from training.eval.feature_cache import encode_images_once, open_caches, text_key
from training.eval.metrics import RankCounts, count_ranks, summarise
from training.eval.record import Recall, RetrievalResult
from training.model.assembly.factory import EncoderParts
from training.readers.files import upright
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, raise_together, sum_over_ranks
from training.runtime.stop import SIGNALS


@dataclass(frozen=True)
class RetrievalWork:
    """The distinct image files and captions to encode, and which set uses which of them.

    Attributes:
        sets: the benchmarks in the published order.
        images: distinct image files, and for each set the file of each image.
        texts: distinct captions.
        text_index: for each set and each of its captions, the index in `texts`.
        classification: zero-shot sets, which are encoded separately.
    """

    sets: list[RetrievalSet]
    images: FoundImages
    texts: tuple[str, ...]
    text_index: list[list[int]]
    classification: tuple[ClassificationSet, ...] = ()


def read_benchmarks(args: argparse.Namespace) -> tuple[list[RetrievalSet], tuple[ClassificationSet, ...]]:
    """Reads every benchmark that the flags name; returns retrieval and classification sets, in the published order."""
    sets, classification = [], []
    for benchmark in benchmarks():
        if getattr(args, destination(benchmark.flag)):
            found = benchmark.read(args)
            if args.exif_rotation == "on" or (args.exif_rotation == "auto" and benchmark.group == "own"):
                found = [replace(s, image_paths=tuple(map(upright, s.image_paths))) for s in found]
            (classification if benchmark.classification else sets).extend(found)
    return sets, tuple(classification)


def plan_benchmarks(args: argparse.Namespace) -> RetrievalWork | None:
    """Reads and checks every benchmark that the flags name; returns None if they name none.

    Raises:
        FileNotFoundError, ValueError: a file is missing or broken; see also `plan_retrieval`.
    """
    sets, classification = read_benchmarks(args)
    check_names(sets)
    if not sets and not classification:
        return None
    return replace(plan_retrieval(sets, args.allow_missing), classification=classification)


def check_names(sets: Sequence[RetrievalSet]) -> None:
    """Raises ValueError if two sets would write their results under the same key."""
    keys = [s.key for s in sets]
    for key in keys:
        if keys.count(key) > 1:
            name = key.removesuffix("-retrieval")
            raise ValueError(f"two data sets are called {name}; rename the file or folder of one of them")


def plan_retrieval(sets: list[RetrievalSet], allow_missing: bool) -> RetrievalWork:
    """Checks that all images exist, and collects the distinct images and captions of all sets.

    Raises:
        FileNotFoundError: images or annotations are missing and `allow_missing` is False; the message names the first
            ten of each set.
        ValueError: a set has no pairs.
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


@dataclass(frozen=True)
class RankedSet:
    """A benchmark and its ranks.

    Attributes:
        result: the numbers.
        pairs: the set without the pairs whose image is broken.
        image_rows, text_rows: rows of its images and captions among all encoded features.
        i2t, t2i: counts for image queries and for caption queries.
    """

    result: RetrievalResult
    pairs: RetrievalSet
    image_rows: list[int]
    text_rows: list[int]
    i2t: RankCounts
    t2i: RankCounts


def evaluate_retrieval(
    parts: EncoderParts,
    work: RetrievalWork,
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
) -> list[RetrievalResult]:
    """Encodes and ranks every set; see `encode_work` and `rank_sets`, also for what is raised."""
    images, texts = encode_work(parts, work, env, options, allow_broken)
    return [ranked.result for ranked in rank_sets(work, images, texts, env)]


def encode_work(
    parts: EncoderParts,
    work: RetrievalWork,
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
    cache: str | None = None,
) -> tuple[Encoding, Encoding]:
    """Encodes every distinct image and caption once, distributed over all ranks.

    Args:
        parts: the model with its transforms and tokenizer.
        work: result of `plan_retrieval`.
        env: this process.
        options: batch size, workers, precision.
        allow_broken: leave unreadable images out instead of raising.
        cache: folder of the feature cache, which is read and extended.

    Returns:
        Features of `work.images.paths` and of `work.texts`.

    Raises:
        BrokenImageError: an image can't be read, unless allowed.
        FloatingPointError: the model returned NaN or infinity.
    """

    def texts_at(positions: Sequence[int]) -> Encoding:
        chosen = [work.texts[p] for p in positions]
        return encode_texts(parts.model, parts.tokenizer, chosen, env, options)

    image_cache, text_cache = None, None
    if cache:
        image_cache, text_cache = open_caches(cache, parts, options.precision, env, options.image_decoding)
    images = encode_images_once(image_cache, parts, work.images.paths, env, options, allow_broken)
    if text_cache is None:
        return images, texts_at(range(len(work.texts)))
    return images, text_cache.encode([text_key(text) for text in work.texts], texts_at)


def rank_sets(work: RetrievalWork, images: Encoding, texts: Encoding, env: DistEnv) -> list[RankedSet]:
    """Ranks every set.

    Args:
        work: the sets, and which encoded items they use.
        images: features of `work.images.paths`; pairs whose image is broken are left out.
        texts: features of `work.texts`.
        env: each rank computes its share; all get the same result.

    Raises:
        BrokenImageError: a set has no readable image.
    """
    ranked = []
    for number, whole in enumerate(work.sets):
        raise_together(SIGNALS.error(), env)
        files = work.images.index[number]
        broken = {i: images.broken[file] for i, file in enumerate(files) if file in images.broken}
        kept = whole.without_images(broken)
        if not kept.captions:
            raise BrokenImageError(f"{kept.title}: no image can be read.\n{describe_missing(kept)}")
        own_images = [file for i, file in enumerate(files) if i not in broken]
        own_texts = [t for t, i in zip(work.text_index[number], whole.image_of_caption) if i not in broken]
        owner = torch.tensor(kept.image_of_caption)
        i2t, t2i = count_over_ranks(images.features[own_images], texts.features[own_texts], owner, env)
        result = RetrievalResult(
            title=kept.title,
            key=kept.key,
            protocol=kept.protocol,
            fingerprint=kept.fingerprint(),
            num_images=len(kept.image_paths),
            num_pairs=len(kept.captions),
            num_expected=max(kept.num_published or 0, len(kept.captions) + len(kept.missing)),
            num_broken=len(kept.missing) - len(whole.missing),
            num_missing=len(whole.missing),
            i2t=Recall.of(summarise(i2t)),
            t2i=Recall.of(summarise(t2i, clusters=owner)),
            **_truncation(texts.lost_tokens[own_texts]),
        )
        ranked.append(RankedSet(result, kept, own_images, own_texts, i2t, t2i))
    return ranked


def count_over_ranks(
    images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor, env: DistEnv
) -> tuple[RankCounts, RankCounts]:
    """Does what `metrics.count_ranks` does, distributed over all ranks; all get the same result.

    Args:
        images: [num_images, dim], L2-normalised.
        texts: [num_captions, dim], L2-normalised.
        owner: [num_captions] int64, image of each caption.
        env: this process.
    """
    counts = count_ranks(images, texts, owner, device=env.device, rank=env.rank, world_size=env.world_size)
    i2t, t2i = (RankCounts(sum_over_ranks(c.better, env), sum_over_ranks(c.tied, env), c.right) for c in counts)
    return i2t, t2i


def _truncation(lost_tokens: torch.Tensor) -> dict[str, float | None]:
    """Returns the fraction of truncated captions and the mean number of tokens they lost; None if unknown."""
    if (lost_tokens < 0).any():
        return {"truncated_share": None, "truncated_mean_tokens_lost": None}
    cut = lost_tokens[lost_tokens > 0].double()
    return {
        "truncated_share": len(cut) / len(lost_tokens),
        "truncated_mean_tokens_lost": float(cut.mean()) if len(cut) else 0.0,
    }
