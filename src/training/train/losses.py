"""Builds the loss from flags: texts, weight and name of each term."""

import argparse
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from training.flags.effects import caption_entries, reads
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss, LossTerm, reduce_features
from training.runtime.distributed import DistEnv


def make_loss(args: argparse.Namespace, num_corners: int, env: DistEnv) -> nn.Module:
    """Builds the loss.

    Args:
        args: flags.
        num_corners: m of the text tower; 0 for a tower without corner tokens.
        env: this process.
    """
    kind = LongCaptionSigLipLoss if args.siglip else LongCaptionLoss
    return kind(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        terms=loss_terms(args, num_corners),
        rank=env.rank,
        world_size=env.world_size,
        label_smoothing=args.label_smoothing,
        normalisation=args.loss_normalisation,
        gather_dtype=getattr(torch, args.gather_dtype),
    )


def loss_terms(args: argparse.Namespace, num_corners: int) -> list[LossTerm]:
    """Returns the terms of the loss.

    ``--text-views`` gives one term per entry, named after it. Without this flag there is one term for the short caption
    and one for the long captions. A single text feature gives one unweighted term. ``--short-loss-weight`` and
    ``--short-image-components`` apply to the first of several terms, ``--long-loss-weight`` to all others.
    ``--long-text-variance`` appends another term for each term that compares long captions.
    """
    entries = caption_entries(args)
    components = args.short_image_components
    form = None if components is None else partial(reduce_features, components=components)
    first = LossTerm("short_caption_loss", (0,), args.short_loss_weight, image_form=form)
    counts = [entry.count * (num_corners + 1 if entry.corners else 1) for entry in entries]
    if sum(counts) == 1:
        terms, sources = [LossTerm("contrastive_loss", (0,))], [entries]
    elif not args.text_views:
        terms = [first, LossTerm("long_caption_loss", None, args.long_loss_weight)]
        sources = [entries[:1], entries[1:]]
    else:
        bases = [first, *[LossTerm("", weight=args.long_loss_weight)] * (len(entries) - 1)]
        terms = [
            replace(base, name=f"{entry.name}_loss", texts=range(end)[-count:], weight=entry.weight * base.weight)
            for base, entry, count, end in zip(bases, entries, counts, accumulate(counts))
        ]
        sources = [[entry] for entry in entries]
    if args.long_text_variance is None:
        return terms
    # The same texts, reduced to principal components, with unreduced image features.
    form = partial(reduce_features, variance=args.long_text_variance)
    for term, source in zip(list(terms), sources):
        if reads(source, "long"):
            name, weight = term.name.removesuffix("_loss"), term.weight * args.long_text_variance_weight
            terms.append(LossTerm(f"{name}_component_loss", term.texts, weight, text_form=form))
    return terms
