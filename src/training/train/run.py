"""Runs one training from start to end: check, open data, build, resume; then the training loop in loop.py."""

import argparse
import inspect
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from open_clip_train.precision import get_autocast
from timm.layers import convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel

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
from training.model.towers.compiling import compile_layers
from training.model.towers.corner import corner_indices
from training.model.towers.locking import linear_head
from training.model.towers.train_model import TrainModel
from training.readers.faults import TooManyBadSamplesError
from training.runtime.arithmetic import deterministic, tf32
from training.runtime.distributed import DistEnv, failing_with, on_main_rank
from training.runtime.experiment import Experiment, copy_experiment, experiment_of
from training.runtime.files import atomic_write
from training.runtime.lease import Lease
from training.runtime.tracking import check_reporters, log_to
from training.runtime.watchdog import BUILDING, OPENING, Watchdog, joined_ranks
from training.train.checkpoint import CHECKPOINTS, named_checkpoint, newest_checkpoint, saved_checkpoints
from training.train.extract import tower_info
from training.train.loop import Plan, Trainer
from training.train.losses import make_loss
from training.train.optim import make_schedule, optimizer_from_flags
from training.train.profile import count_model
from training.train.remote import RemoteCopy, RemoteError
from training.train.resume import LOSS, Division, Progress, changed_flags, restore, start_from
from training.train.step import Stepper

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
    core = parts.model
    if hasattr(core, "text_decoder"):
        raise ValueError(f"--model {args.model}: training of CoCa is not supported; use a two-tower model")
    if not any(p.requires_grad for name, p in core.named_parameters() if not name.startswith("logit_")):
        raise ValueError("--lock-image and --lock-text leave nothing to train; unlock layers or a tower")
    _check_features(args, core)
    flops = count_model(core, parts.tokenizer, env.device, args.precision, bool(feature_info(args.train_data)))
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
    data = open_train_data(args, parts.train_transform, parts.tokenizer, source, parts.arrange, experiment)
    val = val_source and open_train_data(args, parts.preprocess, parts.tokenizer, val_source, parts.arrange)
    val_loss = make_loss(args, num_corners(core), replace(env, rank=0, world_size=1))
    schedule = _schedule(args, optimizer, steps_per_epoch, env)
    return Trainer(args, plan, env, watchdog, data, val, val_loss, parts, stepper, schedule, division, start, flops)


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
    resume = named_checkpoint(args.resume) if args.resume not in (None, "latest") else None
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


def num_corners(core: torch.nn.Module) -> int:
    """Returns m of a model's text tower; 0 for a tower without corner tokens."""
    return getattr(getattr(core, "text", None), "num_corners", 0)


def wrap_model(args: argparse.Namespace, core: torch.nn.Module, kind: type[TrainModel] = TrainModel) -> TrainModel:
    """Returns both towers as one module that encodes batches of the texts that the flags describe."""
    corners, pixels = [entry.corners for entry in caption_rule(args).texts], core.visual.preprocess_cfg
    return kind(core, pixels["mean"], pixels["std"], corners)


def make_stepper(
    args: argparse.Namespace,
    core: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    env: DistEnv,
    experiment: Experiment | None = None,
) -> Stepper:
    """Builds the `Stepper`, and adds the parameters of an experiment's loss to the optimizer."""
    experiment = experiment or Experiment(args)
    if args.use_bn_sync and env.world_size > 1:
        convert_sync_batchnorm(core)  # timm's, which keeps the activations of its own batch norms
    with core.logit_scale.device:  # what an experiment creates is on the model's device
        average = experiment.make_average(core)
        whole = wrap_model(args, core, experiment.model_class(TrainModel))
        loss = experiment.make_loss(make_loss(args, num_corners(core), env), core)
    if isinstance(loss, torch.nn.Module):
        taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        of_loss = {n: p for n, p in loss.named_parameters(LOSS) if p.requires_grad}
        if own := {name: parameter for name, parameter in of_loss.items() if id(parameter) not in taken}:
            options = {"lr": args.lr, "lr_scale": 1.0, "weight_decay": 0.0, "param_names": list(own)}
            optimizer.add_param_group({"params": list(own.values()), **options})
        # `Stepper.backward` averages them over ranks, also those of parts of the model that only the loss calls.
        ids = {id(parameter) for parameter in of_loss.values()}
        shared = [name for name, parameter in whole.named_parameters() if id(parameter) in ids]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, shared)
    if args.torchcompile:
        compile_layers(core, only_images=args.torchcompile == "image")
    return experiment.stepper_class(Stepper)(
        model=_over_ranks(whole, env),
        core=core,
        loss=loss,
        optimizer=optimizer,
        autocast=get_autocast(args.precision, device_type=env.device.type),
        scaler=scaler,
        arithmetic=partial(tf32, env.device),
        max_norm=args.grad_clip_norm,
        locked_images=whole.encode_images if whole.image_is_locked else None,
        corners=corner_indices(whole.corners, num_corners(core)),
        average=average,
        env=env,
    )


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


def _check_features(args: argparse.Namespace, core: torch.nn.Module) -> None:
    """Raises ValueError if cached image features are not those of this model's tower, or if the tower is trained."""
    specs = {"--train-data": args.train_data, "--val-data": args.val_data}
    infos = {flag: info for flag, spec in specs.items() if spec and (info := feature_info(spec))}
    expected = tower_info(core, args) if infos else None  # called once, because it hashes all weights of the tower
    for flag, info in infos.items():
        if different := info.differences(expected):
            raise ValueError(
                f"{flag} {specs[flag]}: features of another image tower ({', '.join(different)} differ): "
                f"{info.model}'s, in {info.precision}; give the model and weights used with --extract-image-features"
            )
    trained = [name for name, parameter in core.visual.named_parameters() if parameter.requires_grad]
    if infos and trained and linear_head(core.visual) is None:
        raise ValueError(
            f"--model {args.model}: --lock-image leaves {trained[0]} trainable, but cached features bypass it; train "
            'on images, or set "timm_proj": "linear" in the model\'s vision_cfg'
        )


def _over_ranks(model: TrainModel, env: DistEnv) -> torch.nn.Module:
    if env.world_size == 1:
        return model
    ids = [env.device.index] if env.device.type == "cuda" else None
    # Buffers need no synchronisation, because all ranks have the same ones; the option's name depends on the version.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **buffers)
