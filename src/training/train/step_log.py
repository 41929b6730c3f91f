"""What a training reads from its steps: flags that all ranks share, the log lines, and a profile of a few steps."""

import argparse
import json
import logging
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from tqdm import tqdm

from training.data.loader import TrainBatch
from training.readers.faults import FAULT_KINDS, TooManyBadSamplesError, Totals
from training.runtime.distributed import DistEnv, gather_objects
from training.runtime.files import append_line
from training.runtime.messages import or_warn
from training.runtime.tracking import Tracker
from training.train.checkpoint import CheckpointWriter

EXAMPLES_PER_KIND = 3
MAX_RECORDS = 100  # of skipped steps
FEW_SAMPLES = 1000  # the fraction of bad samples is checked only after this many samples
WARM_UP, RECORDED, ROWS = 10, 5, 10  # of a profile: steps before it, its steps, and the operations in its table
logger = logging.getLogger(__name__)


def log_bad_sample(kind: str, name: str, num_logged: Counter) -> None:
    """Logs the first bad samples of each kind.

    Args:
        kind: one of `FAULT_KINDS`.
        name: shard/key.
        num_logged: number of samples of each kind so far; one is added.
    """
    num_logged[kind] += 1
    if num_logged[kind] <= EXAMPLES_PER_KIND:
        more = "; further ones are counted only" if num_logged[kind] == EXAMPLES_PER_KIND else ""
        logger.warning(f"skipped sample, {kind}: {name}{more}")


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


@dataclass
class StepLog:
    """Collects metrics on every rank; reduces them every ``--log-every-n-steps`` steps, and writes them on rank 0.

    Loss terms stay on the device between two log lines, so that no step waits for them.

    Attributes:
        env: this process.
        tracker: writer of metrics on rank 0; None on the other ranks.
        totals: samples of all ranks since the start; updated at every log line.
        args: flags.
        steps_per_epoch: number of steps of an epoch.
    """

    env: DistEnv
    tracker: Tracker | None
    totals: Totals
    args: argparse.Namespace
    steps_per_epoch: int

    def __post_init__(self) -> None:
        self.total_steps = self.steps_per_epoch * self.args.epochs
        self.new = Totals()  # samples of this rank since the last log line
        self.num_logged: Counter[str] = Counter()
        self._reset()

    def _reset(self) -> None:
        self.start = time.monotonic()
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = self.samples = self.tokens = self.padded = 0
        self.waited = 0.0

    @contextmanager
    def epoch(self, first_step: int) -> Iterator[None]:
        """Shows a progress bar on a terminal; time between epochs is not measured."""
        self._reset()
        hidden = not (self.env.is_main and sys.stderr.isatty())
        with tqdm(
            desc="train", total=self.total_steps, initial=first_step, unit="step", disable=hidden, leave=False
        ) as self.bar:
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the time of waiting for a batch."""
        start = time.monotonic()
        with record_function("wait for data"):
            yield
        self.waited += time.monotonic() - start

    def add_batch(self, batch: TrainBatch) -> list[str]:
        """Counts a batch of this process; logs the first bad samples of each kind. Returns the keys of its samples."""
        self.samples += len(batch.keys)
        self.tokens += batch.num_tokens
        self.padded += batch.num_padded
        self.new.add(Totals(len(batch.keys) + len(batch.bad_samples), Counter(kind for kind, _ in batch.bad_samples)))
        for kind, name in batch.bad_samples:
            log_bad_sample(kind, name, self.num_logged)
        return batch.keys

    def add_step(self, step: int, report: dict[str, torch.Tensor], lr: float) -> None:
        """Adds a step's metrics; logs every ``--log-every-n-steps`` steps and at the end of an epoch.

        Args:
            step: number of steps done.
            report: result of a `Stepper`.
            lr: base learning rate of the step.

        Raises:
            TooManyBadSamplesError: there are too many bad samples; raised on all ranks.
        """
        skipped = report["skipped_steps"]
        for name, value in report.items():
            # Steps that are not finite are counted and excluded from the means.
            value = value if name == "skipped_steps" else torch.where(skipped > 0, 0.0, value.float())
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.steps += 1
        self.bar.update()
        if step % self.args.log_every_n_steps == 0 or step % self.steps_per_epoch == 0:
            self._log(step, lr)
            self._reset()
            totals = self.totals
            if totals.num_seen >= FEW_SAMPLES and totals.num_bad > self.args.max_bad_samples * totals.num_seen:
                (kind, _), *_ = totals.faults.most_common(1)
                raise TooManyBadSamplesError(
                    f"{totals.describe()}: more than --max-bad-samples {self.args.max_bad_samples:g}. The first "
                    "samples of each kind are named above; correct the data, or raise the limit. "
                    f"{kind}: {FAULT_KINDS.get(kind, 'see its first sample')}"
                )

    def _log(self, step: int, lr: float) -> None:
        metrics: dict[str, Any] = self._reduce()
        seconds = time.monotonic() - self.start
        left = (self.total_steps - step) * seconds / self.steps
        metrics |= {
            "epoch": step / self.steps_per_epoch,
            "lr": lr,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
            "padding_share": 1 - self.tokens / max(self.padded, 1),
            "skipped": self.totals.num_bad,
            "skipped_by_kind": dict(self.totals.faults),
            "eta_s": round(left, 1),
        }
        if self.tracker:
            self.tracker.log(step, {f"train/{name}": value for name, value in metrics.items()})
            logger.info(self._line(step, metrics))

    def _reduce(self) -> dict[str, float]:
        """Returns the means of the report's entries over steps and ranks; adds all ranks' samples to the totals."""
        # Only here does training wait for the current step; `StepFlags` lags one step behind.
        sums = torch.stack([value.float() for value in self.sums.values()]).cpu().double()
        ranks = gather_objects((sums, self.new), self.env)
        for _, new in ranks:
            self.totals.add(new)
        self.new = Totals()
        total: Any = sum(sums for sums, _ in ranks)
        means = dict(zip(self.sums, (total / self.env.world_size).tolist()))
        num_skipped = means.pop("skipped_steps")
        taken = self.steps - num_skipped
        means = {name: value / taken if taken else math.nan for name, value in means.items()}
        return means | {"skipped_steps": round(num_skipped)}

    def _line(self, step: int, m: dict) -> str:
        terms = ", ".join(f"{name.removesuffix('_loss')} {m[name]:.4f}" for name in m if name.endswith("_loss"))
        per = "GPU" if self.env.device.type == "cuda" else "process"
        fields = [
            f"epoch {m['epoch']:.2f} step {step:,}/{self.total_steps:,}",
            f"loss {m['loss']:.4f} ({terms})",
            f"lr {m['lr']:.3g}",
            f"logit scale {m['logit_scale']:.2f}",
            f"grad norm {m['grad_norm']:.3g}",
            *([f"corners' cosine with [CLS] {m['corner_cls_cosine']:.3f}"] if "corner_cls_cosine" in m else []),
            f"{m['samples_per_s']:,.0f} samples/s, {m['tokens_per_s']:,.0f} tokens/s per {per}",
            f"data wait {m['data_wait_share']:.0%}",
            f"padding {m['padding_share']:.0%}",
            f"ETA {timedelta(seconds=int(m['eta_s']))}",
        ]
        if m["skipped"]:
            fields.insert(-1, self.totals.describe())
        if m["skipped_steps"]:
            fields.insert(-1, f"{m['skipped_steps']:,} steps skipped, not finite")
        return " | ".join(fields)


class StepProfile:
    """Records steps 11 to 15 of this process, without overhead afterwards; a context manager.

    Args:
        folder: folder for ``trace.json.gz`` (for ui.perfetto.dev) and ``table.txt``.
        device: device of the model.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        stages = schedule(skip_first=WARM_UP - 2, wait=0, warmup=2, active=RECORDED, repeat=1)
        self.profiler = profile(activities=activities, schedule=stages, on_trace_ready=self._write)
        self.is_written = False

    def __enter__(self) -> "StepProfile":
        self.profiler.start()
        return self

    def step(self) -> None:
        """Marks the end of a step."""
        if not self.is_written:
            self.profiler.step()

    def __exit__(self, *_: object) -> None:
        self.profiler.stop()  # writes what has been recorded so far
        if not self.is_written:
            logger.warning(
                f"--profile {self.folder}: nothing recorded, because training ended before step {WARM_UP + 1}"
            )

    def _write(self, profiler: profile) -> None:
        self.is_written = True
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "table.txt").write_text(table)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        logger.info(f"profile of up to {RECORDED} steps, with a trace for ui.perfetto.dev in {self.folder}:\n{table}")
