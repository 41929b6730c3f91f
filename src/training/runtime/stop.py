"""What all ranks must agree on after each step: whether to stop, because a signal came to one, and whether to save."""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from training.runtime.distributed import DistEnv

EXIT_STOPPED = 75  # sysexits.h: try again later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM preempts with the first, and warns with the second


class StoppedError(RuntimeError):
    """Training was asked to stop by a signal, and has saved where it is."""


class Control:
    """Collects wishes to stop (any rank's) and to save (rank 0's), one exchange a step, while the step computes.

    A context manager: SIGTERM and SIGUSR1 only leave a note inside it.

    Args:
        env: this process.
        every_steps, every_minutes: when to save; 0 is never.
    """

    def __init__(self, env: DistEnv, every_steps: int, every_minutes: float):
        self.env, self.every_steps, self.every_minutes = env, every_steps, every_minutes
        self.group = dist.new_group(backend="gloo") if env.world_size > 1 else None  # the CPU's own: no GPU waits
        self.flags = torch.zeros(2, dtype=torch.int32)  # one tensor for all exchanges: see distributed()
        self.work: dist.Work | None = None
        self.signal: str | None = None
        self.is_owed = False
        self.saved_at = time.monotonic()
        self.previous: dict = {}

    def __enter__(self) -> "Control":
        self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    def start(self, step: int, can_save: bool) -> None:
        """Begins the exchange of step number `step` (counted from 1).

        Args:
            step: about to be taken.
            can_save: a save that is due is put off until then; rank 0's word counts.
        """
        if self.every_steps and step % self.every_steps == 0:
            self.is_owed = True
        if self.every_minutes and time.monotonic() - self.saved_at >= 60 * self.every_minutes:
            self.is_owed = True
        self.flags[0] = self.signal is not None
        self.flags[1] = self.env.is_main and self.is_owed and can_save
        if self.group is not None:
            self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def finish(self) -> tuple[bool, bool]:
        """Ends it; returns (stop, save), the same on all ranks."""
        if self.work is not None:
            self.work.wait()
        elif self.signal:
            self.flags[0] = 1
        stop, save = map(bool, self.flags.tolist())
        return stop, save

    def saved(self) -> None:
        """Takes note that a checkpoint is being written: the next one is due an interval from now."""
        self.is_owed, self.saved_at = False, time.monotonic()

    def gather(self, value: object) -> list | None:
        """Returns every rank's value on rank 0, None on the others."""
        if self.group is None:
            return [value]
        values = [None] * self.env.world_size if self.env.is_main else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values
