"""Flags of open_clip 3.3's trainer that are not flags of this project, so that its commands can be reused.

Each flag of open_clip's parser is either one of our flags; or is declared here with the same effect as there; or is
accepted with a warning that it has no effect here; or is refused with a message that names the alternative.
"""

import argparse
from functools import partial

from training.flags.effects import DATA, STEPS, TRAINING, Condition, Effects
from training.flags.types import Flags

_TIMM = Condition("with --opt adamw", lambda args: args.opt != "adamw")
_COOLDOWN = Condition(
    "without --lr-scheduler const-cooldown", lambda args: args.lr_scheduler == "const-cooldown" and args.train_data
)
_SCHEDULED = Condition("with --skip-scheduler", lambda args: not args.skip_scheduler)

NO_EFFECT = "no_effect"  # attribute of the namespace that lists the given flags of _IDLE

# Flags that have no effect here: flag -> (argparse's nargs, reason).
_IDLE = {
    "--val-num-samples": (None, "--val-data is always counted and read completely"),
    "--dist-backend": (None, "the backend follows --device"),
    "--ddp-static-graph": (0, "gradients of processes are summed without it"),
    "--log-local": (0, "only rank 0 writes a log, other ranks print their warnings"),
    "--debug": (0, "the log has one level; --log-every-n-steps 1 shows every step"),
    "--remote-sync-protocol": (None, "the URL of --remote-sync contains the protocol"),
    "--loss-dist-impl": (None, "the sigmoid loss is computed in blocks of the gathered batch"),
}

# Flags that are refused: flag -> (argparse's nargs, alternative).
_REFUSED = {
    "--torchscript": (0, "train without it; python -m training.export writes ONNX files"),
    "--trace": (0, "evaluate without it; python -m training.export writes ONNX files"),
    "--dist-url": (None, "set MASTER_ADDR and MASTER_PORT, or start with torchrun, which sets them"),
    "--no-set-device-rank": (0, "leave all devices visible to all processes; each uses the one of its local rank"),
    "--horovod": (0, "start with torchrun --nproc_per_node N -m -- training.main ..."),
    "--copy-codebase": (0, "flags are stored in params.json; note the commit of the code"),
    "--wandb-notes": (None, "set the environment variable WANDB_NOTES"),
    "--coca-caption-loss-weight": (None, "CoCa's captioning is not trained here; train it with open_clip_train.main"),
    "--coca-contrastive-loss-weight": (None, "CoCa is not trained here; train it with open_clip_train.main"),
    "--distill-model": (None, "distillation is not part of this project; train with open_clip_train.main"),
    "--distill-pretrained": (None, "distillation is not part of this project; train with open_clip_train.main"),
    "--use-bnb-linear": (None, "use --precision amp_bf16; bitsandbytes layers are not supported"),
}

EFFECTS: Effects = (
    (DATA, "--dataset-type"),
    *(
        (condition, "--opt --momentum --skip-scheduler --use-bn-sync --wandb-project-name")
        for condition in (TRAINING, STEPS)
    ),
    (_TIMM, "--momentum"),
    (_SCHEDULED, "--warmup --lr-scheduler"),
    (_COOLDOWN, "--epochs-cooldown --lr-cooldown-end --lr-cooldown-power"),
)


def _caption_key(_: object, namespace: argparse.Namespace, column: str, *__: object) -> None:
    namespace.raw_caption_keys, namespace.captions = (column,), "raw"


def _note(why: str, _: object, namespace: argparse.Namespace, __: object, flag: str) -> None:
    """Notes in the namespace that a flag without an effect was given."""
    vars(namespace).setdefault(NO_EFFECT, []).append(f"{flag}: no effect: {why}")


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
    group.calls("--csv-caption-key", _caption_key, "short for --raw-caption-keys COL --captions raw", metavar="COL")
    group.text(
        "--opt", "NAME", "adamw, or timm/NAME for a timm optimizer, such as timm/lion", default="adamw", type=optimizer
    )
    group.number("--momentum", None, "momentum of timm's optimizers (default: theirs)")
    group.switch("--skip-scheduler", "keep the learning rate at --lr, without a warm-up")
    group.switch("--use-bn-sync", "normalise batch norms by the batches of all processes (GPUs only)")
    group.count("--epochs-cooldown", None, "number of epochs of const-cooldown's final decay")
    group.number("--lr-cooldown-end", 0.0, "final learning rate", metavar="LR")
    group.number("--lr-cooldown-power", 1.0, "exponent of const-cooldown's decay; 1 is linear")
    group.text("--wandb-project-name", "NAME", "W&B project", default="lotlip")
    for flag, (nargs, why) in _IDLE.items():
        group.calls(flag, partial(_note, why), f"no effect: {why}", nargs=nargs)
    for flag, (nargs, advice) in _REFUSED.items():
        reason = f", a flag of open_clip's trainer, is not supported: {advice}"
        group.refused(flag, reason, f"refused: {advice}", nargs)


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
