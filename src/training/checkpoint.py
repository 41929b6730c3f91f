"""Training checkpoints: written whole or not at all, and loaded by evaluation as they are."""

import os
import re
from pathlib import Path

import torch

LATEST = "epoch_latest.pt"


def save_checkpoint(
    folder: Path, content: dict, *, keep: bool, most_recent: bool, delete_previous: bool
) -> Path | None:
    """Writes a checkpoint.

    Args:
        folder: LOGS/NAME/checkpoints.
        content: plain tensors and numbers; ``epoch`` counts finished epochs, ``state_dict`` is the bare model's.
        keep: write ``epoch_N.pt``.
        most_recent: write ``epoch_latest.pt``.
        delete_previous: remove the last ``epoch_N.pt`` before this one.

    Returns:
        The last file written, if any.
    """
    path = None
    if keep:
        path = write_atomically(content, folder / f"epoch_{content['epoch']}.pt")
        if delete_previous:
            earlier = [p for p in numbered_checkpoints(folder) if p != path]
            for old in earlier[-1:]:
                old.unlink()
    if most_recent:
        path = write_atomically(content, folder / LATEST)
    return path


def write_atomically(content: dict, path: Path) -> Path:
    """Saves to a temporary file, flushes it to the disk and renames it: `path` is always whole."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The folder's ``epoch_N.pt``, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("epoch_*.pt") if (m := re.fullmatch(r"epoch_(\d+)\.pt", p.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """Finds the file that ``--resume`` means.

    Args:
        resume: a file, or ``latest``: the newest in `folder`.

    Returns:
        None for ``latest`` where nothing has been saved yet: training starts from the beginning.

    Raises:
        FileNotFoundError: the file named is not there.
    """
    if resume != "latest":
        if not Path(resume).is_file():
            raise FileNotFoundError(f"--resume {resume}: no such file; name a checkpoint, or 'latest'")
        return Path(resume)
    candidates = numbered_checkpoints(folder)[-1:]
    candidates += [folder / LATEST] if (folder / LATEST).is_file() else []
    return max(candidates, key=lambda p: p.stat().st_mtime_ns, default=None)


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint without running code from it.

    Raises:
        ValueError: broken, or not a training checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch says of a broken file
        raise ValueError(f"--resume {path}: broken file ({str(error).splitlines()[0][:200]})") from error
    if not isinstance(content, dict) or not {"epoch", "state_dict", "optimizer"} <= set(content):
        raise ValueError(f"--resume {path}: not a training checkpoint; to start from weights use --pretrained")
    return content
