"""Everything around a step that is not training: watchdog, log, non-finite guard, signals, and saves that are due."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from training.data.batch import TrainBatch
from training.runtime.control import Control
from training.runtime.watchdog import STEPPING, WAITING, Watchdog
from training.train.nonfinite import StepGuard
from training.train.profile import StepProfile
from training.train.step_log import StepLog


class SupervisedStep:
    """One step under supervision; whoever takes it sets `lr` and `report`.

    Attributes:
        lr: base learning rate of the step.
        report: what a `Stepper` returns.
        stop, save: after the step, what all ranks have to do; the same on every rank.
    """

    lr: float
    report: dict[str, torch.Tensor]
    stop = save = False

    def __init__(self, supervision: "Supervision", number: int):
        self.supervision, self.number = supervision, number
        self.batches: list[TrainBatch] = []

    def take(
        self, batches: Iterator[tuple[TrainBatch, dict[str, object]]], count: int, can_save: bool
    ) -> list[dict[str, object]]:
        """Waits for a step's micro-batches; returns the model's inputs for each, on the device.

        Args:
            batches: of `data.batch.to_device`.
            count: micro-batches of the step.
            can_save: False postpones a save that is due.
        """
        inputs = []
        for _ in range(count):
            with self.supervision.log.waiting(), record_function("wait for data"):
                batch, on_device = next(batches)
            self.supervision.log.add_batch(batch)
            self.batches.append(batch)
            inputs.append(on_device)
        self.supervision.watchdog.at(self.number, STEPPING)
        self.supervision.control.start(self.number, can_save)
        return inputs

    @property
    def positions(self) -> list[tuple[int, int]]:
        """Where each micro-batch ends in its worker's share."""
        return [batch.position for batch in self.batches]

    @property
    def keys(self) -> list[str]:
        """The samples of the step."""
        return [key for batch in self.batches for key in batch.keys]


class Supervision:
    """Supervises the steps of this process.

    Args:
        watchdog: running.
        control: what ranks agree on at each step.
        log: lines of numbers.
        guard: follows steps that were skipped.
        profile: records a few steps, if asked for.
    """

    def __init__(
        self, watchdog: Watchdog, control: Control, log: StepLog, guard: StepGuard, profile: StepProfile | None = None
    ):
        self.watchdog, self.control, self.log, self.guard, self.profile = watchdog, control, log, guard, profile

    @contextmanager
    def epoch(self, first_step: int) -> Iterator[None]:
        """Surrounds the steps of an epoch; raises as `StepGuard.finish`."""
        with self.log.epoch(first_step):
            yield
        self.guard.finish()

    @contextmanager
    def step(self, number: int) -> Iterator[SupervisedStep]:
        """Surrounds one step, counted from 1.

        Raises:
            FloatingPointError, TooManyBadSamplesError: on all ranks alike.
        """
        self.watchdog.at(number, WAITING)
        step = SupervisedStep(self, number)
        yield step
        self.log.add_step(number, step.report, step.lr)
        self.guard.add(number, step.report["skipped_steps"], step.keys)
        step.stop, step.save = self.control.finish()
        if self.profile:
            self.profile.step()
