"""An experiment: one file outside of the package that changes parts of a training, ``--experiment FILE.py``.

    from training import Experiment

    class Mine(Experiment):
        def make_loss(self, loss, core):
            return MyLoss(loss)

The file is imported only because the command line, or a --config file on it, names it. See docs/experiments.md.
"""

import argparse
import importlib
import importlib.util
import inspect
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

COPY = "experiment.py"
_MODULE = "lotlip_experiment"


@dataclass(frozen=True)
class Reading:
    """Where and when a sample is read.

    Attributes:
        epoch: number of whole epochs done.
        step: number of optimizer steps done before the batch, or before the first one of its group of batches.
        source: name of the shard or table.
        random: a random stream of the sample's own; a resumed run draws the same.
    """

    epoch: int
    step: int
    source: str
    random: random.Random


class Experiment:
    """What an experiment may change. Each method here returns what a training without it uses.

    Attributes:
        args: the flags, those of `add_flags` included.
        code: text of the file that defines the experiment.
        benchmarks: further benchmarks, each a `dataloaders.registry.Benchmark` with a flag of its own.
        group_batches: number of batches whose samples a loader process reads before `order_samples` divides them.
    """

    code = ""
    benchmarks: Sequence = ()
    group_batches = 1

    def __init__(self, args: argparse.Namespace | None):
        """Takes the flags, before any work; a ValueError refuses them with exit code 2 and its message."""
        self.args = args

    def __reduce__(self) -> tuple:
        return experiment_of, (self.args,)  # a spawned loader process can't import the file by its module's name

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Adds flags to a group of --help-all, an argument group of argparse."""

    def image_transform(self, transform: "Callable[[Image], torch.Tensor]") -> "Callable[[Image], torch.Tensor]":
        """Returns the function from a training image to [3, H, W]; `transform` is the one of the flags."""
        return transform

    def views(self, texts: list[str], record: dict, at: Reading) -> list[str]:
        """Returns the texts of a sample, in a loader process.

        Args:
            texts: the texts that the flags choose, the short caption first.
            record: the sample's JSON and texts by key, or the row of its table.
            at: where and when the sample is read.

        Returns:
            As many texts, or the same number more for every sample. Each of those has one text feature, behind all
            others, which the loss of the flags takes for one of a long caption.
        """
        return texts

    def sample_fields(self, record: dict, texts: list[str]) -> "dict[str, torch.Tensor]":
        """Returns further tensors of a sample, which are stacked to [batch, ...] and passed to the loss by name.

        It runs in loader processes, where `random` is seeded for the sample, so random choices are repeatable.

        Args:
            record: see `views`.
            texts: result of `views`.
        """
        return {}

    def order_samples(self, samples: list, batch_size: int) -> Sequence[int]:
        """Returns the order of the samples of `group_batches` batches, such as similar ones next to each other.

        Args:
            samples: those that a loader process has read, each with ``record``, ``texts`` and ``inputs``.
            batch_size: each run of so many samples becomes a batch of one process.

        Returns:
            A permutation of ``range(len(samples))``.
        """
        return range(len(samples))

    def make_average(self, core: Any) -> Any:
        """Returns a moving average of the model, such as timm's ``ModelEmaV3(core, decay)``; None for none.

        After each step its ``update(core)`` is called. Its ``module`` is a copy of the model, which is kept in
        checkpoints, is evaluated during training, and is what ``--pretrained CHECKPOINT`` reads.
        """
        return None

    def model_class(self, kind: type) -> Any:
        """Returns the class of the forward pass of training, called with the same arguments.

        Args:
            kind: `training.model.towers.train_model.TrainModel`; a subclass of it adds outputs, which the loss gets by
                name, such as `PatchModel` in the same file.
        """
        return kind

    def make_loss(self, loss: Any, core: Any) -> Any:
        """Returns the loss: a function, or a module, whose parameters are trained, averaged over ranks and saved.

        Args:
            loss: the loss that the flags describe; ``loss(image_features, text_features, logit_scale, ...,
                output_dict=True)`` returns its terms by name, whose sum is minimised.
            core: the two-tower model. A part of it that the loss calls may be a submodule of the loss, too.
        """
        return loss

    def stepper_class(self, kind: type) -> Any:
        """Returns the class that computes steps: `training.train.step.Stepper`, or a subclass of it."""
        return kind


@cache
def load_experiment(name: str) -> type[Experiment]:
    """Imports an experiment.

    Args:
        name: ``FILE.py``, or the name of an importable module; with ``:CLASS`` if it defines several experiments.

    Raises:
        ValueError: there is no such file, module or class.
    """
    path, _, wanted = name.partition(":")
    if not path.endswith(".py"):
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise ValueError(f"--experiment {name}: {error}; expected FILE.py or an importable module") from error
    else:
        if not Path(path).is_file():
            raise ValueError(f"--experiment {name}: no such file")
        title = f"{_MODULE}_{sha256(os.path.abspath(path).encode()).hexdigest()[:8]}"
        spec: Any = importlib.util.spec_from_file_location(title, path)
        module = sys.modules[title] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Experiment) and value.__module__ == module.__name__
    }
    chosen = {key: value for key, value in classes.items() if not wanted or key == wanted}
    if len(chosen) != 1:
        found = ", ".join(classes) or "none"
        raise ValueError(f"--experiment {name}: expected one subclass of training.Experiment, found {found}")
    (experiment,) = chosen.values()
    experiment.code = Path(inspect.getfile(experiment)).read_text(encoding="utf-8")
    return experiment


def experiment_of(args: argparse.Namespace | None) -> Experiment:
    """Returns the experiment of a command line; without --experiment one that changes nothing."""
    return (load_experiment(args.experiment) if args and args.experiment else Experiment)(args)


def copy_experiment(args: argparse.Namespace, folder: Path, resume: Path | None) -> None:
    """Copies the experiment's file to a run's folder, whose `params.json` names it.

    Args:
        args: flags.
        folder: LOGS/NAME.
        resume: the checkpoint from which the run continues, LOGS/NAME/checkpoints/FILE.

    Raises:
        ValueError: the run was begun with other code, or with none, and --allow-changed-experiment is not given.
    """
    code = load_experiment(args.experiment).code if args.experiment else ""
    before = resume.parent.parent / COPY if resume else folder / COPY
    if resume and not args.allow_changed_experiment and code != (before.read_text("utf-8") if before.is_file() else ""):
        raise ValueError(
            f"--experiment {args.experiment or '(not given)'}: not the code in {before}, with which the run was begun; "
            "give the same file, or add --allow-changed-experiment"
        )
    (folder / COPY).unlink(missing_ok=True)
    if code:
        (folder / COPY).write_text(code, encoding="utf-8")
