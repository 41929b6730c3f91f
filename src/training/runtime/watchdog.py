"""Aborts a run when a rank hangs or dies, and reports which one."""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from training.runtime.distributed import EXIT_LOST, DistEnv, broadcast_object, is_lost_rank
from training.runtime.processes import kill_loaders
from training.runtime.stop import EXIT_STOPPED, SIGNALS
from training.runtime.workers import Loader

STARTING, OPENING, BUILDING = "checking the command", "opening the data", "building the model"
WAITING, STEPPING, SAVING, EVALUATING = "waiting for data", "taking a step", "saving", "evaluating"
COPYING = "copying to --remote-sync"
LEAVING = "leaving"  # this rank exits because another rank has ended
PHASES = (STARTING, OPENING, BUILDING, WAITING, STEPPING, SAVING, EVALUATING, COPYING, LEAVING)
SLOW = {OPENING: 4, EVALUATING: 4, COPYING: 4}  # number of timeouts that a phase may take while all ranks report
SILENT = 4  # number of intervals without a report after which a rank counts as lost
STOP_PATIENCE_S = 10.0  # longest wait for a batch after a signal: SLURM kills 30 s after SIGTERM
SIGNAL, ABANDONED = "signal", "abandoned"  # keys of the store


class Watchdog:
    """A thread on each rank that reports the rank's step and phase to the other ranks, through a store on rank 0.

    This is a context manager, to be entered as soon as the process group exists. A rank that makes no progress for
    longer than the timeout exits with `EXIT_LOST`; before that, rank 0 prints which rank is furthest behind or silent.
    Opening data, evaluating and copying may take four times as long unless a rank is silent. The thread also forwards
    stop signals: a signal on one rank reaches all ranks within two intervals. If a rank then gets no further batch, the
    run can't save any more, and all ranks exit with `EXIT_STOPPED`.

    Args:
        env: this process; all ranks must create their watchdogs at the same point.
        timeout_s: longest time without progress, in seconds.
    """

    def __init__(self, env: DistEnv, timeout_s: float):
        self.env, self.timeout_s = env, timeout_s
        self.interval = min(max(timeout_s / 20, 0.5), 2.0)
        self.host = socket.gethostname()
        self.ended = threading.Event()
        self.heard = time.monotonic()  # when the store last answered
        self.stopping_since: float | None = None
        self.is_abandoned = False  # whether the run stops without saving
        self.store = _make_store(env, timeout_s) if env.world_size > 1 else None
        if self.store is not None:
            SIGNALS.grace_s = 3 * self.interval
        self.at(0, STARTING)

    def at(self, step: int, phase: str) -> None:
        """Records the current step and phase of this rank, one of `PHASES`."""
        self.place = step, phase, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        # Requests to the store never return if rank 0 hangs, so they run in a separate thread.
        self.exchange = threading.Thread(target=self._exchange, name="watchdog exchange", daemon=True)
        if self.store is not None:
            self.exchange.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RuntimeError) and is_lost_rank(error) and not SIGNALS.name:
            self._name_lost_ranks()
        self.ended.set()
        self.thread.join()
        if self.store is not None:
            self.exchange.join(self.interval)

    def _watch(self) -> None:
        while not self.ended.wait(self.interval):
            step, phase, since = self.place
            now = time.monotonic()
            self._check_stop(now)
            # Rank 0 waits least and names the late rank, because the first rank that exits may make the others fail.
            longest = self.timeout_s + (0 if self.env.is_main else 3 * self.interval)
            is_cut_off = self.store is not None and now - self.heard > longest
            if is_cut_off or now - since > longest * SLOW.get(phase, 1):
                self._end()
            if self.env.is_main and now - since > longest and self._some_rank_is_silent():
                self._end()

    def _exchange(self) -> None:
        """Reports this rank's step, phase and signal to the store; records a signal that another rank received."""
        while not self.ended.wait(self.interval):
            step, phase, since = self.place
            place = [step, phase, time.monotonic() - since, self.host, time.time()]
            try:
                self.store.set(str(self.env.rank), json.dumps(place))
                if SIGNALS.name:
                    self.store.set(SIGNAL, SIGNALS.name)
                if self.is_abandoned:
                    self.store.set(ABANDONED, "")
                signalled, abandoned = self.store.check([SIGNAL]), self.store.check([ABANDONED])
                name = self.store.get(SIGNAL).decode() if signalled else None
            except RuntimeError:  # rank 0 has ended; the timeout will end this rank, too
                continue
            self.heard = time.monotonic()
            if name and not SIGNALS.name:
                SIGNALS.note(name)
            if abandoned:
                _end_process(EXIT_STOPPED)

    def _check_stop(self, now: float) -> None:
        """Ends the run without saving if a signal was received but the next batch does not arrive."""
        if not SIGNALS.name:
            return
        self.stopping_since = self.stopping_since or now
        patience = min(STOP_PATIENCE_S, self.timeout_s / 2)
        if min(now - self.stopping_since, Loader.seconds_waiting()) < patience:
            return
        print(
            f"stopped by {SIGNALS.name}; the state could not be saved, because rank {self.env.rank} on {self.host} got "
            f"no data for {Loader.seconds_waiting():,.0f} s: --resume latest continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self.is_abandoned = True
        if self.store is not None:
            time.sleep(3 * self.interval)  # the others must read this before the store ends with rank 0
        _end_process(EXIT_STOPPED)

    def _name_lost_ranks(self) -> None:
        """Prints which ranks no longer report, except those that report that they are leaving."""
        self.at(self.place[0], LEAVING)
        time.sleep((SILENT if self.env.rank <= 1 else 2) * self.interval + 1)
        if self.env.is_main:
            now, places = time.time(), self._places()
            late = [r for r in range(self.env.world_size) if r not in places or self._is_lost(places[r], now)]
            hosts = {rank: f" on {places[rank][3]}" if rank in places else "" for rank in late}
            who = ", ".join(f"rank {rank}{hosts[rank]}" for rank in late[:8])
        else:
            who = "rank 0" if self.env.rank == 1 and time.monotonic() - self.heard > SILENT * self.interval else ""
        if who:
            print(f"python -m training.main: error: {who} has ended or does not answer", file=sys.stderr, flush=True)

    def _is_lost(self, place: list, now: float) -> bool:
        return place[1] != LEAVING and now - place[4] > SILENT * self.interval

    def _some_rank_is_silent(self) -> bool:
        places = self._places()
        return len(places) < self.env.world_size or any(time.time() - p[4] > self.timeout_s for p in places.values())

    def _end(self) -> None:
        if self.env.rank <= 1:  # rank 1 gets here only if rank 0 has not ended the run before
            print(f"python -m training.main: error: {self._describe()}", file=sys.stderr, flush=True)
        _end_process(EXIT_LOST)

    def _places(self) -> dict[int, list]:
        """Returns the last report of every rank that has reported; rank 0 only."""
        step, phase, since = self.place
        places = {self.env.rank: [step, phase, time.monotonic() - since, self.host, time.time()]}
        if self.store is not None:
            ranks = range(self.env.world_size)
            places |= {r: json.loads(self.store.get(str(r))) for r in ranks if self.store.check([str(r)])}
        return places

    def _describe(self) -> str:
        if not self.env.is_main:  # otherwise rank 0, which has all reports, would have ended the run before
            return _stuck(self.timeout_s, "rank 0 does not answer")
        return describe_stuck(self._places(), self.env.world_size, self.timeout_s, SILENT * self.interval)


def _end_process(code: int) -> None:
    kill_loaders()
    os._exit(code)


def describe_stuck(places: dict[int, list], world_size: int, timeout_s: float, silent_s: float) -> str:
    """Returns a message that names the ranks that the others are waiting for.

    Args:
        places: rank -> its report [step, phase, seconds in this phase, host, time of the report].
        world_size: number of ranks.
        timeout_s: time without progress, in seconds.
        silent_s: seconds without a report after which a rank counts as lost.
    """
    now = max(place[4] for place in places.values())
    late = {r: f"has not reported for {now - p[4]:,.0f} s" for r, p in places.items() if now - p[4] > silent_s}
    late |= {rank: "has never reported" for rank in range(world_size) if rank not in places}
    if not late:
        order = {rank: (place[0], PHASES.index(place[1])) for rank, place in places.items()}
        first = min(order.values())
        for rank, place in places.items():
            if order[rank] == first:
                late[rank] = f"is at step {place[0]:,}, {place[1]} for {place[2]:,.0f} s"
    hosts = {rank: f" on {places[rank][3]}" if rank in places else "" for rank in late}
    shown = "; ".join(f"rank {rank}{hosts[rank]} {late[rank]}" for rank in sorted(late)[:8])
    rest = world_size - len(late)
    waiting = f"; {rest} other{' ranks wait' if rest > 1 else ' rank waits'}" if rest else ""
    return _stuck(timeout_s, shown + waiting)


def _stuck(timeout_s: float, who: str) -> str:
    advice = "Check its data and its machine, then continue with --resume latest"
    return f"no progress for {timeout_s:,.0f} s (--timeout-minutes): {who}. {advice}"


def _make_store(env: DistEnv, timeout_s: float) -> dist.TCPStore:
    """Creates a store for the watchdogs. Requests fail after a short time if rank 0 hangs."""
    host, seconds = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=min(max(timeout_s / 4, 2), 60))
    own = dist.TCPStore(host, 0, is_master=True, timeout=seconds, wait_for_workers=False) if env.is_main else None
    port = broadcast_object(own.port if own is not None else None, env)
    return own if own is not None else dist.TCPStore(host, port, is_master=False, timeout=seconds)
