"""Where metrics go: metrics.jsonl always, TensorBoard and W&B by flag."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from training.runtime.files import whole_file

LOG_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"


def check_reporters(report_to: tuple[str, ...]) -> None:
    """Raises ValueError for a reporter whose package is not installed."""
    for name in report_to:
        if find_spec(name) is None:
            raise ValueError(f"--report-to {name}: not installed; pip install {name}")


def log_to(folder: Path | None) -> None:
    """Sets up logging: our own messages and others' warnings, to the terminal and to FOLDER/out.log.

    Args:
        folder: LOGS/NAME; None (ranks other than 0) logs warnings alone, to the terminal.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if folder is not None:
        handlers.append(logging.FileHandler(folder / "out.log"))
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, handlers=handlers, force=True)
    logging.getLogger("training").setLevel(logging.INFO if folder is not None else logging.WARNING)


class Tracker:
    """Writes metrics of rank 0 to all reporters.

    Args:
        folder: LOGS/NAME.
        name: of the run.
        report_to: ``tensorboard``, ``wandb`` or both; see `check_reporters`.
        flags: the run's, for W&B.
        first_step: lines of an earlier run from this step on are dropped: they are to be written again.
        project: of W&B.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        report_to: tuple[str, ...],
        flags: dict,
        first_step: int = 0,
        project: str = "lotlip",
    ):
        self.path = folder / "metrics.jsonl"
        self.writer, self.run = None, None
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= first_step]
            with whole_file(self.path) as temporary:  # a kill here must not lose the curve
                temporary.write_text("".join(line + "\n" for line in lines))
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        if "wandb" in report_to:
            import wandb

            self.run = wandb.init(
                project=project, name=name, config=flags, dir=str(folder), resume="allow", id=run_id(folder)
            )

    def log(self, step: int, metrics: dict[str, object]) -> None:
        """Writes numbers that belong to a step."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:  # a full disk is no reason to stop
            logging.getLogger(__name__).error(f"could not write {self.path}: {error}; training continues")
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
    """Returns a run's id for W&B: the same after every resume, and another one for a run of the same name elsewhere."""
    path = folder / "wandb_id.txt"
    if not path.is_file():
        with whole_file(path) as temporary:
            temporary.write_text(uuid4().hex)
    return path.read_text().strip()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off when the run was killed
