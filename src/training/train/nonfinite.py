"""Counts, records and limits steps that were skipped because loss or gradient was not finite."""

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MAX_RECORDS = 100


class _Pending(NamedTuple):
    step: int
    skipped: torch.Tensor
    copied: torch.cuda.Event | None
    keys: list[str]


class StepGuard:
    """Monitors skipped steps. On a GPU, the check lags one step behind, so that no step waits for the previous one.

    Args:
        folder: LOGS/NAME; samples of skipped steps are written to ``skipped_steps_rankR.jsonl`` in this folder.
        rank: rank of this process.
        max_in_a_row: maximum number of consecutive skipped steps.
        last_good: returns the last good checkpoint, for the message.
    """

    def __init__(self, folder: Path, rank: int, max_in_a_row: int, last_good: Callable[[], Path | None]):
        self.path = folder / f"skipped_steps_rank{rank}.jsonl"
        self.max_in_a_row, self.last_good = max_in_a_row, last_good
        self.pending: deque[_Pending] = deque()
        self.in_a_row = self.total = 0

    def add(self, step: int, skipped: torch.Tensor, keys: list[str]) -> None:
        """Adds a step: its flag, which is the same on all ranks, and the keys of its samples.

        Raises:
            FloatingPointError: too many consecutive steps were skipped.
        """
        copied = None
        if skipped.is_cuda:
            copied = torch.cuda.Event()
            skipped = skipped.to("cpu", non_blocking=True)
            copied.record()
        self.pending.append(_Pending(step, skipped, copied, keys))
        while len(self.pending) > (1 if copied else 0):
            self._settle(self.pending.popleft())

    def finish(self) -> None:
        """Checks the remaining steps; raises like `add`."""
        while self.pending:
            self._settle(self.pending.popleft())

    def _settle(self, pending: _Pending) -> None:
        if pending.copied is not None:
            pending.copied.synchronize()
        if not pending.skipped:
            self.in_a_row = 0
            return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.total <= MAX_RECORDS:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": pending.step, "keys": pending.keys}) + "\n")
        if self.in_a_row > self.max_in_a_row:
            raise FloatingPointError(
                f"step {pending.step:,}: loss or gradient not finite for {self.in_a_row} steps in a row "
                f"(--max-skipped-steps {self.max_in_a_row}); last good checkpoint: {self.last_good() or 'none'}; "
                f"samples of these steps: {self.path.parent}/skipped_steps_rank*.jsonl"
            )
