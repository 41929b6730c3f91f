"""Supervision of steps: watchdog, log, check for non-finite steps, signals, and due saves."""

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
    """One supervised step; the caller has to set `lr` and `report`.

    Attributes:
        lr: base learning rate of the step.
        report: result of the `Stepper`.
        stop, save: set after the step: whether to stop and whether to save; the same on all ranks.
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
            batches: result of `data.batch.to_device`.
            count: number of micro-batches of the step.
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
        """Position after each micro-batch in its worker's share, see `TrainBatch.position`."""
        return [batch.position for batch in self.batches]

    @property
    def keys(self) -> list[str]:
        """Keys of the samples of the step."""
        return [key for batch in self.batches for key in batch.keys]


class Supervision:
    """Supervises the steps of this process.

    Args:
        watchdog: the running watchdog.
        control: exchanges requests to stop and to save.
        log: collects and logs metrics.
        guard: monitors skipped steps.
        profile: records a few steps; None does not profile.
    """

    def __init__(
        self, watchdog: Watchdog, control: Control, log: StepLog, guard: StepGuard, profile: StepProfile | None = None
    ):
        self.watchdog, self.control, self.log, self.guard, self.profile = watchdog, control, log, guard, profile

    @contextmanager
    def epoch(self, first_step: int) -> Iterator[None]:
        """Context of the steps of an epoch; raises like `StepGuard.finish`."""
        with self.log.epoch(first_step):
            yield
        self.guard.finish()

    @contextmanager
    def step(self, number: int) -> Iterator[SupervisedStep]:
        """Context of one step, numbered from 1.

        Raises:
            FloatingPointError, TooManyBadSamplesError: see `StepGuard.add` and `StepLog.add_step`; on all ranks.
        """
        self.watchdog.at(number, WAITING)
        step = SupervisedStep(self, number)
        yield step
        self.log.add_step(number, step.report, step.lr)
        self.guard.add(number, step.report["skipped_steps"], step.keys)
        step.stop, step.save = self.control.finish()
        if self.profile:
            self.profile.step()
