"""Writes logs and metrics: always to metrics.jsonl, on request to TensorBoard and W&B."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from training.runtime.files import append_line, atomic_write
from training.runtime.messages import or_warn

LOG_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"


def check_reporters(report_to: tuple[str, ...]) -> None:
    """Raises ValueError for a reporter whose package is not installed."""
    for name in report_to:
        if find_spec(name) is None:
            raise ValueError(f"--report-to {name}: not installed; pip install {name}")


def log_to(folder: Path | None) -> None:
    """Sets up logging of our own messages and of other packages' warnings, to the terminal and to FOLDER/out.log.

    Args:
        folder: LOGS/NAME; None (ranks other than 0) logs only warnings, to the terminal.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / "out.log"))
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, handlers=handlers, force=True)
    logging.getLogger("training").setLevel(logging.INFO if folder is not None else logging.WARNING)


class Tracker:
    """Writes metrics to all reporters; used on rank 0.

    Args:
        folder: LOGS/NAME.
        report_to: ``tensorboard``, ``wandb`` or both; see `check_reporters`.
        flags: flags of the run, for W&B; ``wandb_project_name`` is its project.
        first_step: number of steps already done; lines of later steps are removed, because they will be written again.
    """

    def __init__(self, folder: Path, report_to: tuple[str, ...], flags: dict, first_step: int = 0):
        self.path = folder / "metrics.jsonl"
        self.writer, self.run = None, None
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= first_step]
            with atomic_write(self.path) as temporary:  # complete even if the process is killed here
                temporary.write_text("".join(line + "\n" for line in lines))
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        if "wandb" in report_to:
            import wandb

            names = {"project": flags["wandb_project_name"], "name": folder.name, "id": run_id(folder)}
            self.run = wandb.init(**names, config=flags, dir=str(folder), resume="allow")

    def log(self, step: int, metrics: dict[str, object]) -> None:
        """Writes the metrics of a step."""
        or_warn(lambda: append_line(self.path, json.dumps({"step": step, **metrics})), str(self.path))
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.run:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Flushes everything."""
        if self.writer:
            self.writer.close()
        if self.run:
            self.run.finish()


def run_id(folder: Path) -> str:
    """Returns a run's W&B id, which stays the same when it resumes but differs between runs with the same name."""
    path = folder / "wandb_id.txt"
    if not path.is_file():
        with atomic_write(path) as temporary:
            temporary.write_text(uuid4().hex)
    return path.read_text().strip()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off when the run was killed
