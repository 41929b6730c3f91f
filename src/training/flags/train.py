"""Flags of training: optimization, logging, checkpoints and safety. Imports nothing heavy."""

import argparse

from training.flags import data, loss
from training.flags.effects import ALWAYS, DATA, STEPS, STEPS_MEANT, TRAINING, TRAINING_MEANT, Condition, Effects
from training.flags.eval import has_benchmark
from training.flags.open_clip import validate_open_clip_args
from training.flags.types import Flags, names
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
    (ALWAYS, "--experiment"),
    (TRAINING_MEANT, "--resume --report-to"),
    (
        Condition("without --resume", lambda args: args.resume),
        "--allow-changed-experiment",
    ),
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
    group = Flags(parser, "optimization")
    _add_common_optimization_args(group)
    if everything:
        _add_more_optimization_args(group)
        loss.add_loss_args(Flags(parser, "loss"))
        _add_dry_run_args(Flags(parser, "dry run of a training"))
    group = Flags(parser, "logging and checkpoints")
    _add_common_logging_args(group)
    if everything:
        _add_more_logging_args(group)
        _add_safety_args(Flags(parser, "running for weeks"))


def _add_common_optimization_args(group: Flags) -> None:
    group.count("--epochs", 10, "epochs to train")
    group.number("--lr", 5e-4, "peak learning rate")
    group.number("--wd", 0.2, "weight decay of matrices")
    group.whole("--warmup", 2000, "steps over which the learning rate rises linearly to its peak")
    group.count("--accum-freq", 1, "batches per step, compared as one large batch with the memory of a single one")
    group.switch("--grad-checkpointing", "recompute activations: less memory, about a third more time")


def _add_more_optimization_args(group: Flags) -> None:
    group.number("--image-lr", None, "learning rate of the image tower (default: --lr)", metavar="LR")
    group.number("--text-lr", None, "learning rate of the text tower (default: --lr)", metavar="LR")
    group.number("--beta1", 0.9, "AdamW's beta1")
    group.number("--beta2", 0.98, "AdamW's beta2")
    group.number("--eps", 1e-6, "AdamW's epsilon")
    group.choice(
        "--lr-scheduler",
        ("cosine", "const", "const-cooldown"),
        "cosine",
        "learning rate after the warm-up: cosine decays to 0, const is constant, const-cooldown is constant and "
        "decays in the last --epochs-cooldown (default: %(default)s)",
    )
    group.number("--grad-clip-norm", None, "maximum norm of the gradient (default: no limit)")
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="model",
        choices=("model", "image"),
        metavar="WHAT",
        help="compile each layer of both towers, or with the value image only those of the image tower "
        "(default: compile nothing)",
    )
    group.switch(
        "--deterministic",
        "use only deterministic algorithms, so that a resumed run on a GPU equals an uninterrupted one; slower",
    )


def _add_common_logging_args(group: Flags) -> None:
    group.text("--resume", "FILE|latest", "continue from a checkpoint; latest: the newest checkpoint of --name")
    group.text(
        "--report-to",
        "R,R",
        "tensorboard, wandb or both, in addition to metrics.jsonl, which is always written",
        default="",
        type=names,
    )
    group.whole("--save-frequency", 1, "save epoch_N.pt every N epochs; 0: never")
    group.whole("--zeroshot-frequency", 1, "evaluate the named benchmarks every N epochs and at the end; 0: never")


def _add_more_logging_args(group: Flags) -> None:
    group.count("--log-every-n-steps", 100, "steps per log line")
    group.text("--profile", "DIR", "profile 5 steps: write a trace and a table of the ten slowest operations")
    group.switch("--save-most-recent", "also save epoch_latest.pt after every epoch")
    group.switch("--delete-previous-checkpoint", "keep only the last epoch_N.pt instead of all")
    group.whole("--val-frequency", 1, "evaluate --val-data every N epochs and at the end; 0: never")


def _add_safety_args(group: Flags) -> None:
    group.number("--save-every-minutes", 10.0, "save step_N.pt every X minutes; 0: never")
    group.whole("--save-every-steps", 0, "save step_N.pt every N steps; 0: never")
    group.count("--keep-checkpoints", 2, "number of newest step_N.pt to keep")
    group.text(
        "--remote-sync",
        "URL",
        "copy checkpoints and logs to URL/NAME (such as s3://...) during training; --resume latest also reads it",
    )
    group.count(
        "--remote-sync-frequency",
        300,
        "seconds between copies of the logs; checkpoints are copied immediately",
        metavar="S",
    )
    group.number(
        "--max-bad-samples", 0.1, "maximum tolerated fraction of bad samples; training stops above it", metavar="SHARE"
    )
    group.whole("--max-skipped-steps", 20, "stop after more than N steps in a row with a non-finite loss or gradient")
    group.number(
        "--timeout-minutes",
        30.0,
        "abort the run, and name the process, when one makes no progress for X minutes; evaluations during training "
        "may take four times as long (default: %(default)g)",
    )


def _add_dry_run_args(group: Flags) -> None:
    group.count(
        "--dry-run-ranks", None, "with --dry-run: plan for N processes, one per GPU (default: those that were started)"
    )
    group.choice("--dry-run-gpu", tuple(GPUS), "H100", "with --dry-run: kind of GPU")
    group.text("--dry-run-json", "FILE", "with --dry-run: also write the plan to FILE")


def validate_train_args(args: argparse.Namespace) -> None:
    """Checks the training flags.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    if not DATA.holds(args):
        return
    data.validate_data_args(args)
    loss.validate_loss_args(args)
    if not args.train_data:
        return
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
