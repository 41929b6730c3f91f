"""Records when this process gets something done; ends a command that gets nothing done. Imports nothing heavy."""

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from training.runtime.processes import end_at_once

EXIT_LOST = 70  # sysexits.h: internal error
PATIENCE = 4  # number of timeouts that a phase other than those of a step may take while all ranks report


class Progress:
    """When this process last got a batch, a shard or a file done; `PROGRESS` is the only instance."""

    last = time.monotonic()

    def add(self) -> None:
        """Records that one more is done now."""
        self.last = time.monotonic()


PROGRESS = Progress()


def add_timeout_arg(parser: argparse.ArgumentParser, default: float) -> None:
    """Adds ``--timeout-minutes`` to a command that runs in `ends_if_stuck`."""
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=default,
        metavar="X",
        help="end with exit code 70 when nothing gets done for X minutes (default: %(default)g)",
    )


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
                end_at_once(
                    EXIT_LOST,
                    f"{command}: error: nothing was done for {minutes:g} minutes (--timeout-minutes). Check the "
                    "storage that it reads and writes, then start the same command again: what is saved is kept",
                )

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
