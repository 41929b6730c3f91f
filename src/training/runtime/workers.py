"""Loader processes that ignore the signals of a job, end when their parent asks them to, and never outlive it."""

import ctypes
import fcntl
import logging
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from shutil import disk_usage

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from training.runtime import processes
from training.runtime.processes import PROGRESS

PREFETCH = 2  # number of batches that a worker prepares ahead
PR_SET_PDEATHSIG = 1  # linux/prctl.h
IS_LINUX = sys.platform == "linux"
NO_PROCESSES = "load without processes: --workers 0"
_has_warned = mmap.mmap(-1, 1)  # shared with the loader processes
logger = logging.getLogger(__name__)


class Loader(DataLoader):
    """A DataLoader for datasets of whole batches. On Linux, its workers react only to signals from this process.

    SLURM sends signals to every process of a job. If one ended a worker, the training would fail before it has saved.
    If workers ignored all signals, they could not be ended while they wait for a file system that hangs.

    Batches travel in shared memory if there is room for them, otherwise through pipes, which is slower. With Docker's
    64 MB, they would else end workers with a bus error.

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
            prefetch_factor=PREFETCH if num_workers else None,
            worker_init_fn=_begin_worker if IS_LINUX else None,
            # By default, Python 3.14 starts processes from a server, which does not inherit the signal mask.
            multiprocessing_context="fork" if num_workers and IS_LINUX else None,
        )

    def __iter__(self) -> Iterator:  # type: ignore[override]  # torch names a private class
        if not (self.num_workers and IS_LINUX):
            return _batches(super().__iter__(), [])
        others = set(multiprocessing.active_children())
        # Workers start with the signals blocked, because torch's own handler would end them before they are ready.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, processes.STOP_SIGNALS)
        try:
            with processes.starting_processes(NO_PROCESSES):
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


def _batches(batches: Iterator, workers: Sequence[BaseProcess]) -> Iterator:
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
            PROGRESS.add()
            yield batch
    finally:
        # torch waits up to 5 s for each worker, one after the other. The timer terminates those that are still alive.
        if workers:
            timer = threading.Timer(processes.PATIENCE_S, _end, [workers])
            timer.daemon = True
            timer.start()


def _end(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            commands = processes.descendants(worker.pid or 0)
            worker.terminate()
            for pid in commands:  # commands of a `pipe:` source
                processes.kill_family(pid)


def _begin_worker(_: int) -> None:
    """Ends this worker if its parent sends a stop signal or dies; other processes' stop signals are ignored."""
    ForkingPickler.register(torch.Tensor, _reduce)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), name="signals", daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    # The signals are blocked in every thread, so they are received here even if the worker's main thread is blocked.
    while signal.sigwaitinfo(processes.STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)


def _reduce(tensor: torch.Tensor) -> tuple:
    """Sends a tensor to the parent: in shared memory if it has room, otherwise by value."""
    size, free = tensor.untyped_storage().nbytes(), 0
    # An error raised here would only be printed, and the parent would wait for ever.
    with suppress(OSError, RuntimeError), ExitStack() as stack:
        folder = os.open(processes.SHARED_MEMORY, os.O_RDONLY)
        stack.callback(os.close, folder)
        # While this process takes memory, no other one may count on it; unless there is plenty for all of them.
        if disk_usage(processes.SHARED_MEMORY).free < 128 * size:
            fcntl.flock(folder, fcntl.LOCK_EX)
        free = disk_usage(processes.SHARED_MEMORY).free
        if free >= size + 2 * mmap.PAGESIZE:
            return reduce_tensor(tensor.share_memory_())
    if not _has_warned[0]:
        _has_warned[0] = 1
        logger.warning(
            f"shared memory ({processes.SHARED_MEMORY}, {free / 1e6:,.1f} MB free) has no room for {size / 1e6:,.1f} "
            f"MB: batches go through pipes, which is slower; {processes.MORE_ROOM}, or {NO_PROCESSES}"
        )
    return torch.from_numpy, (tensor.contiguous().numpy(),)
