"""Zero-shot classification with open_clip's class names, templates and definition of the classifier."""

import itertools
import logging
from collections.abc import Sequence
from functools import partial

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch.nn.functional import normalize

from dataloaders.pairs import ClassificationSet
from training.eval.caches import encode_images_once, open_caches, text_key
from training.eval.encode import Encoder, Encoding
from training.eval.metrics import summarise
from training.eval.record import TEMPLATES, ClassificationResult
from training.eval.retrieval import count_over_ranks
from training.readers.images import BrokenImageError


def evaluate_zero_shot(encoder: Encoder, sets: Sequence[ClassificationSet]) -> list[ClassificationResult]:
    """Classifies the images of every set into ImageNet's 1,000 classes.

    Args:
        encoder: the model; its feature cache also holds the features of classes.
        sets: images with their labels; all sets have the same class texts, or none.

    Returns:
        One result per set.

    Raises:
        BrokenImageError: an image can't be read, unless allowed; or a set has no readable image.
        FloatingPointError: the model returned NaN or infinity.
    """
    if not sets:
        return []
    described, prompts = sets[0].class_texts, TEMPLATES
    class_texts = tuple(tuple(template(name) for template in OPENAI_IMAGENET_TEMPLATES) for name in IMAGENET_CLASSNAMES)
    if described:
        class_texts, prompts = described.texts, described.name
    image_cache, text_cache = open_caches(encoder)
    encode = partial(encode_classes, encoder, count_lost=described is not None)
    classes = text_cache.encode(class_texts, lambda texts: text_key("class\n" + "\n".join(texts)), encode)
    if encoder.env.is_main and (num_cut := int(classes.lost_tokens.sum())):
        logging.warning(
            f"{prompts}: {num_cut:,} of {sum(map(len, class_texts)):,} class descriptions are longer than the model's "
            f"context of {getattr(encoder.parts.tokenizer, 'context_length', 0)} tokens and are truncated."
        )
    results = []
    for s in sets:
        images = encode_images_once(image_cache, encoder, s.image_paths)
        kept = [i for i in range(len(s.labels)) if i not in images.broken]
        if not kept:
            raise BrokenImageError(f"{s.title}: no image can be read; {next(iter(images.broken.values()))}")
        labels = torch.tensor(s.labels)[kept]  # an image is compared with classes as a caption is with images
        _, counts = count_over_ranks(classes.features, images.features[kept], labels, encoder.env, both=False)
        found = summarise(counts, ks=(1, 5))
        num_expected = max(s.num_published, len(s.labels))
        numbers = (len(kept), num_expected, num_expected - len(s.labels), len(images.broken))
        accuracy = (found["top1"], found["top5"], found["top1-ci95"])
        results.append(ClassificationResult(s.title, s.key, *numbers, *accuracy, prompts))
    return results


def encode_classes(encoder: Encoder, class_texts: Sequence[Sequence[str]], count_lost: bool = False) -> Encoding:
    """Encodes classes as the normalised mean of the features of their texts.

    Source: open_clip's `build_zero_shot_classifier`, whose columns these are; but texts of similar length are encoded
    together, by all ranks, which changes the features by float32's rounding.

    Args:
        encoder: the model.
        class_texts: the texts of each class.
        count_lost: count the texts that the tokenizer truncates.

    Returns:
        Features [num_classes, dim]; in `lost_tokens`, the number of truncated texts of each class.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    texts, sizes = list(itertools.chain(*class_texts)), [len(texts) for texts in class_texts]
    found = encoder.texts(texts, count_lost=count_lost)
    means = torch.stack([features.mean(dim=0) for features in found.features.split(sizes)])
    num_cut = torch.stack([lost.count_nonzero() for lost in found.lost_tokens.split(sizes)])
    return Encoding(normalize(means, dim=-1), {}, num_cut)
