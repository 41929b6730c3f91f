"""The training loop: epochs of steps with evaluations and checkpoints in between; it can be stopped at any step."""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from training.data.loader import TrainBatch, to_device
from training.data.open import TrainData
from training.eval.encode import ComputeOptions, Encoder
from training.eval.retrieval import RetrievalWork
from training.model.assembly.factory import EncoderParts
from training.runtime.arithmetic import get_random_state, set_random_state
from training.runtime.distributed import DistEnv, gather_objects, on_main_rank
from training.runtime.processes import EXIT_STOPPED, SIGNALS, StoppedError
from training.runtime.tracking import Tracker
from training.runtime.watchdog import COPYING, EVALUATING, SAVING, STEPPING, WAITING, Watchdog
from training.runtime.workers import PREFETCH
from training.train.checkpoint import CHECKPOINTS, LATEST, CheckpointWriter, remove_old_checkpoints
from training.train.remote import RemoteCopy
from training.train.resume import AVERAGE, LOSS, Division, Progress
from training.train.step import Stepper
from training.train.step_log import StepFlags, StepLog, StepProfile
from training.train.validate import evaluate_benchmarks, shown, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Result of rank 0's checks before data are opened and the model is built; the same on every rank."""

    folder: Path
    resume: Path | None
    work: RetrievalWork | None


class EpochBatches:
    """The remaining batches of an epoch. Its loader processes start at once, without changing this process's state.

    Args:
        data: training data.
        progress: progress at which the batches begin.
        seed: seed of this process for the steps of this epoch.
        device: device of the batches.
    """

    def __init__(self, data: TrainData, progress: Progress, seed: int, device: torch.device):
        self.progress, self.seed, self.device = progress, seed, device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # unlike torch.manual_seed, leaves GPUs alone
            pin = device.type == "cuda"
            self.batches = iter(data.loader(progress.epoch, progress.share, pin, step=progress.step))
            self.random_state = torch.get_rng_state()  # creating a loader draws a random number

    def begin(self) -> Iterator[tuple[TrainBatch, dict[str, object]]]:
        """Sets the random state of the epoch's steps; returns the batches, with their inputs on the device."""
        torch.manual_seed(self.seed)
        torch.set_rng_state(self.random_state)
        if self.progress.random_state:
            set_random_state(self.progress.random_state)
            self.progress.random_state = None
        return to_device(self.batches, self.device)


@dataclass
class Trainer:
    """Trains from the start of a run to the end of its last epoch.

    Attributes:
        args: flags.
        plan: folder, checkpoint and benchmarks.
        env: this process.
        watchdog: the running watchdog of this process.
        train, val: training and validation data.
        val_loss: the loss, for a single process with the whole batch.
        parts: model, transforms and tokenizer.
        stepper: computes steps.
        schedule: step -> learning rate.
        division: how an epoch is divided into steps and batches.
        progress: progress from which training starts; then, the current one.
        tracker: writes metrics; None on other ranks than 0, like the next two.
        remote, profile: copies to ``--remote-sync``, and records steps for ``--profile``; None without these flags.
    """

    args: argparse.Namespace
    plan: Plan
    env: DistEnv
    watchdog: Watchdog
    train: TrainData
    val: TrainData | None
    val_loss: Callable
    parts: EncoderParts
    stepper: Stepper
    schedule: Callable[[int], float]
    division: Division
    progress: Progress
    tracker: Tracker | None = None
    remote: RemoteCopy | None = None
    profile: StepProfile | None = None

    def __post_init__(self) -> None:
        args = self.args
        self.folder = self.plan.folder / CHECKPOINTS
        self.writer = CheckpointWriter(self.folder, self.plan.resume)  # only used on rank 0
        self.next_epoch: EpochBatches | None = None
        self.num_prefetched = PREFETCH * args.workers // args.accum_freq  # in steps
        self.save_is_due, self.saved_at = False, time.monotonic()
        lag = 1 if self.env.device.type == "cuda" else 0
        per_epoch, most = self.division.steps_per_epoch, args.max_skipped_steps
        self.flags = StepFlags(self.plan.folder, self.env.rank, lag, per_epoch, most, self.writer)

    def run(self) -> int:
        """Trains.

        Returns:
            Exit code: 0, or `EXIT_STOPPED` if a rank received a signal; the state has been saved.

        Raises:
            SaveError: the last checkpoint could not be written.
            FloatingPointError: loss or gradient was not finite too many times in a row, or an evaluation returned NaN.
            TooManyBadSamplesError: there are more bad samples than ``--max-bad-samples`` allows.
            NoUsableSampleError: this rank's loader found no usable sample; raised only on this rank.
        """
        SIGNALS.defer()
        code = 0
        with ExitStack() as stack:
            if self.env.is_main:
                self._introduce(stack)
            per_epoch, totals = self.division.steps_per_epoch, self.progress.totals
            self.log = StepLog(self.env, self.tracker, totals, self.args, per_epoch)
            try:
                while self.progress.epoch < self.args.epochs:
                    self._train_epoch()
                    self._end_epoch()
                end = f"done: {self.plan.folder}; {self.progress.totals.describe()}"
            except StoppedError as stop:
                code, end = EXIT_STOPPED, f"{stop}; continue with --name {self.plan.folder.name} --resume latest"
            # All ranks wait, because the first rank that exits may make the others fail.
            on_main_rank(self.writer.finish, self.env)
            self.watchdog.at(self.progress.step, COPYING)
            if self.env.is_main:
                logger.info(end)
        return code

    def _introduce(self, stack: ExitStack) -> None:
        """Starts the tasks of rank 0, and logs what is trained."""
        args, plan = self.args, self.plan
        if args.remote_sync:  # entered first, so that the last copy is made after everything else has been written
            self.remote = stack.enter_context(RemoteCopy(args, plan.folder))
        self.tracker = Tracker(plan.folder, args.report_to, vars(args), self.progress.step)
        stack.callback(self.tracker.close)
        if args.profile:
            self.profile = stack.enter_context(StepProfile(Path(args.profile), self.env.device))
        trained = sum(p.numel() for group in self.stepper.optimizer.param_groups for p in group["params"])
        everything = sum(p.numel() for p in self.parts.model.parameters())
        per_step = args.batch_size * args.accum_freq * self.env.world_size
        logger.info(
            f"{args.model}: training {trained / 1e6:,.1f}M of {everything / 1e6:,.1f}M parameters on "
            f"{self.env.world_size} x {self.env.device.type}; {self.train.source.num_samples:,} samples, an epoch has "
            f"{self.division.steps_per_epoch:,} steps of {per_step:,} samples"
        )

    def _train_epoch(self) -> None:
        """Takes the remaining steps of the current epoch, the same number on every rank.

        Raises:
            StoppedError: see `run`.
        """
        progress, stepper, log = self.progress, self.stepper, self.log
        batches = (self.next_epoch or self._open_epoch(progress)).begin()
        self.next_epoch = None
        stepper.model.train()
        last_step = (progress.epoch + 1) * self.division.steps_per_epoch
        with log.epoch(progress.step):
            for number in range(progress.step + 1, last_step + 1):
                self.watchdog.at(number, WAITING)
                with log.waiting():
                    micro_batches = [next(batches) for _ in range(self.args.accum_freq)]
                if last_step - number <= self.num_prefetched and self.next_epoch is None:
                    # The processes of this epoch have read their last batch.
                    upcoming = progress.next_epoch(self.division)
                    self.next_epoch = self._open_epoch(upcoming) if upcoming.epoch < self.args.epochs else None
                self.watchdog.at(number, STEPPING)

                lr = self.schedule(progress.step)
                output, others = stepper.forward([inputs for _, inputs in micro_batches])
                terms = stepper.compute_loss(output, others)
                stepper.backward(terms)
                norm, flags = stepper.update(terms, self._requests(number, last_step))
                progress.advance([batch.position for batch, _ in micro_batches])

                keys = [log.add_batch(batch) for batch, _ in micro_batches]
                log.add_step(number, stepper.report(output, terms, norm, flags), lr)
                stop, save = self.flags.add(number, flags, sum(keys, []))

                if save or stop:
                    self._save([f"step_{number}.pt"])
                if stop:
                    raise StoppedError(f"stopped after step {number:,} by a signal")
                if self.profile:
                    self.profile.step()

    def _requests(self, number: int, last_step: int) -> tuple[bool, bool]:
        """Whether this rank asks all ranks to stop, because of a signal, and to save, because it is due.

        Only rank 0 asks to save. As the ranks read the requests `lag` steps late, it asks as much earlier.
        """
        args, lag = self.args, self.flags.lag
        by_steps = args.save_every_steps and (number + lag) % args.save_every_steps == 0
        by_time = args.save_every_minutes and time.monotonic() - self.saved_at >= 60 * args.save_every_minutes
        self.save_is_due = bool(self.save_is_due or by_steps or by_time)
        # After the last step of an epoch, `_end_epoch` saves.
        asks = self.env.is_main and self.save_is_due and number + lag < last_step and not self.writer.is_busy
        if asks:
            self.save_is_due, self.saved_at = False, time.monotonic()
        return SIGNALS.name is not None, asks

    def _open_epoch(self, progress: Progress) -> EpochBatches:
        # Dropout differs between ranks.
        seed = self.args.seed * 1_000_003 + progress.epoch * self.env.world_size + self.env.rank
        return EpochBatches(self.train, progress, seed, self.env.device)

    def _end_epoch(self) -> None:
        """Evaluates and saves if due after this epoch, and advances to the next epoch."""
        args, done = self.args, self.progress.epoch + 1
        is_last = done == args.epochs

        def due(frequency: int) -> bool:
            return frequency > 0 and (done % frequency == 0 or is_last)

        val = self.val if due(args.val_frequency) else None
        work = self.plan.work if due(args.zeroshot_frequency) else None
        is_saving = bool(args.save_every_steps or args.save_every_minutes)
        if (val or work) and is_saving:
            self._save([f"step_{self.progress.step}.pt"])  # save first, so a crash while evaluating loses nothing
        try:
            with self.stepper.averaged():
                self._evaluate(done, val, work)
        except StoppedError as stop:
            if not is_saving:
                self._save([f"step_{self.progress.step}.pt"])
            raise StoppedError(f"{stop} while evaluating after epoch {done}; resuming repeats the evaluation") from stop
        self.progress = self.progress.next_epoch(self.division)
        names = [f"epoch_{done}.pt"] if due(args.save_frequency) or is_last else []
        names += [LATEST] if args.save_most_recent else []
        if names:
            self._save(names)

    def _evaluate(self, done: int, val: TrainData | None, work: RetrievalWork | None) -> None:
        env = self.env
        self.watchdog.at(self.progress.step, EVALUATING)
        self.stepper.model.eval()
        metrics: dict[str, object] = {}
        if val:
            # The ranks' numbers of batches differ, so DDP does not encode them.
            model = getattr(self.stepper.model, "module", self.stepper.model)
            result = validate(val, self.val_loss, self.args.batch_size, model, self.stepper.autocast, env)
            metrics |= {f"val/{name}": value for name, value in result.items()}
            if env.is_main:
                numbers = ", ".join(f"{name} {shown(value)}" for name, value in result.items())
                logger.info(f"validation after epoch {done}: {numbers}")
        if work:
            totals: dict[str, object] = {"train_samples": self.progress.totals.to_dict()}
            encoder = Encoder(self.parts, env, ComputeOptions.from_flags(self.args, allow_broken=True))
            metrics |= evaluate_benchmarks(encoder, work, self.args, self.folder, done, totals)
        if self.tracker and metrics:
            self.tracker.log(self.progress.step, metrics)

    def _save(self, names: list[str]) -> None:
        """Passes all ranks' state to the writer; training continues as soon as the state is copied."""
        self.watchdog.at(self.progress.step, SAVING)
        self.save_is_due, self.saved_at = False, time.monotonic()
        of_rank = {"slots_done": self.progress.share.slots_done, "random_state": get_random_state()}
        states = gather_objects(of_rank | {"totals": self.log.new}, self.env)
        if not self.env.is_main:
            return
        stepper = self.stepper
        content = {
            **self.progress.to_content(states, self.division),
            "name": self.plan.folder.name,
            "state_dict": stepper.core.state_dict(),
            "optimizer": stepper.optimizer.state_dict(),
        }
        if isinstance(stepper.loss, torch.nn.Module) and (of_loss := stepper.loss.state_dict()):
            content[LOSS] = of_loss
        if stepper.average is not None:
            content[AVERAGE] = stepper.average.module.state_dict()
        if stepper.scaler:  # open_clip's trainer would try to load None
            content["scaler"] = stepper.scaler.state_dict()
        keep_steps = 0 if self.progress.epoch == self.args.epochs else self.args.keep_checkpoints

        def afterwards() -> None:
            remove_old_checkpoints(self.folder, keep_steps, self.args.delete_previous_checkpoint)
            if self.remote:
                self.remote.poked.set()  # copies at once

        self.writer.submit(content, names, afterwards)
