"""Flags of training: data, captions, optimization, logging and checkpoints. Imports nothing heavy."""

import argparse
import os

from dataloaders.files import TABLE_SUFFIXES
from training.data.captions import LONG_KEYS, RAW_KEYS
from training.data.position import SHUFFLE_WINDOW
from training.flags.types import names, not_negative, positive

REPORTERS = ("tensorboard", "wandb")


def add_train_args(parser: argparse.ArgumentParser) -> None:
    """Adds training's groups of flags."""
    _add_data_args(parser.add_argument_group("training data"))
    _add_caption_args(parser.add_argument_group("captions of a training sample"))
    _add_optimization_args(parser.add_argument_group("optimization"))
    _add_loss_args(parser.add_argument_group("loss"))
    _add_logging_args(parser.add_argument_group("logging and checkpoints"))
    _add_safety_args(parser.add_argument_group("running for weeks (see README.md)"))


def _add_data_args(group) -> None:
    group.add_argument(
        "--train-data",
        metavar="SHARDS",
        help="shards ('data/{00000..00575}.tar', a folder, URLs; sources apart by ::), or a .csv, .tsv or .parquet",
    )
    group.add_argument("--val-data", metavar="SHARDS", help="the same, for loss and R@1 during training")
    group.add_argument(
        "--train-num-samples", type=positive, metavar="N", help="samples in an epoch (default: all there are)"
    )
    group.add_argument("--dataset-resampled", action="store_true", help="draw shards with replacement")
    group.add_argument(
        "--train-data-upsampling-factors", metavar="F::F", help="with it: how often to draw from each source"
    )
    group.add_argument(
        "--shuffle-window",
        type=positive,
        default=SHUFFLE_WINDOW,
        metavar="N",
        help="neighbouring samples of shards that are shuffled together, per loader process (default: %(default)s)",
    )
    group.add_argument("--csv-img-key", default="filepath", metavar="COL", help="image column (default: %(default)s)")
    group.add_argument("--csv-separator", metavar="C", help="of a .csv table (default: a comma; a tab in .tsv)")
    group.add_argument(
        "--extract-image-features",
        metavar="DIR",
        help="do not train: write the image tower's features of --train-data to DIR, which --train-data then takes",
    )
    group.add_argument(
        "--feature-views",
        type=not_negative,
        default=0,
        metavar="V",
        help="with it: augmented views of each image; 0: one view as in evaluation (default: %(default)s)",
    )
    group.add_argument("--strong-augment", action="store_true", help="crop 0.2-1, jitter, grey, blur, flip, two random")
    group.add_argument(
        "--aug-cfg", nargs="*", default=[], metavar="K=V", help="open_clip's augmentation, e.g. scale=0.4,1.0"
    )


def _add_caption_args(group) -> None:
    group.add_argument(
        "--num-long-captions", type=not_negative, default=3, metavar="K", help="long ones a step (default: %(default)s)"
    )
    group.add_argument(
        "--captions",
        default="both",
        choices=("both", "raw", "long"),
        help="both; raw: the short one alone; long: K long ones, the first in the short one's place (default: both)",
    )
    group.add_argument(
        "--sub-caption-sentences",
        type=not_negative,
        default=0,
        metavar="N",
        help="take N consecutive sentences of a long caption; 0 takes all (default: %(default)s)",
    )
    group.add_argument(
        "--raw-caption-keys",
        type=names,
        default=",".join(RAW_KEYS),
        metavar="K,K",
        help="first found counts (default: %(default)s)",
    )
    group.add_argument(
        "--short-caption-keys", type=names, default="", metavar="K,K", help="more short ones to draw from"
    )
    group.add_argument(
        "--long-caption-keys",
        type=names,
        default=",".join(LONG_KEYS),
        metavar="K,K",
        help="all found count (default: %(default)s)",
    )


def _add_optimization_args(group) -> None:
    group.add_argument("--epochs", type=positive, default=10, metavar="N", help="default: %(default)s")
    group.add_argument("--lr", type=float, default=5e-4, help="learning rate (default: %(default)s)")
    group.add_argument("--image-lr", type=float, metavar="LR", help="of the image tower (default: --lr)")
    group.add_argument("--text-lr", type=float, metavar="LR", help="of the text tower (default: --lr)")
    group.add_argument("--wd", type=float, default=0.2, help="weight decay (default: %(default)s)")
    group.add_argument("--beta1", type=float, default=0.9, help="of AdamW (default: %(default)s)")
    group.add_argument("--beta2", type=float, default=0.98, help="of AdamW (default: %(default)s)")
    group.add_argument("--eps", type=float, default=1e-6, help="of AdamW (default: %(default)s)")
    group.add_argument("--warmup", type=not_negative, default=2000, metavar="N", help="steps (default: %(default)s)")
    group.add_argument(
        "--lr-scheduler", default="cosine", choices=("cosine", "const"), help="cosine or const (default: %(default)s)"
    )
    group.add_argument("--grad-clip-norm", type=float, metavar="X", help="largest gradient norm (default: no limit)")
    group.add_argument(
        "--accum-freq", type=positive, default=1, metavar="N", help="batches per step, as one (default: %(default)s)"
    )
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, about a third more time")
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="model",
        choices=("model", "image"),
        metavar="WHAT",
        help="compile the model, or the image tower alone, whose shapes never change (default: nothing, alone: model)",
    )


def _add_loss_args(group) -> None:
    group.add_argument(
        "--short-loss-weight", "--clip-lossweight", type=float, default=1.0, metavar="W", help="default: %(default)s"
    )
    group.add_argument(
        "--long-loss-weight", "--declip-lossweight", type=float, default=1.0, metavar="W", help="default: %(default)s"
    )
    group.add_argument("--siglip", action="store_true", help="pairwise sigmoid in place of cross-entropy")
    group.add_argument("--local-loss", action="store_true", help="own rows against everybody's: less memory")
    group.add_argument(
        "--gather-with-grad",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gradients equal to one process on the whole batch",
    )


def _add_logging_args(group) -> None:
    group.add_argument("--log-every-n-steps", type=positive, default=100, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--report-to",
        type=names,
        default="",
        metavar="R,R",
        help="tensorboard, wandb (metrics.jsonl is always written)",
    )
    group.add_argument(
        "--save-frequency", type=not_negative, default=1, metavar="N", help="every N epochs (default: %(default)s)"
    )
    group.add_argument("--save-most-recent", action="store_true", help="also epoch_latest.pt, every epoch")
    group.add_argument("--delete-previous-checkpoint", action="store_true", help="keep the last epoch_N.pt only")
    group.add_argument(
        "--zeroshot-frequency",
        type=not_negative,
        default=1,
        metavar="N",
        help="evaluate on the benchmarks named every N epochs, and at the end; 0: never (default: %(default)s)",
    )
    group.add_argument(
        "--val-frequency",
        type=not_negative,
        default=1,
        metavar="N",
        help="the same on --val-data (default: %(default)s)",
    )


def _add_safety_args(group) -> None:
    group.add_argument("--resume", metavar="FILE|latest", help="go on from a checkpoint; latest: of --name")
    group.add_argument(
        "--save-every-minutes",
        type=float,
        default=10.0,
        metavar="X",
        help="save step_N.pt in mid-epoch; 0: never (default: %(default)g)",
    )
    group.add_argument(
        "--save-every-steps", type=not_negative, default=0, metavar="N", help="likewise by steps; 0: never (default)"
    )
    group.add_argument(
        "--keep-checkpoints", type=positive, default=2, metavar="N", help="newest step_N.pt kept (default: %(default)s)"
    )
    group.add_argument(
        "--max-bad-samples",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="stop once more than this share of samples can't be used (default: %(default)s)",
    )
    group.add_argument(
        "--max-skipped-steps",
        type=not_negative,
        default=20,
        metavar="N",
        help="stop after more steps in a row whose loss or gradient is not finite (default: %(default)s)",
    )
    group.add_argument(
        "--timeout-minutes",
        type=float,
        default=30.0,
        metavar="X",
        help="end a run in which a process does not come or does not move for so long, and name it; evaluations in "
        "training may take four times as long (default: %(default)g)",
    )


def validate_train_args(args: argparse.Namespace) -> None:
    """Checks training's flags.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    if not args.train_data:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("val_data", "resume", "siglip", "report_to", "extract_image_features")
            if getattr(args, name)
        ]
        if given:
            raise ValueError(f"{', '.join(given)}: no effect without --train-data")
        return
    if args.feature_views and not args.extract_image_features:
        raise ValueError("--feature-views needs --extract-image-features")
    if args.extract_image_features and (args.dataset_resampled or args.resume):
        raise ValueError(
            "--extract-image-features takes every sample once, and goes on by itself: leave out --dataset-resampled "
            "and --resume"
        )
    if args.train_data_upsampling_factors and not args.dataset_resampled:
        raise ValueError("--train-data-upsampling-factors needs --dataset-resampled: without it each sample comes once")
    if args.dataset_resampled and not args.train_num_samples:
        raise ValueError("--dataset-resampled needs --train-num-samples: drawn with replacement, data have no end")
    if set(args.report_to) - set(REPORTERS):
        raise ValueError(
            f"--report-to {','.join(args.report_to)}: expected any of {', '.join(REPORTERS)}, apart by commas"
        )
    if args.resume == "latest" and not args.name:
        raise ValueError("--resume latest needs --name, the run to go on with")
    if args.local_loss and not args.gather_with_grad:
        raise ValueError("--local-loss needs --gather-with-grad: without it the other ranks' gradients are lost")
    if args.captions == "long" and not args.num_long_captions:
        raise ValueError("--captions long needs --num-long-captions of at least 1")
    if args.strong_augment and args.aug_cfg:
        raise ValueError("--strong-augment and --aug-cfg exclude each other")
    for word in args.aug_cfg:
        if "=" not in word:
            raise ValueError(f"--aug-cfg {word}: expected KEY=VALUE")
    for name in ("lr", "image_lr", "text_lr", "grad_clip_norm"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    if not args.save_every_minutes >= 0:
        raise ValueError(f"--save-every-minutes {args.save_every_minutes:g}: expected 0 (never) or more")
    if not 0 <= args.max_bad_samples <= 1:
        raise ValueError(f"--max-bad-samples {args.max_bad_samples:g}: expected a share from 0 to 1")
    if not args.timeout_minutes > 0:
        raise ValueError(f"--timeout-minutes {args.timeout_minutes:g}: expected a positive number")
    if args.train_data.endswith(TABLE_SUFFIXES) and args.dataset_resampled:
        raise ValueError("--dataset-resampled is for shards; a table's rows come once an epoch each")
    if args.precision in ("fp16", "pure_fp16"):
        raise ValueError(f"--precision {args.precision}: weights of 16 bits do not train; take amp or amp_bf16")
    if args.csv_separator and not os.path.splitext(args.train_data)[1] == ".csv":
        raise ValueError(f"--csv-separator has no effect on --train-data {args.train_data}")
