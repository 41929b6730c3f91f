"""Ends a run in which some rank no longer moves, and names it: no rank waits for another forever."""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from training.runtime.distributed import EXIT_LOST, DistEnv, broadcast_object

PHASES = ("starting", "waiting for data", "taking a step", "saving", "evaluating")


class Watchdog:
    """A thread on each rank that tells the others, by way of a store on rank 0, where the rank is.

    A context manager. A rank that has been at one place for longer than the timeout (in an evaluation: four times that)
    ends its process with `EXIT_LOST`; rank 0 says before that who is furthest behind, or silent.

    Args:
        env: this process; all must make theirs together.
        timeout_s: longest time at one place.
    """

    def __init__(self, env: DistEnv, timeout_s: float):
        self.env, self.timeout_s = env, timeout_s
        self.interval = min(max(timeout_s / 20, 0.5), 15.0)
        self.host = socket.gethostname()
        self.ended = threading.Event()
        self.store = _make_store(env, timeout_s) if env.world_size > 1 else None
        self.at(0, PHASES[0])

    def at(self, step: int, phase: str) -> None:
        """Says where this rank is now: one of `PHASES` of a step."""
        self.place = step, phase, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(self.interval):
            step, phase, since = self.place
            seconds = time.monotonic() - since
            self._tell([step, phase, seconds, self.host, time.time()])
            # Rank 0 speaks first: whoever ends first may take the others along.
            longest = self.timeout_s * (4 if phase == "evaluating" else 1)
            if seconds > longest + (0 if self.env.is_main else 3 * self.interval):
                self._end()

    def _tell(self, place: list) -> None:
        try:
            if self.store is not None:
                self.store.set(str(self.env.rank), json.dumps(place))
        except RuntimeError:  # rank 0 is gone or stands still; the timeout ends this rank, too
            pass

    def _end(self) -> None:
        if self.env.rank <= 1:  # rank 1 comes here only if rank 0 does not end the run first
            print(f"python -m training.main: error: {self._describe()}", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(EXIT_LOST)

    def _describe(self) -> str:
        if not self.env.is_main:  # rank 0, who knows where the others are, would have ended the run before
            return _stuck(self.timeout_s, "rank 0 does not answer")
        step, phase, since = self.place
        places = {self.env.rank: [step, phase, time.monotonic() - since, self.host, time.time()]}
        if self.store is not None:
            ranks = range(self.env.world_size)
            places |= {r: json.loads(self.store.get(str(r))) for r in ranks if self.store.check([str(r)])}
        return describe_stuck(places, self.env.world_size, self.timeout_s, 4 * self.interval)


def describe_stuck(places: dict[int, list], world_size: int, timeout_s: float, silent_s: float) -> str:
    """Says which ranks the others wait for.

    Args:
        places: rank -> [step, phase, seconds there, host, time of telling].
        world_size: ranks there should be.
        timeout_s: how long nothing happened.
        silent_s: who has not told anything for so long is taken for dead.
    """
    now = max(place[4] for place in places.values())
    late = {r: f"has said nothing for {now - p[4]:,.0f} s" for r, p in places.items() if now - p[4] > silent_s}
    late |= {rank: "has never said anything" for rank in range(world_size) if rank not in places}
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
    advice = "Look at its data or its machine; then start again with --resume latest"
    return f"nothing has moved for {timeout_s:,.0f} s (--timeout-minutes): {who}. {advice}"


def _make_store(env: DistEnv, timeout_s: float) -> dist.TCPStore:
    """A store of the watchdogs' own; who asks a rank 0 that stands still waits a while, but not long."""
    host, seconds = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=min(max(timeout_s / 4, 2), 60))
    own = dist.TCPStore(host, 0, is_master=True, timeout=seconds, wait_for_workers=False) if env.is_main else None
    port = broadcast_object(own.port if own is not None else None, env)
    return own if own is not None else dist.TCPStore(host, port, is_master=False, timeout=seconds)
