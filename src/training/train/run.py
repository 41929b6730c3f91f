"""Runs one training from start to end: check, open data, build, resume; then the training loop in loop.py."""

import argparse
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from training.data.features import feature_info
from training.data.images import parse_augmentation
from training.data.loader import NoUsableSampleError
from training.data.open import caption_rule, open_source, open_train_data
from training.data.order import Share
from training.data.shards import Source
from training.eval.results import run_name
from training.eval.retrieval import RetrievalWork, plan_benchmarks
from training.model.assembly.from_flags import build_from_flags, check_precision
from training.model.names.config import resolve_weights
from training.model.towers.locking import linear_head
from training.readers.faults import TooManyBadSamplesError
from training.runtime.arithmetic import deterministic
from training.runtime.distributed import DistEnv, failing_with, on_main_rank
from training.runtime.experiment import copy_experiment, experiment_of
from training.runtime.files import atomic_write
from training.runtime.lease import Lease
from training.runtime.tracking import check_reporters, log_to
from training.runtime.watchdog import BUILDING, OPENING, Watchdog, joined_ranks
from training.train.build import make_loss, make_stepper, num_corners
from training.train.checkpoint import CHECKPOINTS, check_checkpoint, newest_checkpoint, saved_checkpoints
from training.train.extract import tower_info
from training.train.loop import Plan, Trainer
from training.train.optim import make_schedule, optimizer_from_flags
from training.train.remote import RemoteCopy, RemoteError
from training.train.resume import Division, Progress, changed_flags, restore, start_from

logger = logging.getLogger(__name__)


def train(args: argparse.Namespace) -> int:
    """Runs a training.

    Returns:
        Exit code. 0: success; 1: data, loss or disk failed during training; 2: wrong flags, files or weights; 75:
        stopped by a signal, continue with ``--resume latest``.
    """
    joined = joined_ranks(args.device, args.timeout_minutes, "continue with --resume latest")
    with joined as (env, watchdog), Lease() as lease, ExitStack() as stack:
        lease.is_worthless = lambda: True
        with failing_with(2, ValueError, OSError):
            stack.enter_context(deterministic(args.deterministic))
            trainer = _prepare(args, watchdog, lease, env)
        first = trainer.progress.step
        lease.is_worthless = lambda: trainer.progress.step == first  # no step has been taken
        with failing_with(1, FloatingPointError, TooManyBadSamplesError, NoUsableSampleError, OSError, RemoteError):
            return trainer.run()


def _prepare(args: argparse.Namespace, watchdog: Watchdog, lease: Lease, env: DistEnv) -> Trainer:
    """Checks, opens data, builds model and optimizer, and restores the state of a checkpoint.

    Raises:
        ValueError, OSError: the message says what is wrong; raised possibly on this rank only.
    """
    experiment = experiment_of(args)
    plan = on_main_rank(lambda: _check(args, lease, env), env)
    if not env.is_main:
        log_to(None)
    watchdog.at(0, OPENING)
    source, val_source = open_sources(args, env)
    steps_per_epoch = count_steps(args, source, env)
    watchdog.at(0, BUILDING)
    parts = build_from_flags(args, env.device)
    core: Any = parts.model
    if hasattr(core, "text_decoder"):
        raise ValueError(f"--model {args.model}: training of CoCa is not supported; use a two-tower model")
    if not any(p.requires_grad for name, p in core.named_parameters() if not name.startswith("logit_")):
        raise ValueError("--lock-image and --lock-text leave nothing to train; unlock layers or a tower")
    _check_features(args, core)
    if args.grad_checkpointing:
        core.set_grad_checkpointing()
    optimizer = optimizer_from_flags(args, core)
    scaler = torch.amp.GradScaler(env.device.type) if args.precision == "amp" else None
    order = f"{source.fingerprint()}, {args.train_num_samples or source.num_samples} samples an epoch"
    if experiment.group_batches > 1:
        order += f", in groups of {experiment.group_batches} batches"
    unread = (0,) * max(1, args.workers)
    share = Share(args.batch_size, steps_per_epoch * args.accum_freq, env.rank, env.world_size, slots_done=unread)
    division = Division(share, args.accum_freq, order)
    stepper = make_stepper(args, core, optimizer, scaler, env, experiment)
    start = Progress.at_epoch(0, division)
    if plan.resume:
        content = restore(plan.resume, stepper)
        start = start_from(content, plan.resume, division)
        if start.share.left and experiment.group_batches > 1:
            raise ValueError(
                f"--resume {plan.resume}: --experiment {args.experiment} orders groups of batches, of which some are "
                "begun; continue with the same number of processes, --workers and --batch-size"
            )
        if start.epoch >= args.epochs and env.is_main:
            logger.warning(f"{plan.resume} has finished all of --epochs {args.epochs}: nothing left to train")
    data, val = open_train_data(args, parts.train_transform, parts.tokenizer, source, parts.arrange, experiment), None
    if val_source is not None:
        val = open_train_data(args, parts.preprocess, parts.tokenizer, val_source, parts.arrange)
    val_loss = make_loss(args, num_corners(core), replace(env, rank=0, world_size=1))
    schedule = _schedule(args, optimizer, steps_per_epoch, env)
    return Trainer(args, plan, env, watchdog, data, val, val_loss, parts, stepper, schedule, division, start)


def _check(args: argparse.Namespace, lease: Lease, env: DistEnv) -> Plan:
    """Checks flags and files, except data and weights, takes the lease of LOGS/NAME and opens the log. Rank 0 only.

    Raises:
        ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    work = check_inputs(args, env.device)
    name = args.name or run_name(args.model)
    folder = Path(args.logs) / name
    lease.take(folder, f"--name {name}")
    checkpoints = folder / CHECKPOINTS
    remote = RemoteCopy(args, folder) if args.remote_sync else None
    resume = Path(args.resume) if args.resume not in (None, "latest") else None
    if resume:
        check_checkpoint(resume)
    if not args.resume and (saved_checkpoints(checkpoints) or (remote and remote.index)):
        taken = f"{args.remote_sync}/{name}" if remote and remote.index else checkpoints
        raise ValueError(f"--name {name}: {taken} contains checkpoints; add --resume latest or use another name")
    checkpoints.mkdir(parents=True, exist_ok=True)
    fetched = remote.fetch_newer() if remote and args.resume == "latest" else None
    log_to(folder)
    if args.gather_dtype != "float32" and env.world_size == 1:
        logger.warning(f"--gather-dtype {args.gather_dtype}: no effect with one process, which gathers nothing")
    if fetched:
        logger.info(f"fetched {fetched} and the logs from {args.remote_sync}/{name}")
    if args.resume == "latest":
        resume = newest_checkpoint(checkpoints)
        logger.info(f"--resume latest: {resume or f'nothing saved in {checkpoints}, starting from the beginning'}")
    if resume and (changed := changed_flags(resume, vars(args))):
        shown = ", ".join(f"{flag} {then} -> {now}" for flag, (then, now) in changed.items())
        logger.info(f"--resume {resume}: flags that differ from that run's: {shown}")
    copy_experiment(args, folder, resume)
    with atomic_write(folder / "params.json") as path:
        path.write_text(json.dumps(vars(args), indent=1) + "\n")
    return Plan(folder, resume, work)


def check_inputs(args: argparse.Namespace, device: torch.device) -> RetrievalWork | None:
    """Checks flags and files that need no folder of the run; returns the benchmarks. Raises like `_check`."""
    check_precision(args.precision, device)
    if args.use_bn_sync and device.type != "cuda":
        raise ValueError(f"--use-bn-sync: PyTorch synchronises batch norms on GPUs only, found {device.type}; omit it")
    check_reporters(args.report_to)
    parse_augmentation(args.aug_cfg)
    work = plan_benchmarks(args)
    resolve_weights(args.model, args.pretrained, args.cache_dir)
    for flag, spec in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if spec and feature_info(spec) and (not args.lock_image or args.lock_image_unlocked_groups):
            raise ValueError(f"{flag} {spec}: features of a locked image tower; add --lock-image and unlock no groups")
    return work


def open_sources(args: argparse.Namespace, env: DistEnv) -> tuple[Source, Source | None]:
    """Opens ``--train-data`` and ``--val-data``; see `data.open.open_source`."""
    rule = caption_rule(args)
    source = open_source(args, "--train-data", args.train_data, rule, env, args.dataset_resampled)
    val = open_source(args, "--val-data", args.val_data, rule, env) if args.val_data else None
    return source, val


def count_steps(args: argparse.Namespace, source: Source, env: DistEnv) -> int:
    """Optimizer steps of an epoch; the samples left over after the last whole one are other ones each epoch."""
    num_samples = args.train_num_samples or source.num_samples
    if num_samples > source.num_samples:
        raise ValueError(
            f"--train-num-samples {num_samples}: there are only {source.num_samples:,} samples; omit the flag or add "
            "--dataset-resampled"
        )
    samples_per_step = args.batch_size * args.accum_freq * env.world_size
    if samples_per_step > num_samples:
        raise ValueError(
            f"--batch-size {args.batch_size} x --accum-freq {args.accum_freq} x {env.world_size} processes: a step "
            f"takes {samples_per_step:,} samples, but an epoch has {num_samples:,}; reduce --batch-size"
        )
    return num_samples // samples_per_step


def _schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps_per_epoch: int, env: DistEnv
) -> Callable[[int], float]:
    name, warmup = ("const", 0) if args.skip_scheduler else (args.lr_scheduler, args.warmup)
    num_steps = steps_per_epoch * args.epochs
    if env.is_main and warmup >= num_steps:
        logger.warning(
            f"--warmup {warmup}: the run has only {num_steps:,} steps, so the learning rate never reaches --lr "
            f"{args.lr:g}; a tenth of the steps is usual (--warmup {num_steps // 10})"
        )
    cooldown = (steps_per_epoch * (args.epochs_cooldown or 0), args.lr_cooldown_power, args.lr_cooldown_end)
    return make_schedule(optimizer, name, args.lr, warmup, num_steps, *cooldown)


def _check_features(args: argparse.Namespace, core: Any) -> None:
    """Raises ValueError if cached image features are not those of this model's tower, or if the tower is trained."""
    specs = {"--train-data": args.train_data, "--val-data": args.val_data}
    infos = {flag: info for flag, spec in specs.items() if spec and (info := feature_info(spec))}
    if not infos:
        return
    expected = tower_info(core, args)
    for flag, info in infos.items():
        if different := info.differences(expected):
            raise ValueError(
                f"{flag} {specs[flag]}: features of another image tower ({', '.join(different)} differ): "
                f"{info.model}'s, in {info.precision}; give the model and weights used with --extract-image-features"
            )
    trained = [name for name, parameter in core.visual.named_parameters() if parameter.requires_grad]
    if trained and linear_head(core.visual) is None:
        raise ValueError(
            f"--model {args.model}: --lock-image leaves {trained[0]} trainable, but cached features bypass it; train "
            'on images, or set "timm_proj": "linear" in the model\'s vision_cfg'
        )
