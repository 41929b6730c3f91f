"""Flags of training: optimization, logging, checkpoints and safety. Imports nothing heavy."""

import argparse

from training.flags import data, loss
from training.flags.effects import ALWAYS, STEPS, STEPS_MEANT, TRAINING, TRAINING_MEANT, Condition, Effects
from training.flags.eval import has_benchmark
from training.flags.open_clip import validate_open_clip_args
from training.flags.types import Switch, names, not_negative, positive
from training.runtime.gpus import GPUS

REPORTERS = ("tensorboard", "wandb")

_VALIDATION = Condition("without --val-data", lambda args: args.val_data)
_BENCHMARK = Condition("without a benchmark, such as --urban1k-retrieval", has_benchmark)
_MID_EPOCH = Condition(
    "with --save-every-minutes 0 and --save-every-steps 0, which never save within an epoch",
    lambda args: args.save_every_minutes or args.save_every_steps,
)
_WHOLE_EPOCHS = Condition("with --save-frequency 0, which never saves epoch_N.pt", lambda args: args.save_frequency)
_DRY_RUN = Condition("without --dry-run", lambda args: args.dry_run)
_OPTIMIZATION = (
    "--epochs --lr --image-lr --text-lr --wd --beta1 --beta2 --eps --warmup --lr-scheduler --grad-clip-norm "
    "--accum-freq --grad-checkpointing --torchcompile --deterministic"
)
_NOT_COMPILED = Condition(
    "with --torchcompile, which may choose other kernels at each start",
    lambda args: not args.torchcompile,
    refused=True,
)
_LOGGING = (
    "--log-every-n-steps --save-frequency --save-most-recent --delete-previous-checkpoint --zeroshot-frequency "
    "--val-frequency --profile"
)
_REMOTE = Condition("without --remote-sync", lambda args: args.remote_sync)
_SAFETY = (
    "--save-every-minutes --save-every-steps --keep-checkpoints --max-skipped-steps --remote-sync "
    "--remote-sync-frequency"
)

EFFECTS: Effects = (
    *data.EFFECTS,
    *loss.EFFECTS,
    (ALWAYS, "--timeout-minutes"),
    (TRAINING_MEANT, "--resume --report-to"),
    *((TRAINING, flags) for flags in (_OPTIMIZATION, _LOGGING, _SAFETY, "--max-bad-samples")),
    *((STEPS, flags) for flags in (_OPTIMIZATION, _LOGGING, _SAFETY, "--report-to --val-data")),
    (_NOT_COMPILED, "--deterministic"),
    (STEPS_MEANT, "--dry-run"),
    *((condition, "--dry-run-ranks --dry-run-gpu --dry-run-json") for condition in (TRAINING, _DRY_RUN)),
    (_VALIDATION, "--val-frequency"),
    (_BENCHMARK, "--zeroshot-frequency"),
    (_REMOTE, "--remote-sync-frequency"),
    (_MID_EPOCH, "--keep-checkpoints"),
    (_WHOLE_EPOCHS, "--delete-previous-checkpoint"),
)


def add_train_args(parser: argparse.ArgumentParser, everything: bool) -> None:
    """Adds the groups of training flags; with `everything`, also flags that are rarely needed."""
    data.add_data_args(parser, everything)
    group = parser.add_argument_group("optimization")
    _add_common_optimization_args(group)
    if everything:
        _add_more_optimization_args(group)
        loss.add_loss_args(parser.add_argument_group("loss"))
        _add_dry_run_args(parser.add_argument_group("dry run of a training"))
    group = parser.add_argument_group("logging and checkpoints")
    _add_common_logging_args(group)
    if everything:
        _add_more_logging_args(group)
        _add_safety_args(parser.add_argument_group("running for weeks"))


def _add_common_optimization_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--epochs", type=positive, default=10, metavar="N", help="epochs to train (default: %(default)s)"
    )
    group.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default: %(default)s)")
    group.add_argument("--wd", type=float, default=0.2, help="weight decay of matrices (default: %(default)s)")
    group.add_argument(
        "--warmup",
        type=not_negative,
        default=2000,
        metavar="N",
        help="steps over which the learning rate rises linearly to its peak (default: %(default)s)",
    )
    group.add_argument(
        "--accum-freq",
        type=positive,
        default=1,
        metavar="N",
        help="batches per step, compared as one large batch with the memory of a single one (default: %(default)s)",
    )
    group.add_argument(
        "--grad-checkpointing", action=Switch, help="recompute activations: less memory, about a third more time"
    )


def _add_more_optimization_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image-lr", type=float, metavar="LR", help="learning rate of the image tower (default: --lr)")
    group.add_argument("--text-lr", type=float, metavar="LR", help="learning rate of the text tower (default: --lr)")
    group.add_argument("--beta1", type=float, default=0.9, help="AdamW's beta1 (default: %(default)s)")
    group.add_argument("--beta2", type=float, default=0.98, help="AdamW's beta2 (default: %(default)s)")
    group.add_argument("--eps", type=float, default=1e-6, help="AdamW's epsilon (default: %(default)s)")
    group.add_argument(
        "--lr-scheduler",
        default="cosine",
        choices=("cosine", "const", "const-cooldown"),
        help="learning rate after the warm-up: cosine decays to 0, const is constant, const-cooldown is constant and "
        "decays in the last --epochs-cooldown (default: %(default)s)",
    )
    group.add_argument(
        "--grad-clip-norm", type=float, metavar="X", help="maximum norm of the gradient (default: no limit)"
    )
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="model",
        choices=("model", "image"),
        metavar="WHAT",
        help="compile the model, or with the value image only the image tower, whose shapes never change "
        "(default: compile nothing)",
    )
    group.add_argument(
        "--deterministic",
        action=Switch,
        help="use only deterministic algorithms, so that a resumed run on a GPU equals an uninterrupted one; slower",
    )


def _add_common_logging_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume", metavar="FILE|latest", help="continue from a checkpoint; latest: the newest checkpoint of --name"
    )
    group.add_argument(
        "--report-to",
        type=names,
        default="",
        metavar="R,R",
        help="tensorboard, wandb or both, in addition to metrics.jsonl, which is always written",
    )
    group.add_argument(
        "--save-frequency",
        type=not_negative,
        default=1,
        metavar="N",
        help="save epoch_N.pt every N epochs; 0: never (default: %(default)s)",
    )
    group.add_argument(
        "--zeroshot-frequency",
        type=not_negative,
        default=1,
        metavar="N",
        help="evaluate the named benchmarks every N epochs and at the end; 0: never (default: %(default)s)",
    )


def _add_more_logging_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--log-every-n-steps", type=positive, default=100, metavar="N", help="steps per log line (default: %(default)s)"
    )
    group.add_argument(
        "--profile", metavar="DIR", help="profile 5 steps: write a trace and a table of the ten slowest operations"
    )
    group.add_argument("--save-most-recent", action=Switch, help="also save epoch_latest.pt after every epoch")
    group.add_argument(
        "--delete-previous-checkpoint", action=Switch, help="keep only the last epoch_N.pt instead of all"
    )
    group.add_argument(
        "--val-frequency",
        type=not_negative,
        default=1,
        metavar="N",
        help="evaluate --val-data every N epochs and at the end; 0: never (default: %(default)s)",
    )


def _add_safety_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--save-every-minutes",
        type=float,
        default=10.0,
        metavar="X",
        help="save step_N.pt every X minutes; 0: never (default: %(default)g)",
    )
    group.add_argument(
        "--save-every-steps",
        type=not_negative,
        default=0,
        metavar="N",
        help="save step_N.pt every N steps; 0: never (default: %(default)s)",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=positive,
        default=2,
        metavar="N",
        help="number of newest step_N.pt to keep (default: %(default)s)",
    )
    group.add_argument(
        "--remote-sync",
        metavar="URL",
        help="copy checkpoints and logs to URL/NAME (such as s3://...) during training; --resume latest also reads it",
    )
    group.add_argument(
        "--remote-sync-frequency",
        type=positive,
        default=300,
        metavar="S",
        help="seconds between copies of the logs; checkpoints are copied immediately (default: %(default)s)",
    )
    group.add_argument(
        "--max-bad-samples",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="maximum tolerated fraction of bad samples; training stops above it (default: %(default)s)",
    )
    group.add_argument(
        "--max-skipped-steps",
        type=not_negative,
        default=20,
        metavar="N",
        help="stop after more than N steps in a row with a non-finite loss or gradient (default: %(default)s)",
    )
    group.add_argument(
        "--timeout-minutes",
        type=float,
        default=30.0,
        metavar="X",
        help="abort the run, and name the process, when one makes no progress for X minutes; evaluations during "
        "training may take four times as long (default: %(default)g)",
    )


def _add_dry_run_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dry-run-ranks",
        type=positive,
        metavar="N",
        help="with --dry-run: plan for N processes, one per GPU (default: those that were started)",
    )
    group.add_argument(
        "--dry-run-gpu", choices=tuple(GPUS), default="H100", help="with --dry-run: kind of GPU (default: %(default)s)"
    )
    group.add_argument("--dry-run-json", metavar="FILE", help="with --dry-run: also write the plan to FILE")


def validate_train_args(args: argparse.Namespace) -> None:
    """Checks the training flags.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    if not args.train_data:
        return
    data.validate_data_args(args)
    validate_open_clip_args(args)
    if set(args.report_to) - set(REPORTERS):
        raise ValueError(
            f"--report-to {','.join(args.report_to)}: expected any of {', '.join(REPORTERS)}, separated by commas"
        )
    for flag, value in (("--logs", args.logs), ("--resume", args.resume)):
        if value and "://" in value:
            raise ValueError(f"{flag} {value}: expected a local path; --remote-sync URL copies runs to and from a URL")
    if args.resume == "latest" and not args.name:
        raise ValueError("--resume latest needs --name, the run to continue")
    loss.validate_loss_args(args)
    for name in ("lr", "image_lr", "text_lr", "grad_clip_norm"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    if not args.save_every_minutes >= 0:
        raise ValueError(f"--save-every-minutes {args.save_every_minutes:g}: expected 0 (never) or more")
    if not 0 <= args.max_bad_samples <= 1:
        raise ValueError(f"--max-bad-samples {args.max_bad_samples:g}: expected a fraction from 0 to 1")
    if not args.timeout_minutes > 0:
        raise ValueError(f"--timeout-minutes {args.timeout_minutes:g}: expected a positive number")
    if args.precision in ("bf16", "pure_bf16", "fp16", "pure_fp16") and not args.extract_image_features:
        raise ValueError(
            f"--precision {args.precision}: 16-bit weights lose small updates; use amp or amp_bf16, which keep weights "
            "in 32 bits"
        )
