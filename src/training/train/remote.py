"""Copies a run's folder to a URL (s3://, gs://, ...); files are always written to the local disk first."""

import argparse
import json
import logging
import math
import re
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec

from training.runtime.files import atomic_write
from training.runtime.messages import first_line
from training.train.checkpoint import CHECKPOINTS, check_checkpoint, checkpoint_progress, saved_checkpoints

INDEX = "checkpoints.json"  # index of the complete checkpoints: name -> [epochs, steps, bytes]
LAST_COPY_S = 30.0  # longest wait for it after an error, which the other ranks and the user hear of afterwards
TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp$")
logger = logging.getLogger(__name__)


class RemoteError(OSError):
    """The remote copy is incomplete."""


class RemoteCopy:
    """Keeps URL/NAME up to date with LOGS/NAME in a background thread; a context manager.

    A file is uploaded under a temporary name and then renamed. A checkpoint is added to the index only after it was
    uploaded, and removed from the index before it is deleted. All files in the index are therefore complete, whenever
    this process ends. A failed copy is logged and retried; only the last attempt, at the end of the block, raises.
    If the block raises, the last attempt has `LAST_COPY_S`.

    Args:
        args: flags; ``--remote-sync`` is a URL in fsspec's syntax.
        folder: LOGS/NAME.

    Raises:
        ValueError: the URL can't be used.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.url, self.folder = args.remote_sync, folder
        self.every_s, self.only_last_epoch = args.remote_sync_frequency, args.delete_previous_checkpoint
        self.sent: dict[str, tuple[int, int]] = {}
        self.ends = False
        self.failure: str | None = None
        self.poked = threading.Event()  # requests an immediate copy
        try:
            self.fs, self.root = fsspec.core.url_to_fs(f"{self.url.rstrip('/')}/{folder.name}")
            self.fs.invalidate_cache()
            for name in self._names():
                if TEMPORARY.search(name):  # left by a process that was killed while copying
                    self.fs.rm_file(f"{self.root}/{name}")
            index = f"{self.root}/{INDEX}"
            self.index: dict[str, list[float]] = json.loads(self.fs.cat_file(index)) if self.fs.exists(index) else {}
        except Exception as error:  # each of fsspec's file systems has its own exceptions
            raise ValueError(f"--remote-sync {self.url}: can't be used ({first_line(error)})") from error

    def fetch_newer(self) -> str | None:
        """Downloads the logs and the newest checkpoint if it has more steps than all checkpoints in the local folder.

        Returns:
            The checkpoint's name; None if there is no newer one.

        Raises:
            RemoteError: a file could not be read.
        """
        local = saved_checkpoints(self.folder / CHECKPOINTS).values()
        here = max((progress for progress in local if progress[0] < math.inf), default=(-1, -1))
        for name, (epoch, step, _) in sorted(self.index.items(), key=lambda item: item[1][:2], reverse=True):
            if here >= (epoch, step):
                return None
            try:
                self._get(name)
                check_checkpoint(self.folder / name)
            except ValueError as error:
                logger.warning(f"skipped a checkpoint of --remote-sync {self.url}: {error}")
                (self.folder / name).unlink()
                continue
            for other in self._names():
                if not other.endswith((".pt", ".tmp")) and other != INDEX:
                    self._get(other)
            return name
        return None

    def __enter__(self) -> "RemoteCopy":
        self.thread = threading.Thread(target=self._run, name="remote copy", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, _: object, error: Any, __: object) -> None:
        self.ends = True
        self.poked.set()
        if error is not None:
            logger.error(f"{first_line(error)}; waiting up to {LAST_COPY_S:g} s for the last copy to --remote-sync")
        self.thread.join(None if error is None else LAST_COPY_S)
        if self.failure and error is None:
            raise RemoteError(f"{self.failure}; the copy is incomplete, {self.folder} is complete")

    def _run(self) -> None:
        """Copies again and again; the last time after everything else has ended."""
        is_last = False
        while not is_last:
            self.poked.wait(self.every_s)
            self.poked.clear()
            is_last = self.ends
            try:
                self._copy()
                self.failure = None
            except Exception as error:
                self.failure = f"--remote-sync {self.url}: {first_line(error)}"
                logger.error(self.failure + ("" if is_last else "; training continues, copying will be retried"))

    def _copy(self) -> None:
        """Uploads all files that have changed, checkpoints first."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.suffix not in (".tmp", ".lock")]
        local = {path.relative_to(self.folder).as_posix(): path for path in files}
        for name in sorted(local, key=lambda name: (not name.endswith(".pt"), name)):
            try:
                stat = local[name].stat()
                if self.sent.get(name) == (stat.st_size, stat.st_mtime_ns):
                    continue
                if name.endswith(".pt"):
                    self._send_checkpoint(name, local[name], stat.st_size)
                else:
                    self._put(name, local[name])
            except FileNotFoundError:
                if local[name].exists():
                    raise
                continue  # an old checkpoint that was removed in the meantime
            self.sent[name] = (stat.st_size, stat.st_mtime_ns)
        if self.index.keys() & self.sent.keys():
            self._remove_old({name for name in local if (self.folder / name).exists()})

    def _send_checkpoint(self, name: str, path: Path, size: int) -> None:
        entry = [*checkpoint_progress(path), size]
        if math.inf in entry:  # the file is broken
            return
        if self.index.get(name) != entry:
            self._put(name, path)
            self.index[name] = entry
            self._write_index()
            logger.info(f"copied {name} to {self.url}/{self.folder.name}")

    def _remove_old(self, local: set[str]) -> None:
        """Deletes each ``step_N.pt`` that no longer exists locally; a newer checkpoint has been uploaded before."""
        kinds = (f"{CHECKPOINTS}/step_", f"{CHECKPOINTS}/epoch_")[: 1 + self.only_last_epoch]
        old = [name for name in self.index if name.startswith(kinds) and name not in local]
        if old:
            for name in old:
                del self.index[name]
            self._write_index()
            for name in old:
                self.fs.rm_file(f"{self.root}/{name}")

    def _names(self) -> list[str]:
        self.fs.invalidate_cache()
        return [path[len(self.root) :].lstrip("/") for path in self.fs.find(self.root)]

    def _put(self, name: str, content: Path | bytes) -> None:
        """Writes a file under a temporary name, which then becomes its own."""
        target = f"{self.root}/{name}"
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        temporary = f"{target}.{uuid4().hex[:12]}.tmp"
        try:
            if isinstance(content, Path):
                self.fs.put_file(str(content), temporary)
            else:
                self.fs.pipe_file(temporary, content)
            self.fs.mv(temporary, target)
        except BaseException:
            if self.fs.exists(temporary):
                self.fs.rm_file(temporary)
            raise

    def _write_index(self) -> None:
        self._put(INDEX, json.dumps(self.index, indent=1).encode())

    def _get(self, name: str) -> None:
        with atomic_write(self.folder / name) as temporary:
            try:
                self.fs.get_file(f"{self.root}/{name}", str(temporary))
            except Exception as error:
                raise RemoteError(f"--remote-sync {self.url}: {name} can't be read ({first_line(error)})") from error
