"""Flags of the model, of its trainable parts, of hardware and of the output folder. Imports nothing heavy."""

import argparse
import os
from collections.abc import Mapping

from training.flags.effects import ALWAYS, MODEL, STEPS, TRAINING, Condition
from training.flags.types import Flags, positive

AUTO = "auto"
PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16", "amp", "amp_bf16", "amp_bfloat16")
_OUT_OF_TRAINING = Condition(
    "in training, where captions come with their images", lambda args: not args.train_data, refused=True
)

EFFECTS = (
    (ALWAYS, "--batch-size --workers --device --logs --name --seed"),
    (_OUT_OF_TRAINING, "--text-batch-size"),
    (TRAINING, "--lock-image --lock-image-unlocked-groups --lock-image-freeze-bn-stats"),
    (TRAINING, "--lock-text --lock-text-unlocked-layers --lock-text-freeze-layer-norm"),
    (TRAINING, "--lora"),
    (STEPS, "--lora"),
    (MODEL, "--model --pretrained --cache-dir --precision --num-corner-tokens --context-length"),
    (MODEL, "--pretrained-image --pretrained-text --image-decoding --exif-rotation --text-packing"),
    (MODEL, "--force-context-length --force-image-size --force-quick-gelu --force-custom-text"),
    (MODEL, "--image-mean --image-std --image-interpolation --image-resize-mode"),
    (TRAINING, "--force-patch-dropout"),
)
# Flags that are arguments of `create_model_and_transforms`; `get_tokenizer` takes the first ones.
OF_TOKENIZER = ("cache_dir", "num_corner_tokens", "context_length", "force_context_length")
OF_MODEL = (
    *("force_image_size", "force_patch_dropout", "force_quick_gelu", "force_custom_text"),
    *("image_mean", "image_std", "image_interpolation", "image_resize_mode"),
)


def _model_config(_: object, namespace: argparse.Namespace, file: str, *__: object) -> None:
    namespace.model = f"config:{file}"


def tokenizer_arguments(flags: Mapping[str, object]) -> dict[str, object]:
    """Returns the arguments of `get_tokenizer` that the flags set; flags that are not in the mapping are left out."""
    return {name: flags[name] for name in OF_TOKENIZER if name in flags}


def model_arguments(flags: Mapping[str, object]) -> dict[str, object]:
    """Returns the arguments of `create_model_and_transforms` with which the flags change a model or its preprocessing.

    Args:
        flags: by their names in the namespace; the ``params.json`` of an earlier version may lack some.
    """
    changes = {name: flags[name] for name in OF_MODEL if flags.get(name) not in (None, False)}
    if len(size := changes.get("force_image_size", ())) == 1:
        changes["force_image_size"] = size[0]
    changes |= {name: 3 * changes[name] for name in ("image_mean", "image_std") if len(changes.get(name, ())) == 1}
    return tokenizer_arguments(flags) | changes


def add_model_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of model flags.

    Args:
        parser: the parser to extend.
        everything: also add flags that are rarely needed.
    """
    group = Flags(parser, "model")
    _add_common_model_args(group)
    if everything:
        _add_more_model_args(group)
    group = Flags(parser, "frozen parts of the model")
    group.switch("--lock-image", "freeze the image tower (locked-image tuning, LiT)")
    group.switch("--lock-text", "freeze the text tower")
    if everything:
        _add_lock_args(group)


def _add_common_model_args(group: Flags) -> None:
    group.text(
        "--model",
        "NAME",
        "model of open_clip or of this project (lotlip_bert-ViT-B-16, long_clip-ViT-B-16, ...), local-dir:FOLDER, "
        "hf-hub:ORG/REPO, or hf:FOLDER and hf:ORG/REPO for transformers' CLIP and SigLIP (default: %(default)s)",
        default="ViT-B-32",
    )
    group.calls(
        "--model-config",
        _model_config,
        "instead of --model: your own architecture, a JSON file in the format of open_clip's model configs",
        metavar="FILE",
    )
    group.text(
        "--pretrained",
        "TAG|FILE",
        "weights: an open_clip tag (openai, laion2b_s34b_b88k, ...), a .pt or a .safetensors file; without this flag "
        "the model is untrained",
    )
    group.text("--cache-dir", "DIR", "folder for downloaded weights and tokenizers, which is searched first")
    group.choice(
        "--precision",
        (AUTO, *PRECISIONS),
        AUTO,
        "numbers of weights and activations; auto: amp in a training on a GPU, otherwise fp32 (default: %(default)s; "
        "on a CPU: fp32, bf16, pure_bf16, amp_bf16)",
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


def _add_more_model_args(group: Flags) -> None:
    group.switch(
        "--pretrained-text",
        "initialise the text tower with the weights that its config names (default: only in training)",
        default=None,
    )
    group.whole(
        "--num-corner-tokens", None, "number of corner tokens of the text tower (default: the model's)", metavar="M"
    )
    group.count(
        "--context-length",
        None,
        "maximum number of tokens of a text (default: the model's); a larger number interpolates pretrained position "
        "embeddings behind the first 20, as Long-CLIP does",
        metavar="L",
    )
    group.count(
        "--force-context-length",
        None,
        "the same, but positions of open_clip's models are interpolated as open_clip does",
        metavar="L",
    )
    group.numbers("--force-image-size", "height and width of images, one number if equal", "PIXELS", type=positive)
    group.number("--force-patch-dropout", None, "fraction of image patches that a training step leaves out")
    group.switch("--force-quick-gelu", "QuickGELU as activation, as in OpenAI's models")
    group.switch("--force-custom-text", "keep the text tower of a CLIP apart, in model.text, as for other text towers")
    group.numbers("--image-mean", "mean of the pixels' values in 0..1, one number or three (default: the model's)", "M")
    group.numbers("--image-std", "standard deviation of the pixels' values (default: the model's)", "S")
    group.choice(
        "--image-interpolation",
        ("bicubic", "bilinear", "random"),
        None,
        "interpolation of resized images (default: the model's)",
    )
    group.choice(
        "--image-resize-mode",
        ("shortest", "longest", "squash"),
        None,
        "which side of an image gets the model's size in evaluation; squash: both (default: the model's)",
    )


def _add_lock_args(group: Flags) -> None:
    group.count(
        "--lora",
        None,
        "instead of the weights of linear layers that are not locked, train adapters of this rank beside them (needs "
        "peft); --pretrained and exports read a checkpoint with its adapters merged",
        metavar="RANK",
    )
    group.whole(
        "--lock-image-unlocked-groups", 0, "with --lock-image: train the last N layer groups of the image tower"
    )
    group.switch(
        "--lock-image-freeze-bn-stats", "with --lock-image: freeze the batch-norm statistics of the image tower, too"
    )
    group.whole("--lock-text-unlocked-layers", 0, "with --lock-text: train the last N layers of the text tower")
    group.switch(
        "--lock-text-freeze-layer-norm",
        "with --lock-text: freeze the layer norms of the text tower, too (CLIP's own tower always does)",
    )


def add_compute_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of hardware and output flags; see `add_model_args` for the arguments."""
    group = Flags(parser, "hardware")
    group.count("--batch-size", 64, "images per step and process; in evaluation also captions")
    group.whole("--workers", 4, "loader processes of each process; 0 loads in the process itself")
    group.text("--device", "DEV", "cuda, cpu, mps, ... (default: cuda if available)")
    if everything:
        _add_more_compute_args(group)
    group = Flags(parser, "output")
    group.text("--logs", "DIR", "parent folder of all runs (default: ./%(default)s)", default="logs")
    group.text("--name", "NAME", "folder of this run in --logs (default: time, model and precision)")
    group.switch(
        "--dry-run",
        "read and check flags, files and weights, print what would be done, and exit; with --train-data: what the "
        "training needs (memory, hours, data, network), from a step traced without a GPU",
    )


def _add_more_compute_args(group: Flags) -> None:
    group.text("--seed", "N", "seed of random weights, data order and augmentation", default=0, type=int)
    group.count("--text-batch-size", None, "captions per step in evaluation (default: the same as --batch-size)")
    group.choice(
        "--image-decoding",
        ("exact", "fast", "scaled"),
        None,
        "exact: Pillow, the published pixels; fast: torchvision, three times faster on large JPEGs, pixels may "
        "differ by one level; scaled: like fast, but large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if "
        "that leaves twice the pixels needed (default: exact in evaluation, fast in training)",
    )
    group.choice(
        "--exif-rotation",
        ("auto", "on", "off"),
        "auto",
        "turn photos as their EXIF data say; auto: in training and for your own data, not for benchmarks with "
        "published numbers, which were made without (default: %(default)s)",
    )
    group.choice(
        "--text-packing",
        ("auto", "padded", "buckets"),
        "auto",
        "layout of a step's captions: padded to the longest; buckets of similar length; auto: buckets, if the text "
        "tower supports it (default: %(default)s)",
    )


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
    if args.context_length and args.force_context_length:
        raise ValueError("--context-length and --force-context-length exclude each other")
    for flag, length in (("context", args.context_length), ("force-context", args.force_context_length)):
        if length and length < (args.num_corner_tokens or 0) + 3:
            raise ValueError(f"--{flag}-length {length}: the special tokens leave no room for text")
    numbers = {"force-image-size": (1, 2), "image-mean": (1, 3), "image-std": (1, 3)}
    for flag, counts in numbers.items():
        found = getattr(args, flag.replace("-", "_"))
        if found and len(found) not in counts:
            raise ValueError(f"--{flag}: expected {counts[0]} or {counts[1]} numbers, found {len(found)}")
    if args.force_patch_dropout is not None and not 0 <= args.force_patch_dropout < 1:
        raise ValueError(f"--force-patch-dropout {args.force_patch_dropout:g}: expected at least 0 and less than 1")
    if args.name and (os.sep in args.name or args.name in (".", "..")):
        raise ValueError(f"--name {args.name}: expected a single folder name; use --logs for its parent folder")
    if os.path.exists(args.logs) and not os.path.isdir(args.logs):
        raise ValueError(f"--logs {args.logs}: is a file, expected a folder")
