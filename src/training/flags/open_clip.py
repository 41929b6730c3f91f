"""Flags of open_clip 3.3's trainer that are not flags of this project, so that its commands can be reused.

Each flag of open_clip's parser is either one of our flags; or is declared here with the same effect as there; or is
accepted with a warning that it has no effect here; or is refused with a message that names the alternative.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from training.flags.effects import STEPS, TRAINING, Condition, Effects
from training.flags.types import Flags

_TIMM = Condition("with --opt adamw", lambda args: args.opt != "adamw")
_COOLDOWN = Condition(
    "without --lr-scheduler const-cooldown", lambda args: args.lr_scheduler == "const-cooldown" and args.train_data
)
_SCHEDULED = Condition("with --skip-scheduler", lambda args: not args.skip_scheduler)

NO_EFFECT = "no_effect"  # attribute of the namespace that lists the given flags of _IDLE

# Flags that have no effect here: flag -> (number of values, reason).
_IDLE = {
    "--val-num-samples": (1, "--val-data is always counted and read completely"),
    "--dist-backend": (1, "the backend follows --device"),
    "--ddp-static-graph": (0, "gradients of processes are summed without it"),
    "--log-local": (0, "only rank 0 writes a log, other ranks print their warnings"),
    "--debug": (0, "the log has one level; --log-every-n-steps 1 shows every step"),
    "--remote-sync-protocol": (1, "the URL of --remote-sync contains the protocol"),
    "--loss-dist-impl": (1, "the sigmoid loss is computed in blocks of the gathered batch"),
}

# Flags that are refused: flag -> (number of values, alternative).
_REFUSED = {
    "--force-image-size": ("+", "write image_size of vision_cfg in a file for --model-config"),
    "--force-quick-gelu": (0, 'write "quick_gelu": true in a file for --model-config; OpenAI\'s weights enable it'),
    "--force-patch-dropout": (1, "write patch_dropout of vision_cfg in a file for --model-config"),
    "--force-custom-text": (0, 'write "custom_text": true in a file for --model-config; both forms of weights load'),
    "--image-mean": ("+", "write mean of preprocess_cfg in a file for --model-config"),
    "--image-std": ("+", "write std of preprocess_cfg in a file for --model-config"),
    "--image-interpolation": (1, "write interpolation of preprocess_cfg in a file for --model-config"),
    "--image-resize-mode": (1, "write resize_mode of preprocess_cfg in a file for --model-config"),
    "--use-bn-sync": (0, "each process normalises by its own batch; running statistics are averaged over processes"),
    "--torchscript": (0, "train without it; python -m training.export writes ONNX files"),
    "--trace": (0, "evaluate without it; python -m training.export writes ONNX files"),
    "--dist-url": (1, "set MASTER_ADDR and MASTER_PORT, or start with torchrun, which sets them"),
    "--no-set-device-rank": (0, "leave all devices visible to all processes; each uses the one of its local rank"),
    "--horovod": (0, "start with torchrun --nproc_per_node N -m -- training.main ..."),
    "--copy-codebase": (0, "flags are stored in params.json; note the commit of the code"),
    "--wandb-notes": (1, "set the environment variable WANDB_NOTES"),
    "--coca-caption-loss-weight": (1, "CoCa's captioning is not trained here; train it with open_clip_train.main"),
    "--coca-contrastive-loss-weight": (1, "CoCa is not trained here; train it with open_clip_train.main"),
    "--distill-model": (1, "distillation is not part of this project; train with open_clip_train.main"),
    "--distill-pretrained": (1, "distillation is not part of this project; train with open_clip_train.main"),
    "--use-bnb-linear": (1, "use --precision amp_bf16; bitsandbytes layers are not supported"),
}

EFFECTS: Effects = (
    (TRAINING, "--dataset-type --opt --momentum --skip-scheduler --wandb-project-name"),
    (STEPS, "--opt --momentum --skip-scheduler --wandb-project-name"),
    (_TIMM, "--momentum"),
    (_SCHEDULED, "--warmup --lr-scheduler"),
    (_COOLDOWN, "--epochs-cooldown --lr-cooldown-end --lr-cooldown-power"),
)


class _CaptionKey(argparse.Action):
    """``--csv-caption-key COL`` stands for ``--raw-caption-keys COL --captions raw``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        namespace.raw_caption_keys, namespace.captions = (values,), "raw"


class _Idle(argparse.Action):
    """Records in the namespace's `NO_EFFECT` that the flag was given; `const` is the reason why it has no effect."""

    def __init__(self, option_strings: Sequence[str], dest: str, nargs: int | None, const: str, **kwargs: Any):
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=nargs, const=const, default=argparse.SUPPRESS, **kwargs
        )

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        given = vars(namespace).setdefault(NO_EFFECT, [])
        given.append(f"{option_string}: no effect: {self.const}")


class _Refused(argparse.Action):
    """Raises a usage error with the alternative, which is the action's `const`."""

    def __init__(self, option_strings: Sequence[str], dest: str, nargs: int | str, const: str, **kwargs: Any):
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=nargs, const=const, default=argparse.SUPPRESS, **kwargs
        )

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        parser.error(f"{option_string}, a flag of open_clip's trainer, is not supported: {self.const}")


def optimizer(text: str) -> str:
    """Checks the format of an optimizer's name; timm checks the name itself later."""
    name = text.lower()
    if name != "adamw" and not name.startswith("timm/"):
        raise argparse.ArgumentTypeError(f"expected adamw or timm/NAME, found {text!r}")
    return name


def add_open_clip_args(parser: argparse.ArgumentParser) -> None:
    """Adds the group of flags for open_clip's commands."""
    group = Flags(parser, "open_clip compatibility")
    group.choice(
        "--dataset-type",
        ("auto", "webdataset", "csv", "synthetic"),
        "auto",
        "required type of --train-data: shards or a table; auto: by its name",
    )
    group.add_argument(
        "--csv-caption-key", action=_CaptionKey, metavar="COL", help="short for --raw-caption-keys COL --captions raw"
    )
    group.text(
        "--opt", "NAME", "adamw, or timm/NAME for a timm optimizer, such as timm/lion", default="adamw", type=optimizer
    )
    group.number("--momentum", None, "momentum of timm's optimizers (default: theirs)")
    group.switch("--skip-scheduler", "keep the learning rate at --lr, without a warm-up")
    group.count("--epochs-cooldown", None, "number of epochs of const-cooldown's final decay")
    group.number("--lr-cooldown-end", 0.0, "final learning rate", metavar="LR")
    group.number("--lr-cooldown-power", 1.0, "exponent of const-cooldown's decay; 1 is linear")
    group.text("--wandb-project-name", "NAME", "W&B project", default="lotlip")
    for flag, (nargs, why) in _IDLE.items():
        nargs = None if nargs == 1 else nargs
        group.add_argument(flag, action=_Idle, nargs=nargs, const=why, metavar="X", help=f"no effect: {why}")
    for flag, (nargs, advice) in _REFUSED.items():
        group.add_argument(
            flag,
            action=_Refused,
            nargs=None if nargs == 1 else nargs,
            const=advice,
            metavar="X",
            help=f"refused: {advice}",
        )


def validate_open_clip_args(args: argparse.Namespace) -> None:
    """Checks the flags of this file; called in training only.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    if args.lr_scheduler != "const-cooldown":
        return
    if not args.epochs_cooldown or args.epochs_cooldown > args.epochs:
        raise ValueError(
            f"--lr-scheduler const-cooldown: expected --epochs-cooldown from 1 to --epochs {args.epochs}, "
            f"found {args.epochs_cooldown}"
        )
    if not args.lr_cooldown_end >= 0 or not args.lr_cooldown_power > 0:
        raise ValueError("--lr-cooldown-end must be at least 0 and --lr-cooldown-power greater than 0")
