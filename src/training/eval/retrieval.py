"""Long text-image retrieval: reads and encodes benchmarks, ranks them, and computes recall.

Benchmarks come from `dataloaders.registry`.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataloaders.pairs import ClassificationSet, RetrievalSet, describe_missing, find_images
from dataloaders.registry import benchmarks, destination
from training.eval.metrics import RankCounts, count_ranks, summarise
from training.eval.record import ClassificationResult, Recall, RetrievalResult
from training.readers.files import upright
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, stop_on_every_rank, sum_over_ranks

if TYPE_CHECKING:
    from training.eval.encode import Encoder


@dataclass(frozen=True)
class RetrievalWork:
    """The benchmarks to evaluate.

    Attributes:
        sets: retrieval sets in the published order.
        identity: identity of each image file; the same for two paths to one file.
        classification: zero-shot sets, which are encoded separately.
    """

    sets: list[RetrievalSet]
    identity: dict[Path, object]
    classification: tuple[ClassificationSet, ...] = ()


def read_benchmarks(args: argparse.Namespace) -> tuple[list[RetrievalSet], tuple[ClassificationSet, ...]]:
    """Reads every benchmark that the flags name; returns retrieval and classification sets, in the published order."""
    sets: list[RetrievalSet] = []
    classification: list[ClassificationSet] = []
    for benchmark in benchmarks():
        if getattr(args, destination(benchmark.flag)):
            found = benchmark.sets(args)
            if args.exif_rotation == "on" or (args.exif_rotation == "auto" and benchmark.group == "own"):
                # They are used like paths.
                found = [replace(s, image_paths=tuple(map(upright, s.image_paths))) for s in found]  # type: ignore[arg-type]
            kind: list[Any] = classification if benchmark.classification else sets
            kind.extend(found)
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
    key, count = Counter(s.key for s in sets).most_common(1)[0] if sets else ("", 0)
    if count > 1:
        name = key.removesuffix("-retrieval")
        raise ValueError(f"two data sets are called {name}; rename the file or folder of one of them")


def plan_retrieval(sets: list[RetrievalSet], allow_missing: bool) -> RetrievalWork:
    """Checks that all images exist.

    Raises:
        FileNotFoundError: images or annotations are missing and `allow_missing` is False; the message names the first
            ten of each set.
        ValueError: a set has no pairs.
    """
    sets, identity = find_images(sets)
    incomplete = [describe_missing(s) for s in sets if s.missing]
    if incomplete and not allow_missing:
        remedy = "Complete the data, or add --allow-missing to evaluate the rest."
        raise FileNotFoundError("\n".join([*incomplete, remedy]))
    for s in sets:
        if not s.captions:
            detail = describe_missing(s) if s.missing else f"{s.title}: no pairs found; {s.source}"
            raise ValueError(f"{s.title} is empty.\n{detail}")
    return RetrievalWork(sets, identity)


@dataclass(frozen=True)
class EncodedSet:
    """A benchmark and its features, complete on every rank.

    Attributes:
        pairs: the set without the pairs whose image is broken.
        images: [num_images, dim] float32 on the CPU, L2-normalised.
        texts: [num_captions, dim], likewise.
        lost_tokens: [num_captions] int64, number of tokens that the tokenizer cut off; -1 if unknown.
        num_broken: number of pairs left out because their image is broken.
    """

    pairs: RetrievalSet
    images: torch.Tensor
    texts: torch.Tensor
    lost_tokens: torch.Tensor
    num_broken: int = 0

    @property
    def owner(self) -> torch.Tensor:
        """Image of each caption, [num_captions] int64."""
        return torch.tensor(self.pairs.image_of_caption)


@dataclass(frozen=True)
class RankedSet(EncodedSet):
    """A benchmark with its features and ranks.

    Attributes:
        result: the numbers.
        i2t, t2i: counts for image queries and for caption queries.
    """

    result: RetrievalResult = field(kw_only=True)
    i2t: RankCounts = field(kw_only=True)
    t2i: RankCounts = field(kw_only=True)


@dataclass(frozen=True)
class Outcome:
    """Everything that an evaluation measured, and its inputs.

    Attributes:
        ranked: benchmarks.
        zero_shot: results of classification.
        reranked: results of `rerank.rerank_sets`.
        diagnostics: result of `diagnostics.diagnose`.
    """

    ranked: list[RankedSet]
    zero_shot: list[ClassificationResult]
    reranked: list[RetrievalResult]
    diagnostics: dict[str, dict]


def evaluate_retrieval(encoder: "Encoder", work: RetrievalWork) -> list[RetrievalResult]:
    """Encodes and ranks every set; see `encode_sets` and `rank_set`, also for what is raised."""
    return [rank_set(encoded, encoder.env).result for encoded in encode_sets(encoder, work)]


def encode_sets(encoder: "Encoder", work: RetrievalWork) -> Iterator[EncodedSet]:
    """Encodes set by set, distributed over all ranks; an image or caption of several sets is encoded once.

    Args:
        encoder: the model.
        work: result of `plan_retrieval`.

    Raises:
        BrokenImageError: an image can't be read, unless allowed; or a set has no readable image.
        FloatingPointError: the model returned NaN or infinity.
    """
    # Imported here, because an evaluation of features needs no model and would wait for open_clip's import.
    from training.eval.caches import FeatureStore, encode_images_once, open_caches, text_key

    image_cache, text_cache = open_caches(encoder)
    images = FeatureStore(partial(encode_images_once, image_cache, encoder))
    texts = FeatureStore(partial(text_cache.encode, key_of=text_key, encode=encoder.texts))
    for s in work.sets:
        stop_on_every_rank(encoder.env)
        found = images(s.image_paths, [work.identity[path] for path in s.image_paths])
        kept = s.without_images(found.broken)
        if not kept.captions:
            raise BrokenImageError(f"{s.title}: no image can be read.\n{describe_missing(kept)}")
        features = found.features
        if found.broken:
            features = features[[i for i in range(len(features)) if i not in found.broken]]
        captions = texts(kept.captions)
        yield EncodedSet(kept, features, captions.features, captions.lost_tokens, len(kept.missing) - len(s.missing))


def rank_set(encoded: EncodedSet, env: DistEnv) -> RankedSet:
    """Ranks a set; each rank of `env` computes its share, and all get the result."""
    pairs, owner = encoded.pairs, encoded.owner
    i2t, t2i = count_over_ranks(encoded.images, encoded.texts, owner, env)
    num_expected = max(pairs.num_published or 0, len(pairs.captions) + len(pairs.missing))
    counts = (len(pairs.captions), num_expected, len(pairs.missing) - encoded.num_broken, encoded.num_broken)
    about = (pairs.protocol, pairs.fingerprint(), len(pairs.image_paths))
    recall = (Recall.of(summarise(i2t)), Recall.of(summarise(t2i, clusters=owner)))
    share, mean = None, None  # of truncated captions, and of the tokens that they lost
    if (encoded.lost_tokens >= 0).all():
        lost = encoded.lost_tokens[encoded.lost_tokens > 0].double()
        share, mean = len(lost) / len(encoded.lost_tokens), float(lost.mean()) if len(lost) else 0.0
    result = RetrievalResult(pairs.title, pairs.key, *counts, *about, *recall, share, mean)
    return RankedSet(**vars(encoded), result=result, i2t=i2t, t2i=t2i)


def count_over_ranks(
    images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor, env: DistEnv, both: bool = True
) -> tuple[RankCounts, RankCounts]:
    """Does what `metrics.count_ranks` does, distributed over all ranks of `env`; all get the same result."""
    counts = count_ranks(images, texts, owner, device=env.device, both=both, rank=env.rank, world_size=env.world_size)
    i2t, t2i = (RankCounts(sum_over_ranks(c.better, env), sum_over_ranks(c.tied, env), c.num_right) for c in counts)
    return i2t, t2i
