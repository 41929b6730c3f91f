"""One training, top to bottom: check, open data, build, resume, then epochs of steps, evaluations and checkpoints."""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch.nn.parallel import DistributedDataParallel

from dataloaders.images import BrokenImageError
from training.build import build_from_flags, check_precision
from training.checkpoint import find_checkpoint, load_checkpoint, numbered_checkpoints, save_checkpoint
from training.data.augment import parse_augmentation
from training.data.build import TrainData, caption_rule, open_source, open_train_data
from training.data.loader import NoUsableSampleError
from training.data.position import Stretch
from training.data.sources import Source
from training.distributed import DistEnv, agree, distributed, fail, together
from training.loss import LongCaptionLoss, LongCaptionSigLipLoss
from training.model.factory import EncoderParts
from training.model.source import resolve_weights
from training.optim import make_schedule, parameter_groups
from training.results import run_name
from training.retrieval import RetrievalWork, plan_retrieval, read_benchmarks
from training.step import Stepper
from training.step_log import StepLog
from training.tracking import Tracker, check_reporters, log_to
from training.train_model import TrainModel
from training.validate import ValidationSet, evaluate_benchmarks, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What rank 0 found out before data are opened and a model is built; the same on every rank."""

    name: str
    folder: Path
    resume: Path | None
    work: RetrievalWork | None


@dataclass(frozen=True)
class Run:
    """Everything that an epoch needs.

    Attributes:
        train, val: data.
        parts: model, transforms and tokenizer.
        stepper: model, loss and optimizer of a step.
        schedule: step -> learning rate.
        steps_per_epoch: optimizer steps.
        first_epoch: epochs that are done already.
    """

    train: TrainData
    val: ValidationSet | None
    parts: EncoderParts
    stepper: Stepper
    schedule: Callable[[int], float]
    steps_per_epoch: int
    first_epoch: int


def train(args: argparse.Namespace) -> int:
    """Trains as the flags say.

    Returns:
        Exit code: 0; 1 if data give out in mid-training or the model gives NaN; 2 if flags, files or weights are not
        what they should be.
    """
    with distributed(args.device) as env:
        try:
            plan = agree(lambda: _check(args, env), env)
            log_to(plan.folder if env.is_main else None)
            source, val_source = _open_sources(args, env)
            steps_per_epoch = _count_steps(args, source, env)
            run = together(lambda: _build(args, plan, source, val_source, steps_per_epoch, env), env)
        except (ValueError, OSError) as error:
            return fail(error, 2, env)
        tracker = None
        if env.is_main:
            first_step = run.first_epoch * steps_per_epoch
            tracker = Tracker(plan.folder, plan.name, args.report_to, vars(args), first_step)
        try:
            _run_epochs(args, plan, run, tracker, env)
        except (BrokenImageError, FloatingPointError) as error:  # on all ranks alike
            return fail(error, 1, env)
        except NoUsableSampleError as error:  # on this rank alone: leave without waiting for the others
            raise SystemExit(fail(ValueError(f"rank {env.rank}: {error}"), 1)) from error
        finally:
            if tracker:
                tracker.close()
    return 0


def _check(args: argparse.Namespace, env: DistEnv) -> Plan:
    """Everything that can be wrong with the command, apart from data and weights. Rank 0 only.

    Raises:
        ValueError, FileNotFoundError: the message says what is wrong and what to do.
    """
    check_precision(args.precision, env.device)
    check_reporters(args.report_to)
    parse_augmentation(args.aug_cfg)
    sets = read_benchmarks(args)
    work = plan_retrieval(sets, args.allow_missing) if sets else None
    resolve_weights(args.model, args.pretrained, args.cache_dir)
    name = args.name or run_name(args.model)
    folder = Path(args.logs) / name
    checkpoints = folder / "checkpoints"
    resume = find_checkpoint(args.resume, checkpoints) if args.resume else None
    if not args.resume and numbered_checkpoints(checkpoints):
        raise ValueError(f"--name {name}: {checkpoints} holds checkpoints; add --resume latest, or take another name")
    checkpoints.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(vars(args), indent=1) + "\n")
    return Plan(name, folder, resume, work)


def _open_sources(args: argparse.Namespace, env: DistEnv) -> tuple[Source, Source | None]:
    rule = caption_rule(args)
    source = open_source(args, "--train-data", args.train_data, rule, env, args.dataset_resampled)
    val = open_source(args, "--val-data", args.val_data, rule, env) if args.val_data else None
    return source, val


def _count_steps(args: argparse.Namespace, source: Source, env: DistEnv) -> int:
    """Optimizer steps of an epoch; the samples left over after the last whole one are other ones each epoch."""
    num_samples = args.train_num_samples or source.num_samples
    if num_samples > source.num_samples:
        raise ValueError(
            f"--train-num-samples {num_samples}: there are {source.num_samples:,} samples; leave it out, "
            "or add --dataset-resampled"
        )
    samples_per_step = args.batch_size * args.accum_freq * env.world_size
    if samples_per_step > num_samples:
        raise ValueError(
            f"--batch-size {args.batch_size} x --accum-freq {args.accum_freq} x {env.world_size} processes: a step "
            f"takes {samples_per_step:,} samples, an epoch has {num_samples:,}; lower --batch-size"
        )
    return num_samples // samples_per_step


def _build(
    args: argparse.Namespace, plan: Plan, source: Source, val_source: Source | None, steps_per_epoch: int, env: DistEnv
) -> Run:
    """Builds all that is needed, and puts a checkpoint's state into it."""
    parts = build_from_flags(args, env.device)
    core = parts.model
    if hasattr(core, "text_decoder"):
        raise ValueError(f"--model {args.model}: CoCa's captioning is not trained here; take a two-tower model")
    if not any(p.requires_grad for name, p in core.named_parameters() if not name.startswith("logit_")):
        raise ValueError("--lock-image and --lock-text leave nothing to train; unlock some layers or a tower")
    if args.grad_checkpointing:
        core.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(
        parameter_groups(core, args.lr, args.wd, args.image_lr, args.text_lr),
        betas=(args.beta1, args.beta2),
        eps=args.eps,
        fused=True,
    )
    scaler = torch.amp.GradScaler(env.device.type) if args.precision == "amp" else None
    first_epoch = _resume(plan.resume, core, optimizer, scaler, args.epochs) if plan.resume else 0
    stepper = Stepper(
        model=_wrap(core, args.torchcompile, env),
        core=core,
        loss=_make_loss(args, env),
        optimizer=optimizer,
        autocast=get_autocast(args.precision, device_type=env.device.type),
        scaler=scaler,
        max_norm=args.grad_clip_norm,
    )
    val = None
    if val_source:
        val_data = open_train_data(args, parts.preprocess, parts.tokenizer, val_source)
        val = ValidationSet.of(val_data, args.batch_size, env)
    schedule = make_schedule(optimizer, args.lr_scheduler, args.lr, args.warmup, steps_per_epoch * args.epochs)
    data = open_train_data(args, parts.train_transform, parts.tokenizer, source)
    return Run(data, val, parts, stepper, schedule, steps_per_epoch, first_epoch)


def _make_loss(args: argparse.Namespace, env: DistEnv) -> torch.nn.Module:
    kind = LongCaptionSigLipLoss if args.siglip else LongCaptionLoss
    weights = args.short_loss_weight, args.long_loss_weight
    return kind(*weights, args.local_loss, args.gather_with_grad, env.rank, env.world_size)


def _wrap(core: torch.nn.Module, compiled: bool, env: DistEnv) -> torch.nn.Module:
    model = TrainModel(core)
    if compiled:
        model.compile()
    if env.world_size > 1:
        ids = [env.device.index] if env.device.type == "cuda" else None
        # Each rank has the same buffers; locked parameters are none of DDP's business.
        model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model


def _resume(path: Path, core: torch.nn.Module, optimizer, scaler, num_epochs: int) -> int:
    """Puts a checkpoint's state into model, optimizer and scaler; returns how many epochs are done."""
    content = load_checkpoint(path)
    try:
        core.load_state_dict(content["state_dict"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--resume {path}: of another model or other locked parts than the flags ({reason})"
        ) from error
    if scaler and content.get("scaler"):
        scaler.load_state_dict(content["scaler"])
    if content["epoch"] >= num_epochs:
        logger.warning(f"{path} has finished all of --epochs {num_epochs}: nothing left to train")
    return content["epoch"]


def _run_epochs(args: argparse.Namespace, plan: Plan, run: Run, tracker: Tracker | None, env: DistEnv) -> None:
    total_steps = run.steps_per_epoch * args.epochs
    log = StepLog(env, tracker, args.log_every_n_steps, total_steps, run.steps_per_epoch)
    if env.is_main:
        _introduce(args, run, env)
    for epoch in range(run.first_epoch, args.epochs):
        _train_epoch(args, run, epoch, log, env)
        done = epoch + 1
        metrics = _evaluate(args, plan, run, done, env)
        if tracker:
            tracker.log(done * run.steps_per_epoch, metrics)
            _save(args, plan, run, done)
    if env.is_main:
        logger.info(f"done: {plan.folder}")


def _introduce(args: argparse.Namespace, run: Run, env: DistEnv) -> None:
    trained = sum(p.numel() for group in run.stepper.optimizer.param_groups for p in group["params"])
    everything = sum(p.numel() for p in run.parts.model.parameters())
    per_step = args.batch_size * args.accum_freq * env.world_size
    logger.info(
        f"{args.model}: {trained / 1e6:,.1f}M of {everything / 1e6:,.1f}M parameters are trained on {env.world_size} x "
        f"{env.device.type}; an epoch is {run.steps_per_epoch:,} steps of {per_step:,} samples, of "
        f"{run.train.source.num_samples:,} there are"
    )


def _train_epoch(args: argparse.Namespace, run: Run, epoch: int, log: StepLog, env: DistEnv) -> None:
    """Steps through one epoch: every rank takes `steps_per_epoch` x `accum_freq` batches."""
    # Dropout differs from rank to rank, and starts the same in a resumed run.
    torch.manual_seed(args.seed * 1_000_003 + epoch * env.world_size + env.rank)
    run.stepper.model.train()
    stretch = Stretch(args.batch_size, run.steps_per_epoch * args.accum_freq, env.rank, env.world_size)
    batches = iter(run.train.loader(epoch, stretch, pin=env.device.type == "cuda"))
    first_step = epoch * run.steps_per_epoch
    with log.epoch(first_step):
        for step in range(first_step, first_step + run.steps_per_epoch):
            lr = run.schedule(step)
            micro_batches = []
            for _ in range(args.accum_freq):
                with log.waiting():
                    batch = next(batches)
                log.add_batch(batch)
                micro_batches.append(batch.inputs(env.device, get_input_dtype(args.precision)))
            log.add_step(step + 1, run.stepper(micro_batches), lr)


def _evaluate(args: argparse.Namespace, plan: Plan, run: Run, done: int, env: DistEnv) -> dict[str, object]:
    """Evaluates what is due after epoch `done`; returns metrics by name."""

    def due(frequency: int) -> bool:
        return frequency > 0 and (done % frequency == 0 or done == args.epochs)

    metrics = {}
    run.stepper.model.eval()
    if run.val and due(args.val_frequency):
        model = getattr(run.stepper.model, "module", run.stepper.model)
        result = validate(run.val, model, run.stepper.loss, run.stepper.autocast, args.precision, env)
        metrics |= {f"val/{name}": value for name, value in result.items()}
        if env.is_main:
            shown = ", ".join(f"{n} {v:.4f}" if isinstance(v, float) else f"{n} {v:,}" for n, v in result.items())
            logger.info(f"validation after epoch {done}: {shown}")
    if plan.work and due(args.zeroshot_frequency):
        metrics |= evaluate_benchmarks(run.parts, plan.work, args, plan.folder / "checkpoints", done, env)
    return metrics


def _save(args: argparse.Namespace, plan: Plan, run: Run, done: int) -> None:
    due = done == args.epochs or (args.save_frequency > 0 and done % args.save_frequency == 0)
    scaler = run.stepper.scaler
    path = save_checkpoint(
        plan.folder / "checkpoints",
        {
            "epoch": done,
            "name": plan.name,
            "state_dict": run.stepper.core.state_dict(),
            "optimizer": run.stepper.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        },
        keep=due,
        most_recent=args.save_most_recent,
        delete_previous=args.delete_previous_checkpoint,
    )
    if path:
        logger.info(f"saved {path}")
