"""The loop of a training: epochs of steps, with evaluations and checkpoints in between; it can be left at any step."""

import argparse
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from training.data.batch import TrainBatch, to_device
from training.data.open import TrainData
from training.eval.retrieval import RetrievalWork
from training.model.factory import EncoderParts
from training.runtime.control import Control
from training.runtime.distributed import DistEnv, agree
from training.runtime.stop import SIGNALS, StoppedError
from training.runtime.tracking import Tracker
from training.runtime.watchdog import COPYING, EVALUATING, SAVING, Watchdog
from training.train.checkpoint import CHECKPOINTS, LATEST, CheckpointWriter, remove_old_checkpoints
from training.train.flops import ModelFlops
from training.train.nonfinite import StepGuard
from training.train.profile import StepProfile
from training.train.remote import RemoteCopy
from training.train.resume import Division, Progress, get_random_state, set_random_state
from training.train.step import Stepper
from training.train.step_log import StepLog
from training.train.supervision import Supervision
from training.train.validate import ValidationSet, evaluate_benchmarks, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What rank 0 has checked before data are opened and a model is built; the same on every rank."""

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
        division: how an epoch is divided.
        start: where to begin.
        flops: what a step computes, on a GPU whose peak is known.
    """

    train: TrainData
    val: ValidationSet | None
    parts: EncoderParts
    stepper: Stepper
    schedule: Callable[[int], float]
    division: Division
    start: Progress
    flops: ModelFlops | None = None


class Observers(NamedTuple):
    """What rank 0 does beside training; all None on the other ranks.

    Attributes:
        tracker: writes metrics.
        remote: copies checkpoints and logs to ``--remote-sync``, if asked for.
        profile: records a few steps for ``--profile``, if asked for.
    """

    tracker: Tracker | None = None
    remote: RemoteCopy | None = None
    profile: StepProfile | None = None


class Trainer:
    """Takes a run from its start to the last epoch's end.

    Args:
        args: flags.
        plan: name, folder and benchmarks.
        run: data, model and where to begin.
        observers: of this process.
        watchdog: of this process, running.
        env: this process.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        run: Run,
        observers: Observers,
        watchdog: Watchdog,
        env: DistEnv,
    ):
        self.args, self.plan, self.built, self.env = args, plan, run, env
        self.tracker, self.remote, profile = observers
        self.progress = run.start
        self.folder = plan.folder / CHECKPOINTS
        self.writer = CheckpointWriter(self.folder, plan.resume)  # rank 0's is the one that writes
        self.control = Control(env, args.save_every_steps, args.save_every_minutes)
        self.watchdog = watchdog
        self.saved_step: int | None = None
        guard = StepGuard(plan.folder, env.rank, args.max_skipped_steps, lambda: self.writer.last_good)
        per_epoch = run.division.steps_per_epoch
        self.log = StepLog(
            env, self.tracker, run.start.totals, args.log_every_n_steps, per_epoch * args.epochs, per_epoch,
            args.max_bad_samples, run.flops,
        )  # fmt: skip
        self.supervision = Supervision(watchdog, self.control, self.log, guard, profile)

    def run(self) -> None:
        """Trains.

        Raises:
            StoppedError: a signal came to some rank; the state is saved.
            SaveError: at the end the last checkpoint could not be written.
            FloatingPointError: loss or gradient was not finite too many times in a row, or an evaluation gave NaN.
            TooManyBadSamplesError: more bad samples than ``--max-bad-samples`` allows.
            NoUsableSampleError: this rank's loader found no usable sample; raised on this rank alone.
        """
        SIGNALS.only_note()
        self._introduce()
        try:
            while self.progress.epoch < self.args.epochs:
                self._train_epoch()
                self._end_epoch()
        except StoppedError:
            self._leave()
            raise
        self._leave()
        if self.env.is_main:
            logger.info(f"done: {self.plan.folder}; {self.progress.totals.describe()}")

    def _leave(self) -> None:
        """All leave together: whoever ends first may take others along."""
        agree(self.writer.finish, self.env)
        self.watchdog.at(self.progress.step, COPYING)

    def _introduce(self) -> None:
        args, run, env = self.args, self.built, self.env
        if not env.is_main:
            return
        trained = sum(p.numel() for group in run.stepper.optimizer.param_groups for p in group["params"])
        everything = sum(p.numel() for p in run.parts.model.parameters())
        per_step = args.batch_size * args.accum_freq * env.world_size
        logger.info(
            f"{args.model}: {trained / 1e6:,.1f}M of {everything / 1e6:,.1f}M parameters are trained on "
            f"{env.world_size} x {env.device.type}; an epoch is {run.division.steps_per_epoch:,} steps of "
            f"{per_step:,} samples, of {run.train.source.num_samples:,} there are"
        )

    def _train_epoch(self) -> None:
        """Steps through what is left of the running epoch; as many steps on every rank.

        Raises:
            StoppedError: as `run`.
        """
        args, run, progress = self.args, self.built, self.progress
        batches = self._start_loader()
        steps_left = (progress.share.num_batches - progress.batches_done) // args.accum_freq
        with self.supervision.epoch(progress.step):
            while steps_left:
                steps_left -= 1
                with self.supervision.step(progress.step + 1) as step:
                    # After an epoch's last step `_end_epoch` saves.
                    can_save = steps_left > 0 and not self.writer.is_busy
                    inputs = step.take(batches, args.accum_freq, can_save)
                    step.lr = run.schedule(progress.step)
                    step.report = run.stepper(inputs)
                    progress.advance(step.positions)
                if step.stop or step.save:
                    self._save([f"step_{progress.step}.pt"])
                if step.stop:
                    raise StoppedError(f"stopped after step {progress.step:,} by a signal")

    def _start_loader(self) -> Iterator[tuple[TrainBatch, dict[str, object]]]:
        """Returns the batches left in the running epoch, on the device; sets the random streams of its steps."""
        run, env, progress = self.built, self.env, self.progress
        # Dropout differs from rank to rank.
        torch.manual_seed(self.args.seed * 1_000_003 + progress.epoch * env.world_size + env.rank)
        run.stepper.model.train()
        batches = iter(run.train.loader(progress.epoch, progress.share, pin=env.device.type == "cuda"))
        if progress.random_state:  # to begin with a loader draws a number, too
            set_random_state(progress.random_state)
            progress.random_state = None
        return to_device(batches, env.device)

    def _end_epoch(self) -> None:
        """Evaluates and saves what is due after an epoch, and moves on to the next."""
        args, done = self.args, self.progress.epoch + 1
        is_last = done == args.epochs

        def due(frequency: int) -> bool:
            return frequency > 0 and (done % frequency == 0 or is_last)

        validates = self.built.val is not None and due(args.val_frequency)
        retrieves = self.plan.work is not None and due(args.zeroshot_frequency)
        is_saving = bool(args.save_every_steps or args.save_every_minutes)
        if (validates or retrieves) and is_saving:
            self._save([f"step_{self.progress.step}.pt"])  # save first, so a crash while evaluating loses nothing
        try:
            self._evaluate(done, validates, retrieves)
        except StoppedError as stop:
            if self.saved_step != self.progress.step:
                self._save([f"step_{self.progress.step}.pt"])
            raise StoppedError(f"{stop} while evaluating after epoch {done}; resuming repeats the evaluation") from stop
        self.progress = self.progress.next_epoch(self.built.division, self.env)
        names = [f"epoch_{done}.pt"] if due(args.save_frequency) or is_last else []
        names += [LATEST] if args.save_most_recent else []
        if names:
            self._save(names)

    def _evaluate(self, done: int, validates: bool, retrieves: bool) -> None:
        run, env = self.built, self.env
        self.watchdog.at(self.progress.step, EVALUATING)
        run.stepper.model.eval()
        metrics = {}
        if validates:
            model = getattr(run.stepper.model, "module", run.stepper.model)
            check = self.control.raise_if_stopped
            result = validate(run.val, model, run.stepper.autocast, env, check)
            metrics |= {f"val/{name}": value for name, value in result.items()}
            if env.is_main:
                shown = ", ".join(f"{n} {v:.4f}" if isinstance(v, float) else f"{n} {v:,}" for n, v in result.items())
                logger.info(f"validation after epoch {done}: {shown}")
        if retrieves:
            totals = {"train_samples": self.progress.totals.to_dict()}
            metrics |= evaluate_benchmarks(run.parts, self.plan.work, self.args, self.folder, done, env, totals)
        if self.tracker and metrics:
            self.tracker.log(self.progress.step, metrics)

    def _save(self, names: list[str]) -> None:
        """Hands all ranks' state to the writer; training continues as soon as it is copied."""
        self.watchdog.at(self.progress.step, SAVING)
        self.control.saved()
        self.saved_step = self.progress.step
        own = {
            "slots_done": list(self.progress.slots_done),
            "random_state": get_random_state(),
            "totals": self.log.pending(),
        }
        everyone = self.control.gather(own)
        if not self.env.is_main:
            return
        stepper = self.built.stepper
        content = {
            **self.progress.to_content(everyone, self.built.division, self.env),
            "name": self.plan.name,
            "state_dict": stepper.core.state_dict(),
            "optimizer": stepper.optimizer.state_dict(),
        }
        if stepper.scaler:  # open_clip's trainer loads whatever is under the name
            content["scaler"] = stepper.scaler.state_dict()
        args = self.args
        keep_steps = 0 if self.progress.epoch == args.epochs else args.keep_checkpoints
        only_last = args.delete_previous_checkpoint

        def afterwards() -> None:
            remove_old_checkpoints(self.folder, keep_steps, only_last)
            if self.remote:
                self.remote.poke()

        self.writer.submit(content, names, afterwards)
