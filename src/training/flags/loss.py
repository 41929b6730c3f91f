"""Flags of the loss: its terms, their weights, and the temperature. Imports nothing heavy."""

import argparse

from training.flags import data
from training.flags.effects import DATA, DATA_MEANT, STEPS, STEPS_MEANT, TRAINING, TRAINING_MEANT, Condition, Effects
from training.flags.types import Flags

_SEVERAL = Condition(
    "with a single caption per sample, whose loss is not weighted",
    lambda args: sum(entry.count for entry in data.caption_entries(args)) > 1,
)
_VARIANCE = Condition("without --long-text-variance", lambda args: args.long_text_variance is not None)
_FLAGS = (
    "--short-loss-weight --long-loss-weight --label-smoothing --loss-normalisation --short-image-components "
    "--long-text-variance --long-text-variance-weight"
)
_OF_STEPS = "--local-loss --gather-with-grad --logit-scale --lock-logit-scale"

EFFECTS: Effects = (
    (DATA_MEANT, "--siglip"),
    (TRAINING_MEANT, "--gather-dtype"),
    (STEPS_MEANT, "--gather-dtype"),
    (DATA, _FLAGS),
    (TRAINING, _OF_STEPS),
    (STEPS, f"{_FLAGS} {_OF_STEPS}"),
    (_VARIANCE, "--long-text-variance-weight"),
    (data.LONG, "--long-text-variance --long-text-variance-weight"),
    (_SEVERAL, "--short-loss-weight --long-loss-weight --loss-normalisation --short-image-components"),
)


def add_loss_args(group: Flags) -> None:
    """Adds the flags of the loss."""
    _add_term_args(group)
    group.number(
        "--label-smoothing",
        0.0,
        "fraction of each target spread evenly over the batch (default: %(default)s; Long-CLIP: 0.1)",
    )
    group.choice(
        "--loss-normalisation",
        ("published", "per-term"),
        "published",
        "published: divide every term by the number of all text features, as LoTLIP does; per-term: by the number of "
        "the term's own, as Long-CLIP does (default: %(default)s)",
    )
    group.number("--logit-scale", None, "initial logit scale, 1 / temperature (default: the model's; Long-CLIP: 100)")
    group.switch("--lock-logit-scale", "do not train the logit scale")
    group.switch("--siglip", "SigLIP's pairwise sigmoid loss instead of cross-entropy")
    group.switch(
        "--local-loss",
        "no effect, for open_clip's commands: each process always compares its own rows with the whole batch",
    )
    group.switch(
        "--gather-with-grad",
        "no effect, for open_clip's commands: gradients always flow through the gathered features",
        default=True,
    )
    group.choice(
        "--gather-dtype",
        ("float32", "bfloat16", "float16"),
        "float32",
        "dtype in which features travel between processes; 16 bits halve the bytes, but round the features of the "
        "other processes (gradients always travel in float32; default: %(default)s)",
    )


def _add_term_args(group: Flags) -> None:
    group.number("--short-loss-weight --clip-lossweight", 1.0, "weight of the loss of the short caption", metavar="W")
    group.number("--long-loss-weight --declip-lossweight", 1.0, "weight of the loss of the long captions", metavar="W")
    group.text(
        "--short-image-components",
        "K",
        "compare short captions with image features reduced to K principal components of a process's batch (default: "
        "not reduced; Long-CLIP: 32)",
        type=int,
    )
    group.number(
        "--long-text-variance",
        None,
        "add a loss between images and long captions reduced to the principal components that explain this fraction "
        "of the variance of a process's batch (default: no such loss; HiMo-CLIP: 0.9)",
        metavar="TAU",
    )
    group.number(
        "--long-text-variance-weight",
        1.0,
        "weight of the loss of --long-text-variance, relative to the loss of the long captions (default: %(default)s)",
        metavar="W",
    )


def validate_loss_args(args: argparse.Namespace) -> None:
    """Checks the flags of the loss.

    Raises:
        ValueError: the message names the flag, what was found and what was expected.
    """
    if not 0 <= args.label_smoothing < 1:
        raise ValueError(f"--label-smoothing {args.label_smoothing:g}: expected at least 0 and less than 1")
    if args.siglip and args.label_smoothing:
        raise ValueError("--label-smoothing can't be used with --siglip, whose loss has no targets to smooth")
    if args.short_image_components is not None and args.short_image_components < 1:
        raise ValueError(f"--short-image-components {args.short_image_components}: expected at least 1")
    if args.long_text_variance is not None and not 0 < args.long_text_variance < 1:
        raise ValueError(f"--long-text-variance {args.long_text_variance:g}: expected a fraction between 0 and 1")
    if args.logit_scale is not None and not 1 <= args.logit_scale <= 100:
        raise ValueError(f"--logit-scale {args.logit_scale:g}: expected 1 to 100, the range to which training clips it")
