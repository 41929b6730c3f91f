"""Flags of the model, of its trainable parts, of hardware and of the output folder. Imports nothing heavy."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from training.flags.effects import ALWAYS, MODEL, TRAINING, Condition
from training.flags.types import Switch, not_negative, positive

PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16", "amp_bfloat16")
_OUT_OF_TRAINING = Condition(
    "in training, where captions come with their images", lambda args: not args.train_data, refused=True
)

EFFECTS = (
    (ALWAYS, "--batch-size --workers --device --logs --name --seed"),
    (_OUT_OF_TRAINING, "--text-batch-size"),
    (TRAINING, "--lock-image --lock-image-unlocked-groups --lock-image-freeze-bn-stats"),
    (TRAINING, "--lock-text --lock-text-unlocked-layers --lock-text-freeze-layer-norm"),
    (MODEL, "--model --pretrained --cache-dir --precision --num-corner-tokens --context-length"),
    (MODEL, "--pretrained-image --pretrained-text --image-decoding --exif-rotation --text-packing"),
)


class _ModelConfig(argparse.Action):
    """``--model-config FILE`` is equivalent to ``--model config:FILE``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        namespace.model = f"config:{values}"


def add_model_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of model flags.

    Args:
        parser: the parser to extend.
        everything: also add flags that are rarely needed.
    """
    group = parser.add_argument_group("model")
    _add_common_model_args(group)
    if everything:
        _add_more_model_args(group)
    group = parser.add_argument_group("frozen parts of the model")
    group.add_argument("--lock-image", action=Switch, help="freeze the image tower (locked-image tuning, LiT)")
    group.add_argument("--lock-text", action=Switch, help="freeze the text tower")
    if everything:
        _add_lock_args(group)


def _add_common_model_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default="ViT-B-32",
        metavar="NAME",
        help="model of open_clip or of this project (lotlip_bert-ViT-B-16, long_clip-ViT-B-16, ...), local-dir:FOLDER, "
        "hf-hub:ORG/REPO, or hf:FOLDER and hf:ORG/REPO for transformers' CLIP and SigLIP (default: %(default)s)",
    )
    group.add_argument(
        "--model-config",
        action=_ModelConfig,
        metavar="FILE",
        help="instead of --model: your own architecture, a JSON file in the format of open_clip's model configs",
    )
    group.add_argument(
        "--pretrained",
        default=None,
        metavar="TAG|FILE",
        help="weights: an open_clip tag (openai, laion2b_s34b_b88k, ...), a .pt or a .safetensors file; "
        "without this flag the model is untrained",
    )
    group.add_argument(
        "--cache-dir",
        default=None,
        metavar="DIR",
        help="folder for downloaded weights and tokenizers, which is searched first",
    )
    group.add_argument(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        metavar="P",
        help="one of %(choices)s (default: %(default)s; on CPU only fp32, bf16, pure_bf16, amp_bf16 and amp_bfloat16)",
    )
    group.add_argument(
        "--pretrained-image",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="initialise the image tower with the timm weights that its config names, or with those in a file or "
        "folder; not with --pretrained",
    )


def _add_more_model_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pretrained-text",
        action=Switch,
        default=None,
        help="initialise the text tower with the weights that its config names (default: only in training)",
    )
    group.add_argument(
        "--num-corner-tokens",
        type=not_negative,
        default=None,
        metavar="M",
        help="number of corner tokens of the text tower (default: the model's)",
    )
    group.add_argument(
        "--context-length",
        "--force-context-length",
        type=positive,
        default=None,
        metavar="L",
        help="maximum number of tokens of a text (default: the model's); "
        "a larger number interpolates pretrained position embeddings",
    )


def _add_lock_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lock-image-unlocked-groups",
        type=not_negative,
        default=0,
        metavar="N",
        help="with --lock-image: train the last N layer groups of the image tower (default: %(default)s)",
    )
    group.add_argument(
        "--lock-image-freeze-bn-stats",
        action=Switch,
        help="with --lock-image: freeze the batch-norm statistics of the image tower, too",
    )
    group.add_argument(
        "--lock-text-unlocked-layers",
        type=not_negative,
        default=0,
        metavar="N",
        help="with --lock-text: train the last N layers of the text tower (default: %(default)s)",
    )
    group.add_argument(
        "--lock-text-freeze-layer-norm",
        action=Switch,
        help="with --lock-text: freeze the layer norms of the text tower, too (CLIP's own tower always does)",
    )


def add_compute_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of hardware and output flags; see `add_model_args` for the arguments."""
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images per step and process; in evaluation also captions (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=not_negative,
        default=4,
        metavar="N",
        help="loader processes of each process; 0 loads in the process itself (default: %(default)s)",
    )
    group.add_argument("--device", default=None, metavar="DEV", help="cuda, cpu, mps, ... (default: cuda if available)")
    if everything:
        _add_more_compute_args(group)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--logs", default="logs", metavar="DIR", help="parent folder of all runs (default: ./%(default)s)"
    )
    group.add_argument(
        "--name", default=None, metavar="NAME", help="folder of this run in --logs (default: time, model and precision)"
    )
    group.add_argument(
        "--dry-run",
        action=Switch,
        help="read and check flags, files and weights, print what would be done, and exit; with --train-data: what the "
        "training needs (memory, hours, data, network), from a step traced without a GPU",
    )


def _add_more_compute_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of random weights, data order and augmentation (default: %(default)s)",
    )
    group.add_argument(
        "--text-batch-size",
        type=positive,
        metavar="N",
        help="captions per step in evaluation (default: the same as --batch-size)",
    )
    group.add_argument(
        "--image-decoding",
        choices=("exact", "fast", "scaled"),
        metavar="D",
        help="exact: Pillow, the published pixels; fast: torchvision, three times faster on large JPEGs, pixels may "
        "differ by one level; scaled: like fast, but large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if that "
        "leaves twice the pixels needed (default: exact in evaluation, fast in training)",
    )
    group.add_argument(
        "--exif-rotation",
        default="auto",
        choices=("auto", "on", "off"),
        metavar="R",
        help="turn photos as their EXIF data say; auto: in training and for your own data, not for benchmarks with "
        "published numbers, which were made without (default: %(default)s)",
    )
    group.add_argument(
        "--text-packing",
        default="auto",
        type=_packing,
        choices=("auto", "padded", "buckets"),
        metavar="P",
        help="layout of a step's captions: padded to the longest; buckets of similar length; auto: buckets, if the "
        "text tower supports it (default: %(default)s)",
    )


def _packing(text: str) -> str:
    if text == "flex":
        raise argparse.ArgumentTypeError("flex, all captions in a row, no longer exists; use auto, which takes buckets")
    return text


def validate_model_args(args: argparse.Namespace) -> None:
    """Checks the flags of this file.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    brings_weights = args.model.startswith(("local-dir:", "hf-hub:"))
    if args.pretrained and brings_weights and not os.path.isfile(args.pretrained):
        raise ValueError(f"--pretrained {args.pretrained} has no effect: --model {args.model} has its own weights")
    if args.pretrained and (args.pretrained_image or args.pretrained_text):
        raise ValueError(
            f"--pretrained {args.pretrained} includes both towers: omit --pretrained-image and --pretrained-text"
        )
    if isinstance(args.pretrained_image, str) and not os.path.exists(args.pretrained_image):
        raise ValueError(f"--pretrained-image {args.pretrained_image}: no such file or folder")
    if (args.lock_image_unlocked_groups or args.lock_image_freeze_bn_stats) and not args.lock_image:
        raise ValueError("--lock-image-unlocked-groups and --lock-image-freeze-bn-stats need --lock-image")
    if (args.lock_text_unlocked_layers or args.lock_text_freeze_layer_norm) and not args.lock_text:
        raise ValueError("--lock-text-unlocked-layers and --lock-text-freeze-layer-norm need --lock-text")
    if args.context_length is not None and args.context_length < (args.num_corner_tokens or 0) + 3:
        raise ValueError(f"--context-length {args.context_length}: the special tokens leave no room for text")
    if args.name and (os.sep in args.name or args.name in (".", "..")):
        raise ValueError(f"--name {args.name}: expected a single folder name; use --logs for its parent folder")
    if os.path.exists(args.logs) and not os.path.isdir(args.logs):
        raise ValueError(f"--logs {args.logs}: is a file, expected a folder")
