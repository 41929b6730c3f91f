"""The life of a process: its first imports, the signals that stop it, its progress, and its end with its children.

Imports nothing heavy.
"""

import argparse
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

EXIT_LOST, EXIT_STOPPED = 70, 75  # sysexits.h: internal error; try again later
END = b"\0"  # tells the listener to end; signals have other numbers
LONG_PHASE = 4  # number of timeouts that a phase other than those of a step may take while all ranks report
# SLURM preempts with the first, and warns with the second, or under submitit with the third; the last means that the
# terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PATIENCE_S = 1.0  # how long processes may take to end after they were told to
SHARED_MEMORY = "/dev/shm"
MORE_ROOM = "enlarge it (docker run --shm-size 16g, or --ipc=host)"


@contextmanager
def first_imports() -> Iterator[None]:
    """Context in which a new process imports PyTorch and packages that depend on it; nothing if it has done so.

    OpenMP's threads sleep while they wait for each other, unless ``OMP_WAIT_POLICY`` is set. By default they spin, and
    so take the processor from those that they wait for as soon as other work runs beside them: on two cores with a load
    of 8, ViT-B/32 encoded 1.0 images/s, and 1.7 with sleeping threads.

    The garbage collector is disabled: imports create about a million objects, nearly all of them permanent, which it
    would traverse repeatedly. Later collections ignore them, too, so loader processes keep sharing their memory.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def starting_processes(otherwise: str) -> Iterator[None]:
    """Context that starts processes: without room in shared memory, the error names it and says what to do.

    Args:
        otherwise: how to work without processes, for the message.

    Raises:
        OSError: shared memory is full, read-only or missing.
    """
    try:
        yield
    except OSError as error:
        message = f"no shared memory ({SHARED_MEMORY}) to start processes ({error})"
        raise OSError(f"{message}: {MORE_ROOM}, or {otherwise}") from error


def descendants(pid: int) -> list[int]:
    """Returns a process's children and their descendants; an empty list on systems without /proc."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(word) for thread in threads for word in (thread / "children").read_text().split()]
    except OSError:  # the process has ended
        return []
    return children + [pid for child in children for pid in descendants(child)]


def kill_loaders() -> None:
    """Kills all processes that multiprocessing started here, including the commands that they run (``pipe:``)."""
    # torch's handler raises an error in the main thread when a loader process is killed.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        kill_family(child.pid)


def kill_family(pid: int | None) -> None:
    """Kills a process and its descendants; None has not been started."""
    for each in [*descendants(pid), pid] if pid else []:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def end_at_once(code: int, message: str = "") -> NoReturn:
    """Ends this process and its loader processes, whatever its other threads do; prints a message to standard error."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    kill_loaders()
    os._exit(code)


def end_process(code: int) -> None:
    """Ends this process with an exit code within seconds, even if its loader processes hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    children = multiprocessing.active_children()
    kill_loaders()
    for child in children:
        child.join(PATIENCE_S / len(children))
    if any(child.is_alive() for child in children):  # even SIGKILL can't end an uninterruptible read
        os._exit(code)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():  # this rank failed; the end of its group would wait for the others
        os._exit(code)
    sys.exit(code)


class StoppedError(RuntimeError):
    """A signal asked the run to stop."""


class StopSignals:
    """Records the stop signals of this process; `SIGNALS` is the only instance.

    Inside `caught`, a signal ends the process immediately with `EXIT_STOPPED`, because before the training loop there
    is nothing to lose. After `defer`, a signal only sets `name`, which the training loop and the evaluation check
    between batches.

    Attributes:
        name: name of the first signal that this process received or that the watchdog reported from another rank; None
            if there was none.
        grace_s: time for the watchdog to notify the other ranks before this process ends.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.grace_s = 0.0
        self._ends_at_once = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catches the signals, except those that are ignored (``nohup``); must be entered in the main thread."""
        self.name, self.grace_s, self._ends_at_once = None, 0.0, True
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # Python runs signal handlers in the main thread, which may be in a collective or a long C++ call for minutes.
        # The wakeup file descriptor is written to immediately.
        previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in heeded}
        listener = threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            self.name, self._ends_at_once = None, False
            os.write(write_end, END)  # loader processes hold copies of this end, so closing it would not be seen
            listener.join()
            os.close(write_end)
            os.close(read_end)

    def defer(self) -> None:
        """From now on, signals are only recorded, for the training loop to act on; they no longer end the process."""
        self._ends_at_once = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def _listen(self, read_end: int) -> None:
        while (received := os.read(read_end, 1)) != END:
            if received[0] in STOP_SIGNALS:
                self.record(signal.Signals(received[0]).name)

    def record(self, name: str) -> None:
        """Records a signal that this or another rank received; if training has not begun, ends the process."""
        self.name = self.name or name
        if self._ends_at_once:
            time.sleep(self.grace_s)
        if self._ends_at_once:  # training may have begun in the meantime
            end_at_once(EXIT_STOPPED, f"stopped by {name}; nothing is lost: start the same command again")


SIGNALS = StopSignals()


class Progress:
    """When this process last got a batch, a shard or a file done; `PROGRESS` is the only instance."""

    last = time.monotonic()

    def add(self) -> None:
        """Records that one more is done now."""
        self.last = time.monotonic()


PROGRESS = Progress()


def add_timeout_arg(parser: argparse.ArgumentParser, default: float) -> None:
    """Adds ``--timeout-minutes`` to a command that runs in `ends_if_stuck`."""
    text = "end with exit code 70 when nothing gets done for X minutes (default: %(default)g)"
    parser.add_argument("--timeout-minutes", type=float, default=default, metavar="X", help=text)


@contextmanager
def ends_if_stuck(command: str, minutes: float) -> Iterator[None]:
    """Context that ends the process with `EXIT_LOST` if nothing is recorded in `PROGRESS` for some time.

    Args:
        command: name of the command, for the message.
        minutes: longest time without progress.

    Raises:
        ValueError: `minutes` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"--timeout-minutes {minutes:g}: expected a positive number")
    ended = threading.Event()
    PROGRESS.add()

    def watch() -> None:
        while not ended.wait(min(2.0, 6 * minutes)):
            if time.monotonic() - PROGRESS.last > 60 * minutes:
                remedy = "Check the storage that it reads and writes, then start the same command again"
                message = f"{command}: error: nothing was done for {minutes:g} minutes (--timeout-minutes)"
                end_at_once(EXIT_LOST, f"{message}. {remedy}: what is saved is kept")

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
