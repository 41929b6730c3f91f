"""Builds the loss from flags: texts, weight and name of each term."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from training.data.views import Entry
from training.flags.data import caption_entries, reads
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss
from training.loss.terms import LossTerm, reduce_features
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
        terms = _terms_of(entries, counts, first, args.long_loss_weight)
        sources = [[entry] for entry in entries]
    if args.long_text_variance is None:
        return terms
    reduced = [_reduced(term, args) for term, source in zip(terms, sources) if reads(source, "long")]
    return [*terms, *reduced]


def _terms_of(entries: Sequence[Entry], counts: Sequence[int], first: LossTerm, other_weight: float) -> list[LossTerm]:
    """Returns one term per entry.

    Args:
        entries: the texts of a sample.
        counts: number of text features of each entry.
        first: weight and image form of the first term.
        other_weight: weight of all other terms.
    """
    terms, start = [], 0
    for entry, count in zip(entries, counts):
        columns = tuple(range(start, start + count))
        start += count
        base = first if not terms else LossTerm("", weight=other_weight)
        terms.append(replace(base, name=f"{entry.name}_loss", texts=columns, weight=entry.weight * base.weight))
    return terms


def _reduced(term: LossTerm, args: argparse.Namespace) -> LossTerm:
    """Returns a term that compares the same texts, reduced to principal components, with unreduced image features."""
    return LossTerm(
        term.name.removesuffix("_loss") + "_component_loss",
        term.texts,
        term.weight * args.long_text_variance_weight,
        text_form=partial(reduce_features, variance=args.long_text_variance),
    )
