"""Steps that were not taken because loss or gradient is not a number: counted, kept for inspection, limited."""

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
    """Follows which steps were skipped. On a GPU it looks one step late, so that no step waits for the one before.

    Args:
        folder: LOGS/NAME; the samples of a skipped step are written to ``skipped_steps_rankR.jsonl`` there.
        rank: this process.
        max_in_a_row: more skipped steps in a row raise.
        last_good: returns the checkpoint to return to, for the message.
    """

    def __init__(self, folder: Path, rank: int, max_in_a_row: int, last_good: Callable[[], Path | None]):
        self.path = folder / f"skipped_steps_rank{rank}.jsonl"
        self.max_in_a_row, self.last_good = max_in_a_row, last_good
        self.pending: deque[_Pending] = deque()
        self.in_a_row = self.total = 0

    def add(self, step: int, skipped: torch.Tensor, keys: list[str]) -> None:
        """Takes a step's flag, the same on all ranks, and its samples.

        Raises:
            FloatingPointError: too many skipped steps in a row.
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
        """Looks at what has not been looked at; raises as `add`."""
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
                f"step {pending.step:,}: loss or gradient is not finite for the {self.in_a_row}th time in a row "
                f"(--max-skipped-steps {self.max_in_a_row}); last good checkpoint: {self.last_good() or 'none'}; "
                f"the samples of these steps: {self.path.parent}/skipped_steps_rank*.jsonl"
            )
