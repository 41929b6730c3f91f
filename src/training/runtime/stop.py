"""Handles the signals that ask a run to stop, `STOP_SIGNALS`. Imports nothing heavy."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.runtime.processes import STOP_SIGNALS, end_at_once

EXIT_STOPPED = 75  # sysexits.h: try again later
END = b"\0"  # tells the listener to end; signals have other numbers


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

    def __init__(self):
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
