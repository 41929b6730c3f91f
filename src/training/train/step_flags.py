"""Reads the flags of steps: whether a step was skipped, and whether a rank asks to stop or to save."""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from training.runtime.files import append_line
from training.runtime.messages import or_warn
from training.train.checkpoint import CheckpointWriter

MAX_RECORDS = 100


@dataclass
class StepFlags:
    """Reads the flags of each step and acts on skipped ones. On a GPU one step late, so that no step waits for another.

    Attributes:
        folder: LOGS/NAME; samples of skipped steps are written to ``skipped_steps_rankR.jsonl`` in this folder.
        rank: rank of this process.
        lag: number of steps by which the flags are read late: 0 or 1.
        steps_per_epoch: number of steps of an epoch, at whose end nothing is read late.
        max_in_a_row: maximum number of consecutive skipped steps, whose loss or gradient was not finite.
        writer: its last good checkpoint is named in the message.
    """

    folder: Path
    rank: int
    lag: int
    steps_per_epoch: int
    max_in_a_row: int
    writer: CheckpointWriter

    def __post_init__(self) -> None:
        self.pending: deque[tuple[int, torch.Tensor, torch.cuda.Event | None, list[str]]] = deque()
        self.in_a_row = self.total = 0

    def add(self, step: int, flags: torch.Tensor, keys: list[str]) -> tuple[bool, bool]:
        """Adds a step; returns what the ranks ask for, as far as it is known yet.

        Args:
            step: number of the step, from 1.
            flags: [3] on the device, the same on all ranks: whether the step was skipped, whether to stop and to save.
            keys: keys of this rank's samples.

        Returns:
            Whether to stop, and whether to save; the same on all ranks.

        Raises:
            FloatingPointError: too many consecutive steps were skipped; raised on all ranks.
        """
        copied = None
        if flags.is_cuda:
            copied = torch.cuda.Event()
            flags = flags.to("cpu", non_blocking=True)
            copied.record()
        self.pending.append((step, flags, copied, keys))
        stop = save = False
        while len(self.pending) > (self.lag if step % self.steps_per_epoch else 0):
            step_read, flags, copied, keys = self.pending.popleft()
            if copied is not None:
                copied.synchronize()
            skipped, *asked = map(bool, flags.tolist())
            stop, save = map(max, (stop, save), asked)
            self._count(skipped, step_read, keys)
        return stop, save

    def _count(self, skipped: bool, step: int, keys: list[str]) -> None:
        if not skipped:
            self.in_a_row = 0
            return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.total <= MAX_RECORDS:
            path, line = self.folder / f"skipped_steps_rank{self.rank}.jsonl", json.dumps({"step": step, "keys": keys})
            or_warn(lambda: append_line(path, line), str(path))
        if self.in_a_row > self.max_in_a_row:
            raise FloatingPointError(
                f"step {step:,}: loss or gradient not finite for {self.in_a_row} steps in a row "
                f"(--max-skipped-steps {self.max_in_a_row}); last good checkpoint: {self.writer.last_good or 'none'}; "
                f"samples of these steps: {self.folder}/skipped_steps_rank*.jsonl"
            )
