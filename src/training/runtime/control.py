"""Lets all ranks agree at each step whether to stop, because a rank received a signal, and whether to save."""

import time

import torch
import torch.distributed as dist

from training.runtime.distributed import DistEnv
from training.runtime.stop import SIGNALS, StoppedError


class Control:
    """Exchanges requests to stop (from any rank, see `SIGNALS`) and to save (from rank 0) while a step is computing.

    Args:
        env: this process.
        every_steps, every_minutes: intervals between checkpoints; 0 disables the interval.
    """

    def __init__(self, env: DistEnv, every_steps: int, every_minutes: float):
        self.env, self.every_steps, self.every_minutes = env, every_steps, every_minutes
        self.group = dist.new_group(backend="gloo") if env.world_size > 1 else None  # on the CPU, so that no GPU waits
        self.flags = torch.zeros(2, dtype=torch.int32)  # reused for all exchanges, see distributed()
        self.work: dist.Work | None = None
        self.is_due = False
        self.saved_at = time.monotonic()

    def start(self, step: int, can_save: bool) -> None:
        """Starts the exchange for a step.

        Args:
            step: number of the step that is about to be taken, from 1.
            can_save: False postpones a save that is due; only rank 0's value counts.
        """
        if self.every_steps and step % self.every_steps == 0:
            self.is_due = True
        if self.every_minutes and time.monotonic() - self.saved_at >= 60 * self.every_minutes:
            self.is_due = True
        self.flags[0] = SIGNALS.name is not None
        self.flags[1] = self.env.is_main and self.is_due and can_save
        if self.group is not None:
            self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def finish(self) -> tuple[bool, bool]:
        """Finishes the exchange; returns (stop, save), the same on all ranks."""
        if self.work is not None:
            self.work.wait()
        elif SIGNALS.name:
            self.flags[0] = 1
        stop, save = map(bool, self.flags.tolist())
        return stop, save

    def raise_if_stopped(self) -> None:
        """Raises StoppedError on all ranks if a signal has been noted on any. All ranks must call it."""
        self.flags[0], self.flags[1] = SIGNALS.name is not None, 0
        if self.group is not None:
            dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group)
        if self.flags[0]:
            raise StoppedError("stopped by a signal")

    def saved(self) -> None:
        """Records that a checkpoint is being written; the next one is due one interval from now."""
        self.is_due, self.saved_at = False, time.monotonic()

    def gather(self, value: object) -> list | None:
        """Returns the values of all ranks on rank 0, and None on the other ranks."""
        if self.group is None:
            return [value]
        values = [None] * self.env.world_size if self.env.is_main else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values
