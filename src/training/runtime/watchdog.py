"""Ends all ranks when one hangs, dies or fails, and names it. No collective is needed for that.

The ranks report to a store on rank 0. A rank that fails prints its error, writes it to the store, and leaves; the
watchdogs of the other ranks read it there and end their processes with the same exit code, whatever they wait for.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from training.runtime.distributed import DistEnv, RunFailedError, join_ranks, on_main_rank, print_error
from training.runtime.processes import EXIT_LOST, EXIT_STOPPED, LONG_PHASE, PROGRESS, SIGNALS, end_at_once
from training.runtime.workers import Loader

STARTING, OPENING, BUILDING = "checking the command", "opening the data", "building the model"
WAITING, STEPPING, SAVING, EVALUATING = "waiting for data", "taking a step", "saving", "evaluating"
COPYING = "copying to --remote-sync"
FAILED = "ending, because it or another rank has failed"
PHASES = (STARTING, OPENING, BUILDING, WAITING, STEPPING, SAVING, EVALUATING, COPYING, FAILED)
SHORT = (WAITING, STEPPING, SAVING)  # phases that may take one timeout each; others, `LONG_PHASE`
SILENT = 4  # number of intervals without a report after which a rank counts as lost
LOST_S = 30.0  # time after which a rank ends if the store on rank 0 refuses connections
STOP_PATIENCE_S = 10.0  # longest wait for a batch after a signal: SLURM kills 30 s after SIGTERM
SIGNAL, FAILURE, NUM_LEFT = "signal", "failure", "num_left"  # keys of the store
RANK_0_LOST = "rank 0 has ended or does not answer"
COMMUNICATION = ("gloo", "nccl", "closed by peer", "tcpstore", "remote worker")  # words of errors


class Report(NamedTuple):
    """What a rank tells the others: its step and phase, the seconds in that phase, its host, and the time now."""

    step: int
    phase: str
    seconds: float
    host: str
    time: float


class Failure(NamedTuple):
    """The first failure of a run: the rank that found it, the exit code of all ranks, and what happened."""

    rank: int
    code: int
    message: str


@contextmanager
def joined_ranks(
    device: str | None, timeout_minutes: float, then: str = "start the same command again"
) -> Iterator[tuple[DistEnv, "Watchdog"]]:
    """Joins the other processes of a run, with a watchdog; leaves them at the end, unless the block raises.

    Args:
        device, timeout_minutes: see `join_ranks`.
        then: what to do after the end of a stuck run, for the message.

    Raises:
        ValueError: the device does not exist.
    """
    env = join_ranks(device, timeout_minutes)
    with Watchdog(env, 60 * timeout_minutes, then) as watchdog:
        yield env, watchdog
        if env.world_size > 1:
            # In torch 2.6, gloo's threads take the GIL to free the tensors of finished work, while the destruction of
            # the group holds the GIL and waits for these threads. A last collective, whose tensor outlives the group,
            # ensures that no such tensor is left.
            last = torch.zeros(1, device=env.device)
            dist.all_reduce(last)
            dist.destroy_process_group()


class Watchdog:
    """A thread on each rank that reports the rank's step and phase to the other ranks, through a store on rank 0.

    This is a context manager, to be entered as soon as the process group exists. A rank that makes no progress for
    longer than the timeout exits with `EXIT_LOST`; before that, rank 0 prints which rank is furthest behind or silent.
    A new phase, a new step and a batch from a loader are progress. Phases other than those of a step may take four
    times as long unless a rank is silent. The thread also forwards stop signals: a signal on one rank reaches all ranks
    within two intervals. If a rank then gets no further batch, the run can't save any more, and all ranks exit with
    `EXIT_STOPPED`. If the block raises an error in a run of several ranks, all ranks end, see `_fail`.

    Args:
        env: this process; all ranks must create their watchdogs at the same point.
        timeout_s: longest time without progress, in seconds.
        then: what to do after the end of a stuck run, for the message.
    """

    def __init__(self, env: DistEnv, timeout_s: float, then: str):
        self.env, self.timeout_s, self.then = env, timeout_s, then
        self.interval = min(max(timeout_s / 20, 0.5), 2.0)
        self.host = socket.gethostname()
        self.ended, self.wake = threading.Event(), threading.Event()
        self.last_answer = time.monotonic()  # of the store
        self.stopping_since: float | None = None
        self.failure: Failure | None = None  # of this rank
        self.store = _make_store(env, timeout_s) if env.world_size > 1 else None
        if self.store is not None:
            SIGNALS.grace_s = 3 * self.interval
        self.at(0, STARTING)

    def at(self, step: int, phase: str) -> None:
        """Records the current step and phase of this rank, one of `PHASES`."""
        self.status = step, phase, time.monotonic()

    def __enter__(self) -> "Watchdog":
        # Requests to the store never return if rank 0 hangs, so they run in a separate thread.
        self.threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.store:
            exchange = threading.Thread(
                target=self._exchange, args=(self.store,), name="watchdog exchange", daemon=True
            )
            self.threads.append(exchange)
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and self.store is not None:
            self._end_run(error)
        self.ended.set()
        self.wake.set()
        for thread in self.threads:
            thread.join(self.interval)

    def _end_run(self, error: BaseException) -> None:
        """Prints this rank's error and ends all ranks; does not return."""
        if isinstance(error, RunFailedError):
            where = f"rank {self.env.rank} on {self.host}: " if self.env.rank else ""
            self._fail(error.code, f"{where}{error}")
        if isinstance(error, KeyboardInterrupt):
            self._fail(130, "interrupted")
        traceback.print_exception(error)
        sys.stderr.flush()
        if any(word in str(error).lower() for word in COMMUNICATION):  # may be the consequence of another rank's end
            if SIGNALS.name:
                end_at_once(EXIT_STOPPED)  # other ranks received the same signal and exited first
            self._end_if_ranks_are_lost()
        text = traceback.format_exception_only(error)[-1].strip()
        self._fail(1, f"rank {self.env.rank} on {self.host} failed: {text}")

    def _fail(self, code: int, message: str) -> None:
        """Ends all ranks with an exit code; of all ranks that call it, only the first prints its message.

        This rank stays until the others have ended, because communication libraries abort a process when its peer
        ends, and because the store ends with rank 0.
        """
        self.at(self.status[0], FAILED)
        self.failure = Failure(self.env.rank, code, message)
        self.wake.set()
        if self.store is not None:
            time.sleep(SILENT * self.interval + 5)  # the exchange ends the process before, if the store answers
        self._end(code, message)

    def _end(self, code: int, message: str) -> None:
        """Ends this process. If a rank is lost, ranks 0 and 1 say so: the latter gets here only without the former."""
        if code != EXIT_LOST or self.env.rank <= 1:
            print_error(message)
        end_at_once(code)

    def _end_if_ranks_are_lost(self) -> None:
        """Waits until a lost rank has missed several reports; if there is one, ends all ranks."""
        self.at(self.status[0], FAILED)
        time.sleep(SILENT * self.interval + 1)
        if time.monotonic() - self.last_answer > SILENT * self.interval:
            self._end(EXIT_LOST, RANK_0_LOST)
        reports = self._reports()
        if lost := sorted(silent_ranks(reports, self.env.world_size, SILENT * self.interval)):
            who = ", ".join(named(rank, reports) for rank in lost[:8])
            self._fail(EXIT_LOST, f"{who} has ended or does not answer")

    def _watch(self) -> None:
        while not self.ended.wait(self.interval):
            now = time.monotonic()
            self._check_stop(now)
            # Rank 0 waits least and names the late rank, because the first rank that exits may make the others fail.
            longest, idle = self.timeout_s + (0 if self.env.is_main else 3 * self.interval), self._idle_s()
            is_stuck = idle > longest * (1 if self.status[1] in SHORT else LONG_PHASE)
            if not is_stuck and self.env.is_main and idle > longest:
                is_stuck = bool(silent_ranks(self._reports(), self.env.world_size, self.timeout_s))
            if is_stuck or self.store is not None and now - self.last_answer > longest:
                who = "rank 0 does not answer"  # otherwise it, which has all reports, would have ended the run before
                if self.env.is_main:
                    who = describe_late(self._reports(), self.env.world_size, SILENT * self.interval)
                message = f"no progress for {self.timeout_s:,.0f} s (--timeout-minutes): {who}. Check its data and its "
                self._end(EXIT_LOST, f"{message}machine, then {self.then}")

    def _idle_s(self) -> float:
        """Returns the seconds since this rank last made progress."""
        return time.monotonic() - max(self.status[2], PROGRESS.last)

    def _exchange(self, store: dist.TCPStore) -> None:
        """Reports this rank to the store; reads there what ended or stops the other ranks."""
        while not self.ended.is_set():
            self.wake.wait(self.interval)
            if self.failure is None:
                self.wake.clear()
            start = time.monotonic()
            try:
                self._exchange_once(store)
                self.last_answer = start
            except RuntimeError:  # without an answer for a longer time, the timeout ends this rank, too
                is_refused = time.monotonic() - start < 0.5  # rank 0 has ended; one that hangs would not refuse
                if is_refused and start - self.last_answer > LOST_S and not self.ended.is_set():
                    self._end(EXIT_LOST, RANK_0_LOST)
                self.ended.wait(self.interval)

    def _exchange_once(self, store: dist.TCPStore) -> None:
        store.set(str(self.env.rank), json.dumps(self._report()))
        if self.failure:
            store.compare_set(FAILURE, "", json.dumps(self.failure))  # only the first is kept
        if SIGNALS.name:
            store.set(SIGNAL, SIGNALS.name)
        if store.check([FAILURE]):
            self._follow(Failure(*json.loads(store.get(FAILURE))), store)
        if store.check([SIGNAL]) and not SIGNALS.name:
            SIGNALS.record(store.get(SIGNAL).decode())

    def _follow(self, failure: Failure, store: dist.TCPStore) -> None:
        """Ends this process because a rank has failed."""
        is_first = failure.rank == self.env.rank
        if is_first:
            print_error(failure.message)
        elif self.failure is None and failure.code != 2:  # a usage error needs no more than its own message
            print_error(f"rank {self.env.rank} ends, because {failure.message}")
        with suppress(RuntimeError):  # the store has ended
            store.add(NUM_LEFT, 1)
            deadline = time.monotonic() + SILENT * self.interval * (is_first or self.env.is_main)
            while time.monotonic() < deadline and store.add(NUM_LEFT, 0) < self.env.world_size:
                time.sleep(0.05)
        end_at_once(failure.code)

    def _check_stop(self, now: float) -> None:
        """Ends the run without saving if a signal was received but the next batch does not arrive."""
        if not SIGNALS.name:
            return
        self.stopping_since = self.stopping_since or now
        patience = min(STOP_PATIENCE_S, self.timeout_s / 2)
        if min(now - self.stopping_since, Loader.seconds_waiting()) >= patience:
            why = f"rank {self.env.rank} on {self.host} got no data for {Loader.seconds_waiting():,.0f} s"
            message = f"stopped by {SIGNALS.name}; the state could not be saved, because {why}"
            self._fail(EXIT_STOPPED, f"{message}: --resume latest continues from the last checkpoint")

    def _report(self) -> Report:
        return Report(*self.status[:2], self._idle_s(), self.host, time.time())

    def _reports(self) -> dict[int, Report]:
        """Returns the last report of every rank that has reported."""
        reports = {self.env.rank: self._report()}
        if self.store is not None:
            others = [r for r in range(self.env.world_size) if r != self.env.rank and self.store.check([str(r)])]
            reports |= {r: Report(*json.loads(self.store.get(str(r)))) for r in others}
        return reports


def silent_ranks(reports: dict[int, Report], world_size: int, seconds: float) -> dict[int, str]:
    """Returns the ranks that have not reported for some time -> what to say about them."""
    now = time.time()
    silent = {r: f"has not reported for {now - p.time:,.0f} s" for r, p in reports.items() if now - p.time > seconds}
    return silent | {rank: "has never reported" for rank in range(world_size) if rank not in reports}


def named(rank: int, reports: dict[int, Report]) -> str:
    """Names a rank, and its host if it has reported."""
    return f"rank {rank} on {reports[rank].host}" if rank in reports else f"rank {rank}"


def describe_late(reports: dict[int, Report], world_size: int, silent_s: float) -> str:
    """Names the ranks that the others are waiting for.

    Args:
        reports: the last report of each rank that has reported.
        world_size: number of ranks.
        silent_s: seconds without a report after which a rank counts as lost.
    """
    late = silent_ranks(reports, world_size, silent_s)
    if not late:
        order = {rank: (report.step, PHASES.index(report.phase)) for rank, report in reports.items()}
        last = {rank: reports[rank] for rank in order if order[rank] == min(order.values())}
        late = {rank: f"is at step {r.step:,}, {r.phase} for {r.seconds:,.0f} s" for rank, r in last.items()}
    shown = "; ".join(f"{named(rank, reports)} {late[rank]}" for rank in sorted(late)[:8])
    rest = world_size - len(late)
    waiting = f"; {rest} other{' ranks wait' if rest > 1 else ' rank waits'}" if rest else ""
    return shown + waiting


def _make_store(env: DistEnv, timeout_s: float) -> dist.TCPStore:
    """Creates a store for the watchdogs. Requests fail after a short time if rank 0 hangs."""
    host, seconds = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=min(max(timeout_s / 4, 2), 60))
    store = dist.TCPStore(host, 0, is_master=True, timeout=seconds, wait_for_workers=False) if env.is_main else None
    port = on_main_rank(lambda: store.port if store else 0, env)
    return store or dist.TCPStore(host, port, is_master=False, timeout=seconds)
