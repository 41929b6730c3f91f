"""From flags to the loss: which texts of a sample each term compares, with which weight, under which name."""

import argparse

from torch import nn

from training.data.open import caption_rule
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss
from training.loss.terms import LossTerm
from training.runtime.distributed import DistEnv


def make_loss(args: argparse.Namespace, num_corners: int, env: DistEnv) -> nn.Module:
    """Builds the loss.

    Args:
        args: flags.
        num_corners: m of the text tower; 0 for a tower without corner tokens.
        env: this process.

    Raises:
        ValueError: flags that do not go together.
    """
    if args.siglip and args.label_smoothing:
        raise ValueError("--label-smoothing: not with --siglip, whose loss has no targets to smooth")
    kind = LongCaptionSigLipLoss if args.siglip else LongCaptionLoss
    return kind(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        terms=loss_terms(args, num_corners),
        rank=env.rank,
        world_size=env.world_size,
        label_smoothing=args.label_smoothing,
        normalisation=args.loss_normalisation,
    )


def loss_terms(args: argparse.Namespace, num_corners: int) -> list[LossTerm]:
    """Returns one term per entry of ``--text-views``, named as declared; without that flag, one term of the short
    caption and one of the long captions.

    ``--short-loss-weight`` and ``--short-image-components`` apply to the first term, ``--long-loss-weight`` to all
    others.
    """
    rule = caption_rule(args)
    first, components = (0,), args.short_image_components
    if not args.text_views:
        return [
            LossTerm("short_caption_loss", first, args.short_loss_weight, components),
            LossTerm("long_caption_loss", None, args.long_loss_weight),
        ]
    terms, start = [], 0
    for entry in rule.entries:
        texts = entry.count * (num_corners + 1 if entry.corners else 1)
        columns = range(start, start + texts)
        start = columns.stop
        is_first = not terms
        weight = entry.weight * (args.short_loss_weight if is_first else args.long_loss_weight)
        terms.append(LossTerm(f"{entry.name}_loss", tuple(columns), weight, components if is_first else None))
    return terms
