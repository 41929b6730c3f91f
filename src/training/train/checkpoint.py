"""Training checkpoints: written atomically in the background; evaluation loads them without conversion."""

import logging
import math
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from training.runtime.files import atomic_write
from training.runtime.messages import first_line

CHECKPOINTS = "checkpoints"  # the folder in LOGS/NAME
LATEST = "epoch_latest.pt"
logger = logging.getLogger(__name__)


class SaveError(OSError):
    """A checkpoint could not be written."""


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread, from a copy in memory, while training continues.

    A failure (such as a full disk) is logged and leaves existing files unchanged; only `finish` raises it.

    Args:
        folder: LOGS/NAME/checkpoints.
        last_good: the checkpoint that training resumed from, if any.
    """

    def __init__(self, folder: Path, last_good: Path | None = None):
        self.folder, self.last_good = folder, last_good
        self.thread: threading.Thread | None = None
        self.error: SaveError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether the last copy is still being written; a second copy would double the memory."""
        return self.thread is not None and self.thread.is_alive()

    def submit(self, content: dict, names: list[str], afterwards: Callable[[], None] | None = None) -> None:
        """Copies the content and writes it under each name; waits first if the writer is busy.

        Args:
            content: plain tensors and numbers, as `load_checkpoint` requires.
            names: files in the folder.
            afterwards: called in the thread after all files have been written.
        """
        if self.thread is not None:
            self.thread.join()
        copy = copy_to_cpu(content)
        self.thread = threading.Thread(target=self._write, args=(copy, names, afterwards), name="checkpoint writer")
        self.thread.start()

    def _write(self, content: dict, names: list[str], afterwards: Callable[[], None] | None) -> None:
        path = None
        try:
            for name in names:
                path = self.folder / name
                with atomic_write(path) as temporary, open(temporary, "wb") as file:
                    torch.save(content, file)
                self.last_good = path
                logger.info(f"saved {path}")
            if afterwards:
                afterwards()
            self.error = None
        except (OSError, RuntimeError) as error:  # torch's zip writer wraps the system's errors
            self.error = SaveError(f"could not save {path}: {' '.join(str(error).split())[:300]}")
            logger.error(f"{self.error}; the last good checkpoint is {self.last_good or 'none'}; training continues")

    def finish(self) -> None:
        """Waits for the writer; raises SaveError if the last checkpoint could not be written."""
        if self.thread is not None:
            self.thread.join()
        if self.error:
            raise self.error


def copy_to_cpu(content: object) -> object:
    """Returns a deep copy of nested dicts, lists and tuples with all tensors on the CPU."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)


def saved_checkpoints(folder: Path) -> dict[Path, tuple[float, float]]:
    """Returns the progress of each checkpoint in a folder, ascending, with broken ones last.

    File times are not used, because copying and downloading change them.
    """
    names = re.compile(rf"(epoch|step)_\d+\.pt|{re.escape(LATEST)}")
    found = sorted((path for path in folder.glob("*.pt") if names.fullmatch(path.name)), reverse=True)
    return dict(sorted(((path, checkpoint_progress(path)) for path in found), key=lambda item: item[1]))


def checkpoint_progress(path: Path) -> tuple[float, float]:
    """Returns (whole epochs, steps) that a checkpoint records; infinity if it can't be read."""
    try:
        content = load_checkpoint(path)
        return content["epoch"], content.get("step", 0)
    except ValueError:  # `check_checkpoint` reports it
        return math.inf, math.inf


def remove_old_checkpoints(folder: Path, keep_steps: int, only_last_epoch: bool) -> None:
    """Removes old checkpoints; broken files are neither counted nor removed.

    Args:
        folder: LOGS/NAME/checkpoints.
        keep_steps: number of ``step_N.pt`` to keep, those with the most steps.
        only_last_epoch: keep only the last ``epoch_N.pt``.
    """
    whole = [path for path, progress in saved_checkpoints(folder).items() if progress[0] < math.inf]
    steps = [path for path in whole if path.name.startswith("step_")]
    epochs = [path for path in whole if path.name.startswith("epoch_") and path.name != LATEST]
    for path in steps[: max(0, len(steps) - keep_steps)] + (epochs[:-1] if only_last_epoch else []):
        path.unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the valid checkpoint with the most steps, for ``--resume latest``; warns about broken ones.

    Returns:
        The file; None if there is no valid checkpoint.
    """
    for left_over in folder.glob("*.tmp"):  # left by a run that was killed while saving
        logger.warning(f"removed {left_over}: a checkpoint whose writing was interrupted")
        left_over.unlink()
    for path in reversed(saved_checkpoints(folder)):
        try:
            check_checkpoint(path)
            return path
        except ValueError as error:
            logger.warning(f"skipped a checkpoint: {error}")
    return None


def check_checkpoint(path: Path) -> None:
    """Reads a whole file once and compares its checksums, which torch itself does not.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is broken, or not a training checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such file; give a checkpoint, or 'latest'")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types of errors for broken files
        raise ValueError(f"--resume {path}: broken file ({first_line(error)})") from error
    if damaged:
        raise ValueError(f"--resume {path}: broken file ({damaged} is damaged)")
    load_checkpoint(path)


def load_checkpoint(path: Path) -> dict:
    """Maps a checkpoint into memory, without running code from it: tensors are read when they are used.

    The processes of a machine share what has been read. Tensors must be copied before the file is removed.

    Raises:
        ValueError: the file is broken, or not a training checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types of errors for broken files
        raise ValueError(f"--resume {path}: broken file ({first_line(error)})") from error
    if not isinstance(content, dict) or not {"epoch", "state_dict", "optimizer"} <= set(content):
        raise ValueError(f"--resume {path}: not a training checkpoint; to start from weights use --pretrained")
    return content
