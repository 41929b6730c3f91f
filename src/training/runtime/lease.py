"""A lease on a folder: one live process writes to it, also over NFS; one that has crashed does not keep others out.

The holder writes its host and process into a file and touches the file every few seconds. On the same machine, the
system says whether the holder is alive. On another one, the file's time does: it is only compared with itself, so that
clocks may differ. Locks of the file system are not used, because not every network file system has them.
"""

import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from training.runtime.files import atomic_write
from training.runtime.processes import end_at_once

FILE = "writer.lock"
BEAT_S = 5.0
PATIENCE_S = 30.0  # a holder on another machine that has not touched the file for this long has crashed
logger = logging.getLogger(__name__)


class Lease:
    """The lease of this process, as a context manager; `take` acquires it, the end of the block returns it.

    Attributes:
        is_worthless: whether a folder that `take` created is to be removed if the block raises.
    """

    def __init__(self) -> None:
        self.path = Path(os.devnull)  # until a folder is taken
        self.made: list[Path] = []  # the folder and those of its parents that did not exist
        self.is_worthless: Callable[[], bool] = lambda: False
        self.owner = {"token": uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self.owner |= {"machine": _machine(), "started": _start_of(os.getpid()), "since": time.strftime("%F %T %z")}
        self.ended = threading.Event()

    def __enter__(self) -> "Lease":
        return self

    def take(self, folder: Path, flag: str) -> None:
        """Acquires the lease of a folder, which is created if necessary; waits up to `PATIENCE_S` for a crashed holder.

        Args:
            folder: the folder.
            flag: the flag that names the folder, for the message.

        Raises:
            ValueError: another live process holds it.
            OSError: the file can't be written.
        """
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        while True:
            with suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
                file.write(json.dumps(self.owner))
                break
            found = _read(path)
            if found is None:  # returned in the meantime
                continue
            if _lives(path, *found):
                pid, host, since = (found[0].get(name, "?") for name in ("pid", "host", "since"))
                raise ValueError(
                    f"{flag}: {folder} is in use by process {pid} on {host}, since {since}; wait for its end, stop it, "
                    f"or choose another name (if this is a copy of that folder, remove {FILE})"
                )
            if _read(path) == found:
                with atomic_write(path) as temporary:
                    temporary.write_text(json.dumps(self.owner), encoding="utf-8")
                time.sleep(1.0)  # if two processes replaced the file, the last one has the lease
                if (_read(path) or ({}, 0))[0].get("token") == self.owner["token"]:
                    break
        self.path, self.made = path, made
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def __exit__(self, error: type | None, *_: object) -> None:
        self.ended.set()
        if self._holder().get("token") == self.owner["token"]:
            if not (error and self.made and self.is_worthless()):
                self.path.unlink(missing_ok=True)
            else:  # with the file, because another process could take the folder before it is removed
                shutil.rmtree(self.made[0], ignore_errors=True)
                for parent in self.made[1:]:
                    with suppress(OSError):  # another run has begun in it
                        parent.rmdir()

    def _holder(self) -> dict:
        return (_read(self.path) or ({}, 0))[0]

    def _keep(self) -> None:
        """Touches the file; ends this process if it was held up for so long that another one took the folder over."""
        has_warned = False
        while not self.ended.wait(BEAT_S):
            try:
                holder = self._holder()
                if holder.get("token", self.owner["token"]) != self.owner["token"]:
                    who = f"process {holder['pid']} on {holder['host']}, because this one did not answer"
                    message = f"error: {self.path.parent} was taken over by {who} for {PATIENCE_S:.0f} s"
                    end_at_once(1, f"{message}; it ends without saving")
                os.utime(self.path)
            except OSError as error:
                if not has_warned:
                    logger.warning(f"{self.path} could not be renewed: {error}")
                has_warned = True


def _read(path: Path) -> tuple[dict, int] | None:
    """Returns (the holder, time of its last beat in ns); None without a file."""
    try:
        with open(path, encoding="utf-8") as file:  # opening, unlike stat, makes NFS ask the server
            beat = os.fstat(file.fileno()).st_mtime_ns
            with suppress(ValueError):  # it is being written
                return json.load(file), beat
            return {}, beat
    except FileNotFoundError:
        return None


def _lives(path: Path, holder: dict, beat: int) -> bool:
    if holder and holder["machine"] == _machine():
        return _start_of(holder["pid"]) == holder["started"]
    if holder:
        print(f"{path}: waiting up to {PATIENCE_S:.0f} s for a sign of life from {holder['host']}", file=sys.stderr)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(0.5)
        found = _read(path)
        if found != (holder, beat):
            return found is not None and found[0] == holder
    return False


def _machine() -> str:
    """Identifies what process numbers refer to: the machine since its start, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: every process is treated like one on another machine
        return uuid4().hex


def _start_of(pid: int) -> str | None:
    """Returns when a process started, to tell it from a later one with the same number; None if there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        return None
