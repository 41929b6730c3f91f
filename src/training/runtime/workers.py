"""Loader processes that ignore the signals of a job, end when their parent asks them to, and never outlive it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, Dataset

from training.runtime.processes import PATIENCE_S, STOP_SIGNALS, descendants, kill_family

PR_SET_PDEATHSIG = 1  # linux/prctl.h
IS_LINUX = sys.platform == "linux"


class Loader(DataLoader):
    """A DataLoader for datasets of whole batches. On Linux, its workers react only to signals from this process.

    SLURM sends signals to every process of a job. If one ended a worker, the training would fail before it has saved.
    If workers ignored all signals, they could not be ended while they wait for a file system that hangs.

    Args:
        dataset: dataset whose items are whole batches.
        num_workers: number of loader processes; 0 loads in this process.
        pin: whether to copy batches to pinned memory.
    """

    waiting_since: float | None = None  # when this process began to wait for a batch; None if it is not waiting

    def __init__(self, dataset: Dataset, num_workers: int, pin: bool):
        super().__init__(
            dataset,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            pin_memory=pin,
            prefetch_factor=2 if num_workers else None,
            worker_init_fn=_obey_parent_alone if IS_LINUX else None,
            # By default, Python 3.14 starts processes from a server, which does not inherit the signal mask.
            multiprocessing_context="fork" if num_workers and IS_LINUX else None,
        )

    def __iter__(self) -> Iterator:
        if not (self.num_workers and IS_LINUX):
            return _batches(super().__iter__(), [])
        others = set(multiprocessing.active_children())
        # Workers start with the signals blocked, because torch's own handler would end them before they are ready.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return _batches(batches, [p for p in multiprocessing.active_children() if p not in others])

    @classmethod
    def seconds_waiting(cls) -> float:
        """Returns for how many seconds this process has been waiting for a batch; 0 if it is not waiting."""
        since = cls.waiting_since
        return 0.0 if since is None else time.monotonic() - since


def _unchanged(batch: object) -> object:
    return batch


def _batches(batches: Iterator, workers: Sequence[multiprocessing.Process]) -> Iterator:
    """Yields all batches and records when it waits for one. However the iteration ends, the workers end soon after."""
    try:
        while True:
            Loader.waiting_since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                Loader.waiting_since = None
            yield batch
    finally:
        # torch waits up to 5 s for each worker, one after the other. The timer terminates those that are still alive.
        if workers:
            timer = threading.Timer(PATIENCE_S, _end, [workers])
            timer.daemon = True
            timer.start()


def _end(workers: Sequence[multiprocessing.Process]) -> None:
    for worker in workers:
        if worker.is_alive():
            commands = descendants(worker.pid)
            worker.terminate()
            for pid in commands:  # commands of a `pipe:` source
                kill_family(pid)


def _obey_parent_alone(_: int) -> None:
    """Ends this worker if its parent sends a stop signal or dies; other processes' stop signals are ignored."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), name="signals", daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    # The signals are blocked in every thread, so they are received here even if the worker's main thread is blocked.
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
