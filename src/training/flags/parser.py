"""Flags: one parser in groups, one check before any work. Imports nothing heavy, so that --help answers at once."""

import argparse
import os
import sys
from collections.abc import Sequence

from training.flags.eval import RETRIEVAL_FLAGS, ZERO_SHOT_FLAGS, add_eval_args, has_benchmark, validate_eval_args
from training.flags.train import add_train_args, validate_train_args
from training.flags.types import not_negative, positive

PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16", "amp_bfloat16")

DESCRIPTION = """\
Train on short and long captions, or evaluate long text-image retrieval for any open_clip, LoTLIP or Long-CLIP model.

  python -m training.main --train-data 'DATA/{00000..00575}.tar' --model lotlip_bert-ViT-B-16 --lock-image ..
  python -m training.main --urban1k-retrieval DATA/Urban1k --model ViT-B-16 --pretrained openai
  torchrun --nproc_per_node 8 -m -- training.main --dci-retrieval DATA/dci --iiw-retrieval DATA/iiw ..
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; the result is read-only from here on.

    Args:
        argv: words after the program's name; `sys.argv[1:]` if None. Flags are accepted with `-` or `_` between words.

    Raises:
        SystemExit: code 2 with one clear line for a usage error, 0 after --help.
    """
    parser = build_parser()
    words = [_with_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    args = parser.parse_args(words)
    try:
        validate_args(args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


def _with_hyphens(word: str) -> str:
    """``--share4v_val_num=1,2`` -> ``--share4v-val-num=1,2``: both spellings are published."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with all groups of flags."""
    parser = argparse.ArgumentParser(
        prog="python -m training.main",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Flags may be written with - or _ between words.\n"
        "Exit codes: 0 done, 1 failed on its data, 2 usage error, 70 another process has ended or does not "
        "move, 75 stopped by a signal and saved (70, 75: go on with --resume latest), 130 Ctrl-C.",
    )
    _add_model_args(parser.add_argument_group("model"))
    _add_lock_args(parser.add_argument_group("which parts of the model are trained"))
    add_eval_args(parser)
    add_train_args(parser)
    _add_compute_args(parser.add_argument_group("compute"))
    _add_output_args(parser.add_argument_group("output"))
    return parser


def _add_model_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default="ViT-B-32",
        metavar="NAME",
        help="a name of open_clip or one of ours (lotlip_bert-ViT-B-16, long_clip-ViT-B-16, ..), local-dir:FOLDER or "
        "hf-hub:ORG/REPO (default: %(default)s)",
    )
    group.add_argument(
        "--pretrained",
        default=None,
        metavar="TAG|FILE",
        help="open_clip's tag (openai, laion2b_s34b_b88k, ..) or weights, .pt or .safetensors; "
        "without it the model is untrained",
    )
    group.add_argument(
        "--cache-dir",
        default=None,
        metavar="DIR",
        help="where downloaded weights and tokenizers are kept and looked up first",
    )
    group.add_argument(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        metavar="P",
        help="%(choices)s (default: %(default)s; on CPU: fp32, bf16, amp_bf16)",
    )
    group.add_argument(
        "--num-corner-tokens",
        type=not_negative,
        default=None,
        metavar="M",
        help="corner tokens in the text tower (default: the model's)",
    )
    group.add_argument(
        "--context-length",
        type=positive,
        default=None,
        metavar="L",
        help="tokens that the text tower reads (default: the model's); a longer one stretches pretrained positions",
    )
    group.add_argument(
        "--pretrained-image",
        action="store_true",
        help="without --pretrained: start the image tower from the weights its config names, in --cache-dir or the hub",
    )
    group.add_argument(
        "--pretrained-text",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the same for the text tower (default: in training, where its config names weights)",
    )


def _add_lock_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lock-image", action="store_true", help="freeze the image tower (LiT)")
    group.add_argument(
        "--lock-image-unlocked-groups", type=not_negative, default=0, metavar="N", help="but for its last N groups"
    )
    group.add_argument("--lock-image-freeze-bn-stats", action="store_true", help="and its batch-norm statistics")
    group.add_argument("--lock-text", action="store_true", help="freeze the text tower")
    group.add_argument(
        "--lock-text-unlocked-layers", type=not_negative, default=0, metavar="N", help="but for its last N layers"
    )
    group.add_argument(
        "--lock-text-freeze-layer-norm", action="store_true", help="and its layer norms (in CLIP's own tower: always)"
    )


def _add_compute_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images (in evaluation also captions) per step and process (default: %(default)s)",
    )
    group.add_argument(
        "--text-batch-size",
        type=positive,
        metavar="N",
        help="captions per step in an evaluation of its own (default: as --batch-size)",
    )
    group.add_argument(
        "--image-decoding",
        choices=("exact", "fast", "scaled"),
        metavar="D",
        help="exact: by Pillow, the published pixels; fast: the same but for one level here and there, three times "
        "faster for large JPEGs; scaled: large JPEGs besides at 1/2, 1/4 or 1/8 of their size where that leaves twice "
        "the pixels needed (default: exact in evaluation, fast in training)",
    )
    group.add_argument(
        "--workers",
        type=not_negative,
        default=4,
        metavar="N",
        help="loader processes per process; 0 loads in line (default: %(default)s)",
    )
    group.add_argument(
        "--text-packing",
        default="auto",
        choices=("auto", "padded", "buckets", "flex"),
        metavar="P",
        help="captions of a step: padded; in buckets by length; flex: all in one row without padding; auto: flex on "
        "CUDA, else buckets, where the text tower can (BERT and its kin). Evaluation sorts captions by length and pads "
        "each batch to its longest, but for padded (default: %(default)s)",
    )
    group.add_argument(
        "--device", default=None, metavar="DEV", help="cuda, cpu, mps, .. (default: cuda if there is one)"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random weights, order and augmentation (default: %(default)s)"
    )


def _add_output_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--logs", default="logs", metavar="DIR", help="folder of all runs (default: ./%(default)s)")
    group.add_argument(
        "--name", default=None, metavar="NAME", help="this run's folder below it (default: time, model and precision)"
    )


def validate_args(args: argparse.Namespace) -> None:
    """Checks combinations of flags and the paths that need no reading.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    validate_train_args(args)
    validate_eval_args(args)
    if not has_benchmark(args) and not args.train_data and not args.features:
        flags = (*RETRIEVAL_FLAGS, *ZERO_SHOT_FLAGS, "--features")
        raise ValueError(f"nothing to do: name --train-data, or a data set with {', '.join(flags[:-1])} or {flags[-1]}")
    if args.pretrained and args.model.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(f"--pretrained {args.pretrained} has no effect: --model {args.model} brings its own weights")
    if args.pretrained and (args.pretrained_image or args.pretrained_text):
        raise ValueError(
            f"--pretrained {args.pretrained} brings both towers: leave out --pretrained-image and --pretrained-text"
        )
    if (args.lock_image_unlocked_groups or args.lock_image_freeze_bn_stats) and not args.lock_image:
        raise ValueError("--lock-image-unlocked-groups and --lock-image-freeze-bn-stats need --lock-image")
    if (args.lock_text_unlocked_layers or args.lock_text_freeze_layer_norm) and not args.lock_text:
        raise ValueError("--lock-text-unlocked-layers and --lock-text-freeze-layer-norm need --lock-text")
    if args.context_length is not None and args.context_length < (args.num_corner_tokens or 0) + 3:
        raise ValueError(f"--context-length {args.context_length}: no room for text beside the special tokens")
    if args.name and (os.sep in args.name or args.name in (".", "..")):
        raise ValueError(f"--name {args.name}: expected one folder name; use --logs for the folder above it")
