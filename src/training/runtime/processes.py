"""Child processes: the signals that stop them, and how they end together with this process. Imports nothing heavy."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# SLURM preempts with the first, and warns with the second, or under submitit with the third; the last means that the
# terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PATIENCE_S = 1.0  # how long processes may take to end after they were told to
SHARED_MEMORY = "/dev/shm"
MORE_ROOM = "enlarge it (docker run --shm-size 16g, or --ipc=host)"


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
        raise OSError(
            f"no shared memory ({SHARED_MEMORY}) to start processes ({error}): {MORE_ROOM}, or {otherwise}"
        ) from error


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


def kill_family(pid: int) -> None:
    """Kills a process and its descendants."""
    for each in [*descendants(pid), pid]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            pass


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
