"""The processes below this one: which signals stop them, and how they end with it. Imports nothing heavy."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM preempts with the first and warns with the second
PATIENCE_S = 1.0  # for processes that were told to end


def descendants(pid: int) -> list[int]:
    """Returns a process's children and theirs; nothing where there is no /proc."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(word) for thread in threads for word in (thread / "children").read_text().split()]
    except OSError:  # it has ended
        return []
    return children + [pid for child in children for pid in descendants(child)]


def kill_loaders() -> None:
    """Kills every process that multiprocessing started here, with the commands that such a process runs (``pipe:``)."""
    # torch's handler would raise an error in the main thread for a loader process that was killed.
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


def end_process(code: int) -> None:
    """Ends this process with an exit code within seconds, whatever its loader processes are waiting for."""
    sys.stdout.flush()
    sys.stderr.flush()
    children = multiprocessing.active_children()
    kill_loaders()
    for child in children:
        child.join(PATIENCE_S / len(children))
    if any(child.is_alive() for child in children):  # not even SIGKILL ends an uninterruptible read
        os._exit(code)
    sys.exit(code)
