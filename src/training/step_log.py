"""What is said of training every few steps: loss, speed, waiting, padding, skipped samples, time left."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from training.data.loader import FAULT_KINDS, TrainBatch
from training.distributed import DistEnv, sum_over_ranks
from training.tracking import Tracker

EXAMPLES_PER_KIND = 3
logger = logging.getLogger(__name__)


class StepLog:
    """Collects numbers on every rank, sums them over ranks every `every` steps, writes them on rank 0.

    Loss terms stay on the device between two lines, so that no step waits for them.

    Args:
        env: this process.
        tracker: of rank 0; None elsewhere.
        every: steps from line to line.
        total_steps: of the whole training.
        steps_per_epoch: to say which epoch it is.
    """

    def __init__(self, env: DistEnv, tracker: Tracker | None, every: int, total_steps: int, steps_per_epoch: int):
        self.env, self.tracker, self.every = env, tracker, every
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.faults: Counter[str] = Counter()  # over all ranks, since the start
        self.own_faults: Counter[str] = Counter()  # this rank's, since the last line
        self.told: Counter[str] = Counter()
        self.bar: tqdm | None = None
        self._reset()

    def _reset(self) -> None:
        self.start = time.monotonic()
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = self.samples = self.tokens = self.slots = 0
        self.waited = 0.0
        self.own_faults.clear()

    @contextmanager
    def epoch(self, first_step: int) -> Iterator[None]:
        """Shows a bar on a terminal, and counts no time between epochs."""
        self._reset()
        with tqdm(
            desc="train",
            total=self.total_steps,
            initial=first_step,
            unit="step",
            disable=not (self.env.is_main and sys.stderr.isatty()),
            leave=False,
        ) as self.bar:
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for a batch."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def add_batch(self, batch: TrainBatch) -> None:
        """Counts a batch of this process; tells of the first faults of each kind."""
        self.samples += len(batch.keys)
        self.tokens += batch.num_tokens
        self.slots += batch.short_ids.numel() + (batch.long_ids.numel() if batch.long_ids.shape[1] else 0)
        for kind, name in batch.faults:
            self.own_faults[kind] += 1
            self.told[kind] += 1
            if self.told[kind] <= EXAMPLES_PER_KIND:
                more = "; further ones are counted only" if self.told[kind] == EXAMPLES_PER_KIND else ""
                logger.warning(f"skipped sample, {kind}: {name}{more}")

    def add_step(self, step: int, report: dict[str, torch.Tensor], lr: float) -> None:
        """Takes a step's numbers (`step` counts those done); every few steps, and at the last, says them."""
        for name, value in report.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.steps += 1
        self.bar.update()
        if step % self.every == 0 or step % self.steps_per_epoch == 0:
            self._say(step, lr)
            self._reset()

    def _say(self, step: int, lr: float) -> None:
        metrics = self._reduce()
        seconds = time.monotonic() - self.start
        left = (self.total_steps - step) * seconds / self.steps
        metrics |= {
            "epoch": step / self.steps_per_epoch,
            "lr": lr,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
            "padding_share": 1 - self.tokens / max(self.slots, 1),
            "skipped": sum(self.faults.values()),
            "skipped_by_kind": dict(self.faults),
            "eta_s": round(left, 1),
        }
        if self.tracker:
            self.tracker.log(step, {f"train/{name}": value for name, value in metrics.items()})
            logger.info(self._line(step, metrics))

    def _reduce(self) -> dict[str, float]:
        """Means of the report's entries over steps and ranks; adds all ranks' faults to the totals."""
        # The one place where training waits for the device.
        own = torch.stack([value.float() for value in self.sums.values()]).cpu().double() / self.steps
        counts = torch.tensor([self.own_faults[kind] for kind in FAULT_KINDS], dtype=torch.float64)
        total = sum_over_ranks(torch.cat([own, counts]), self.env)
        means = total[: len(own)] / self.env.world_size
        for kind, count in zip(FAULT_KINDS, total[len(own) :].tolist()):
            if count:
                self.faults[kind] += int(count)
        return dict(zip(self.sums, means.tolist()))

    def _line(self, step: int, m: dict) -> str:
        terms = ", ".join(f"{name.removesuffix('_loss')} {m[name]:.4f}" for name in m if name.endswith("_loss"))
        per = "GPU" if self.env.device.type == "cuda" else "process"
        parts = [
            f"epoch {m['epoch']:.2f} step {step:,}/{self.total_steps:,}",
            f"loss {m['loss']:.4f} ({terms})",
            f"lr {m['lr']:.3g}",
            f"logit scale {m['logit_scale']:.2f}",
            f"grad norm {m['grad_norm']:.3g}",
            f"{m['samples_per_s']:,.0f} samples/s, {m['tokens_per_s']:,.0f} tokens/s per {per}",
            f"data wait {m['data_wait_share']:.0%}",
            f"padding {m['padding_share']:.0%}",
            f"ETA {format_eta(m['eta_s'])}",
        ]
        if m["skipped"]:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in m["skipped_by_kind"].items())
            parts.insert(-1, f"skipped {m['skipped']:,} ({kinds})")
        return " | ".join(parts)


def format_eta(seconds: float) -> str:
    """``3725`` -> ``1:02:05``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
