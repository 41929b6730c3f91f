"""Zero-shot classification: open_clip's class names and templates, its classifier, all ranks sharing the work."""

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from open_clip_train.precision import get_autocast

from dataloaders.images import BrokenImageError
from dataloaders.pairs import ClassificationSet
from training.eval.encode import ComputeOptions, encode_images
from training.eval.metrics import TIE_TOLERANCE, RankCounts, summarise
from training.eval.record import ClassificationResult
from training.model.factory import EncoderParts
from training.runtime.distributed import DistEnv, max_over_ranks, raise_together, sum_over_ranks
from training.runtime.stop import SIGNALS

CLASSES_PER_BATCH = 10  # open_clip's


def evaluate_zero_shot(
    parts: EncoderParts,
    sets: tuple[ClassificationSet, ...],
    env: DistEnv,
    options: ComputeOptions,
    allow_broken: bool = False,
) -> list[ClassificationResult]:
    """Classifies the images of every set among ImageNet's 1,000 classes.

    Returns:
        One result per set.

    Raises:
        BrokenImageError: an unreadable image, unless allowed; or not one readable image is left in a set.
        FloatingPointError: the model returned NaN or infinity.
    """
    if not sets:
        return []
    classifier = build_classifier(parts, IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, env, options)
    results = []
    for s in sets:
        images = encode_images(parts.model, parts.preprocess, s.image_paths, env, options, allow_broken)
        kept = [i for i in range(len(s.labels)) if i not in images.broken]
        if not kept:
            raise BrokenImageError(f"{s.title}: no readable image is left; {next(iter(images.broken.values()))}")
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
            )
        )
    return results


def build_classifier(
    parts: EncoderParts, class_names: list[str], templates: tuple, env: DistEnv, options: ComputeOptions
) -> torch.Tensor:
    """Builds open_clip's zero-shot classifier; batch b of 10 classes is the work of rank b mod world_size.

    Returns:
        [dim, num_classes] float32 on the CPU, columns L2-normalised; the same on every rank.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    columns: dict[int, torch.Tensor] = {}
    stop = None
    for start in range(env.rank * CLASSES_PER_BATCH, len(class_names), env.world_size * CLASSES_PER_BATCH):
        if stop := SIGNALS.error():
            break
        with get_autocast(options.precision, device_type=env.device.type)():
            names = class_names[start : start + CLASSES_PER_BATCH]
            built = build_zero_shot_classifier(parts.model, parts.tokenizer, names, templates, device=env.device)
        columns[start] = built.float().cpu()
    raise_together(stop, env)
    dim = max_over_ranks(max((built.shape[0] for built in columns.values()), default=0), env)
    classifier = torch.zeros(len(class_names), dim)  # rows are classes: gathered by rows
    for start, built in columns.items():
        classifier[start : start + built.shape[1]] = built.T
    classifier = sum_over_ranks(classifier, env)
    if not classifier.isfinite().all():
        raise FloatingPointError(f"the model returned NaN or infinity in {options.precision}; try --precision fp32")
    return classifier.T


def count_label_ranks(
    features: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor, block_size: int = 4096
) -> RankCounts:
    """Counts for each image how many classes score higher than the right one, and how many the same.

    Args:
        features: [num_images, dim], L2-normalised.
        classifier: [dim, num_classes].
        labels: [num_images] int64.
        block_size: images at a time.
    """
    better, tied = [], []
    for features_block, labels_block in zip(features.split(block_size), labels.split(block_size)):
        score = features_block.double() @ classifier.double()  # [images, classes]
        target = score.gather(1, labels_block[:, None])
        better.append((score > target + TIE_TOLERANCE).sum(dim=1))
        tied.append((score >= target - TIE_TOLERANCE).sum(dim=1) - better[-1] - 1)
    return RankCounts(torch.cat(better), torch.cat(tied), torch.ones(len(labels), dtype=torch.int64))
