"""Zero-shot classification with open_clip's class names, templates and classifier, distributed over all ranks."""

import itertools
import logging
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from open_clip_train.precision import get_autocast

from dataloaders.pairs import ClassificationSet, ClassTexts
from training.eval.encode import ComputeOptions, Encoding
from training.eval.feature_cache import FeatureCache, encode_images_once, open_caches, text_key
from training.eval.metrics import TIE_TOLERANCE, RankCounts, summarise
from training.eval.record import TEMPLATES, ClassificationResult
from training.model.assembly.factory import EncoderParts
from training.model.tokenizers.truncation import count_lost_tokens
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, join_rows, stop_together
from training.runtime.stop import SIGNALS

CLASSES_PER_BATCH = 10  # open_clip's
TEXTS_PER_BATCH = 800  # 10 classes in OpenAI's 80 templates


def evaluate_zero_shot(
    parts: EncoderParts,
    sets: tuple[ClassificationSet, ...],
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
    cache: str | None = None,
) -> list[ClassificationResult]:
    """Classifies the images of every set into ImageNet's 1,000 classes.

    Args:
        parts, env, options, allow_broken: see `feature_cache.encode_images_once`.
        sets: images with their labels; all sets have the same class texts, or none.
        cache: folder of the feature cache, which is read and extended, also with features of the classes.

    Returns:
        One result per set.

    Raises:
        BrokenImageError: an image can't be read, unless allowed; or a set has no readable image.
        FloatingPointError: the model returned NaN or infinity.
    """
    if not sets:
        return []
    described = sets[0].class_texts
    if described:
        class_texts, prompts = described.texts, described.name
        _warn_about_truncation(parts.tokenizer, described, env)
    else:
        class_texts = [[template(name) for template in OPENAI_IMAGENET_TEMPLATES] for name in IMAGENET_CLASSNAMES]
        prompts = TEMPLATES
    image_cache = None
    if cache:
        image_cache, text_cache = open_caches(cache, parts, options.precision, env, options.image_decoding)
        classifier = _classifier_of(text_cache, parts, class_texts, env, options)
    else:
        classifier = build_classifier(parts, class_texts, env, options)
    results = []
    for s in sets:
        images = encode_images_once(image_cache, parts, s.image_paths, env, options, allow_broken)
        kept = [i for i in range(len(s.labels)) if i not in images.broken]
        if not kept:
            raise BrokenImageError(f"{s.title}: no image can be read; {next(iter(images.broken.values()))}")
        counts = count_label_ranks(images.features[kept], classifier, torch.tensor(s.labels)[kept])
        summary = summarise(counts, ks=(1, 5))
        results.append(
            ClassificationResult(
                title=s.title,
                key=s.key,
                num_pairs=len(kept),
                num_expected=max(s.num_published, len(s.labels)),
                num_missing=max(s.num_published - len(s.labels), 0),
                num_broken=len(images.broken),
                top1=summary["top1"],
                top5=summary["top5"],
                top1_ci95=summary["top1-ci95"],
                prompts=prompts,
            )
        )
    return results


def _classifier_of(
    cache: FeatureCache,
    parts: EncoderParts,
    class_texts: Sequence[Sequence[str]],
    env: DistEnv,
    options: ComputeOptions,
) -> torch.Tensor:
    """Returns the result of `build_classifier`, with columns taken from the cache where it has them."""

    def encode(positions: list[int]) -> Encoding:
        columns = build_classifier(parts, [class_texts[p] for p in positions], env, options)
        return Encoding(columns.T.contiguous(), {}, torch.zeros(len(positions), dtype=torch.int64))

    keys = [text_key("class\n" + "\n".join(texts)) for texts in class_texts]
    return cache.encode(keys, encode).features.T


def build_classifier(
    parts: EncoderParts, class_texts: Sequence[Sequence[str]], env: DistEnv, options: ComputeOptions
) -> torch.Tensor:
    """Builds open_clip's zero-shot classifier: the mean of the features of a class's texts.

    A batch has at most 10 classes, all with the same number of texts; rank b mod world_size encodes batch b.

    Args:
        parts: the model.
        class_texts: the texts of each class.
        env: the ranks share the work; all get the result.
        options: precision.

    Returns:
        [dim, num_classes] float32 on the CPU, columns L2-normalised; the same on every rank.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    rows: list[tuple[slice, torch.Tensor]] = []
    for start, end in _batch_classes([len(texts) for texts in class_texts])[env.rank :: env.world_size]:
        if SIGNALS.name:
            break
        # open_clip is given a class's list of texts as its "name"; template k then selects the k-th text.
        take = [itemgetter(k) for k in range(len(class_texts[start]))]
        with get_autocast(options.precision, device_type=env.device.type)():
            built = build_zero_shot_classifier(
                parts.model,
                parts.tokenizer,
                class_texts[start:end],
                take,
                num_classes_per_batch=None,
                device=env.device,
            )
        rows.append((slice(start, end), built.T.float().cpu()))
    stop_together(env)
    classifier = join_rows(rows, len(class_texts), env)
    if not classifier.isfinite().all():
        raise FloatingPointError(f"the model returned NaN or infinity in {options.precision}; try --precision fp32")
    return classifier.T


def _batch_classes(num_texts: list[int]) -> list[tuple[int, int]]:
    """Divides consecutive classes into batches [start, end) in which all classes have the same number of texts."""
    batches, start = [], 0
    for number, own in itertools.groupby(num_texts):
        end = start + len(list(own))
        step = max(1, min(CLASSES_PER_BATCH, TEXTS_PER_BATCH // number))
        batches += [(first, min(first + step, end)) for first in range(start, end, step)]
        start = end
    return batches


def _warn_about_truncation(tokenizer: Callable, described: ClassTexts, env: DistEnv) -> None:
    texts = [text for own in described.texts for text in own]
    cut = sum(lost > 0 for lost in count_lost_tokens(tokenizer, texts)) if env.is_main else 0
    if cut:
        logging.warning(
            f"{described.name}: {cut:,} of {len(texts):,} class descriptions are longer than the model's context of "
            f"{tokenizer.context_length} tokens and are truncated."
        )


def count_label_ranks(
    features: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor, block_size: int = 4096
) -> RankCounts:
    """Counts for each image the classes that score higher than the right one, and those that score the same.

    Args:
        features: [num_images, dim], L2-normalised.
        classifier: [dim, num_classes].
        labels: [num_images] int64.
        block_size: number of images per block.
    """
    better, tied = [], []
    for features_block, labels_block in zip(features.split(block_size), labels.split(block_size)):
        score = features_block.double() @ classifier.double()  # [images, classes]
        target = score.gather(1, labels_block[:, None])
        better.append((score > target + TIE_TOLERANCE).sum(dim=1))
        tied.append((score >= target - TIE_TOLERANCE).sum(dim=1) - better[-1] - 1)
    return RankCounts(torch.cat(better), torch.cat(tied), torch.ones(len(labels), dtype=torch.int64))
