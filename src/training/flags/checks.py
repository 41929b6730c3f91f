"""Checks of combinations of flags, and of paths as far as possible without reading files."""

import argparse
import os
from collections.abc import Callable

from dataloaders.registry import benchmarks
from training.flags.effects import asks_about_texts, benchmark_flags, has_benchmark, value_of

REPORTERS = ("tensorboard", "wandb")
# (Numbers, whether a value is right, what it should be).
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("--force-patch-dropout --label-smoothing", lambda x: 0 <= x < 1, "at least 0 and less than 1"),
    ("--short-image-components", lambda x: x >= 1, "at least 1"),
    ("--long-text-variance", lambda x: 0 < x < 1, "a fraction between 0 and 1"),
    ("--logit-scale", lambda x: 1 <= x <= 100, "1 to 100, the range to which training clips it"),
    ("--lr --image-lr --text-lr --grad-clip-norm --timeout-minutes", lambda x: x > 0, "a positive number"),
    ("--save-every-minutes", lambda x: x >= 0, "0 (never) or more"),
    ("--max-bad-samples", lambda x: 0 <= x <= 1, "a fraction from 0 to 1"),
)
_COUNTS = (("--force-image-size", (1, 2)), ("--image-mean", (1, 3)), ("--image-std", (1, 3)))


def check_flags(args: argparse.Namespace) -> None:
    """Checks all flags.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    for flags, is_right, expected in _RANGES:
        for flag in flags.split():
            value = value_of(args, flag)
            if value is not None and not is_right(value):
                raise ValueError(f"{flag} {value:g}: expected {expected}")
    if args.train_data or args.val_data:
        _check_data(args)
    if args.train_data:
        _check_training(args)
    _check_evaluation(args)
    _check_model(args)
    if args.name and (os.sep in args.name or args.name in (".", "..")):
        raise ValueError(f"--name {args.name}: expected a single folder name; use --logs for its parent folder")
    if os.path.exists(args.logs) and not os.path.isdir(args.logs):
        raise ValueError(f"--logs {args.logs}: is a file, expected a folder")


def _check_data(args: argparse.Namespace) -> None:
    if args.extract_image_features and (args.dataset_resampled or args.resume):
        raise ValueError(
            "--extract-image-features reads every sample once and resumes by itself: omit --dataset-resampled and "
            "--resume"
        )
    if args.captions == "long" and not args.num_long_captions:
        raise ValueError("--captions long needs --num-long-captions of at least 1")
    if args.strong_augment and args.aug_cfg:
        raise ValueError("--strong-augment and --aug-cfg exclude each other")
    for word in args.aug_cfg:
        if "=" not in word and args.aug_cfg != ["none"]:
            raise ValueError(f"--aug-cfg {word}: expected KEY=VALUE, or only none")
    if args.siglip and args.label_smoothing:
        raise ValueError("--label-smoothing can't be used with --siglip, whose loss has no targets to smooth")


def _check_training(args: argparse.Namespace) -> None:
    if args.lr_scheduler == "const-cooldown":
        if not args.epochs_cooldown or args.epochs_cooldown > args.epochs:
            raise ValueError(
                f"--lr-scheduler const-cooldown: expected --epochs-cooldown from 1 to --epochs {args.epochs}, "
                f"found {args.epochs_cooldown}"
            )
        if not args.lr_cooldown_end >= 0 or not args.lr_cooldown_power > 0:
            raise ValueError("--lr-cooldown-end must be at least 0 and --lr-cooldown-power greater than 0")
    if set(args.report_to) - set(REPORTERS):
        raise ValueError(
            f"--report-to {','.join(args.report_to)}: expected any of {', '.join(REPORTERS)}, separated by commas"
        )
    for flag, value in (("--logs", args.logs), ("--resume", args.resume)):
        if value and "://" in value:
            raise ValueError(f"{flag} {value}: expected a local path; --remote-sync URL copies runs to and from a URL")
    if args.resume == "latest" and not args.name:
        raise ValueError("--resume latest needs --name, the run to continue")
    if args.precision in ("bf16", "pure_bf16", "fp16", "pure_fp16") and not args.extract_image_features:
        raise ValueError(
            f"--precision {args.precision}: 16-bit weights lose small updates; use amp or amp_bf16, which keep weights "
            "in 32 bits"
        )


def _check_evaluation(args: argparse.Namespace) -> None:
    for benchmark in benchmarks():
        for flag, what in benchmark.needs.items():
            if value_of(args, benchmark.flag) and not value_of(args, flag):
                raise ValueError(f"{benchmark.flag} needs {flag}, {what}")
    known = {protocol: b.flag for b in benchmarks() for protocol in b.protocols}
    for protocol in args.protocol:
        if protocol not in known:
            raise ValueError(f"--protocol {protocol}: expected one of {', '.join(known)}")
        if not value_of(args, known[protocol]):
            raise ValueError(f"--protocol {protocol}: no effect without {known[protocol]}; add it or omit both")
    if args.features:
        flags = [*benchmark_flags(), "--train-data", "--val-data"]
        flags += [] if asks_about_texts(args) else ["--pretrained"]
        if others := [flag for flag in flags if value_of(args, flag)]:
            raise ValueError(f"--features provides encoded images and captions: omit {', '.join(others)}")
    elif not has_benchmark(args) and not args.train_data and not args.val_data:
        raise ValueError(
            "nothing to do: give --train-data, --val-data, or a data set with "
            f"{', '.join(benchmark_flags())} or --features"
        )


def _check_model(args: argparse.Namespace) -> None:
    brings_weights = args.model.startswith(("local-dir:", "hf-hub:"))
    if args.pretrained and brings_weights and not os.path.isfile(args.pretrained):
        raise ValueError(f"--pretrained {args.pretrained} has no effect: --model {args.model} has its own weights")
    if args.pretrained and (args.pretrained_image or args.pretrained_text):
        raise ValueError(
            f"--pretrained {args.pretrained} includes both towers: omit --pretrained-image and --pretrained-text"
        )
    if isinstance(args.pretrained_image, str) and not os.path.exists(args.pretrained_image):
        raise ValueError(f"--pretrained-image {args.pretrained_image}: no such file or folder")
    if args.context_length and args.force_context_length:
        raise ValueError("--context-length and --force-context-length exclude each other")
    for flag in ("--context-length", "--force-context-length"):
        length = value_of(args, flag)
        if length and length < (args.num_corner_tokens or 0) + 3:
            raise ValueError(f"{flag} {length}: the special tokens leave no room for text")
    for flag, counts in _COUNTS:
        numbers = value_of(args, flag)
        if numbers and len(numbers) not in counts:
            raise ValueError(f"{flag}: expected {counts[0]} or {counts[1]} numbers, found {len(numbers)}")
