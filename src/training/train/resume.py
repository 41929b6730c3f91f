"""State in a checkpoint besides weights, and resuming from it: exactly, or with a different number of processes."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from training.data.order import Share, Span, count_slots
from training.readers.faults import Totals
from training.train.checkpoint import copy_to_cpu, load_checkpoint
from training.train.optim import load_optimizer_state
from training.train.step import Stepper

AVERAGE = "ema"  # entry of a checkpoint with averaged weights, which `weights_file.read_state_dict` prefers
LOSS = "loss"  # entry of a checkpoint with the state of an experiment's loss, and prefix of its parameters' names
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Division:
    """How this run divides its data into epochs, steps and batches.

    Attributes:
        whole: this process's share of a whole epoch.
        accum_freq: number of micro-batches per step.
        data: fingerprint of the data, their order and the seed.
    """

    whole: Share
    accum_freq: int
    data: str

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of a whole epoch."""
        return self.whole.num_batches // self.accum_freq


@dataclass
class Progress:
    """Progress of the training on one process.

    Attributes:
        epoch: number of whole epochs done.
        step: number of optimizer steps done in all epochs.
        share: this process's share of the current epoch, and how far it has come in it.
        totals: samples of all ranks since the start, up to the last log line.
        random_state: random state to restore within an epoch; None uses the initial state of the epoch.
    """

    epoch: int
    step: int
    share: Share
    totals: Totals = field(default_factory=Totals)
    random_state: dict | None = None

    @classmethod
    def at_epoch(cls, epoch: int, division: Division, totals: Totals | None = None) -> "Progress":
        """Returns the progress at the beginning of an epoch."""
        return cls(epoch, epoch * division.steps_per_epoch, division.whole, totals or Totals())

    def next_epoch(self, division: Division) -> "Progress":
        """Returns the progress at the beginning of the next epoch."""
        return self.at_epoch(self.epoch + 1, division, self.totals)

    def advance(self, positions: Sequence[tuple[int, int]]) -> None:
        """Adds a step, given the `TrainBatch.position` of its micro-batches."""
        self.step += 1
        slots_done = dict(enumerate(self.share.slots_done)) | dict(positions)
        batches_done = self.share.batches_done + len(positions)
        self.share = replace(self.share, batches_done=batches_done, slots_done=tuple(slots_done.values()))

    def to_content(self, states: Sequence[dict], division: Division) -> dict:
        """Returns the entries of a checkpoint, without classes of this project.

        Args:
            states: ``slots_done``, ``random_state`` and ``totals`` since the last log line of each rank.
            division: division of this run.
        """
        totals = Totals()
        for counts in (self.totals, *(state["totals"] for state in states)):
            totals.add(counts)
        content = {"epoch": self.epoch, "step": self.step, "totals": totals.to_dict(), "position": None}
        if self.share == division.whole:
            return content
        of_ranks = {"left": tuple(map(tuple, self.share.left)), "slots_done": [state["slots_done"] for state in states]}
        return content | {
            "position": vars(self.share) | of_ranks,
            "accum_freq": division.accum_freq,
            "data": division.data,
            "random_states": [state["random_state"] for state in states],
        }


def start_from(content: dict, path: object, division: Division) -> Progress:
    """Returns the progress from which training resumes.

    Within an epoch, training resumes in the same order if the numbers of processes and workers and the batches are the
    same. Otherwise, the remaining samples of the epoch are divided again and come in a different order.

    Args:
        content: result of `load_checkpoint`.
        path: its file, for messages.
        division: division of this run.

    Raises:
        ValueError: the checkpoint is within an epoch of other data, or of the data in another order.
    """
    totals = Totals.from_dict(content["totals"]) if "totals" in content else Totals()
    whole, epoch = division.whole, content["epoch"]
    if not content.get("position"):
        return Progress.at_epoch(epoch, division, totals)
    if content["data"] != division.data:
        raise ValueError(
            f"--resume {path}: saved within an epoch of other data or another order; give the same --train-data, "
            "--train-num-samples, --seed, --shuffle-window and --shuffle-shards, or resume from an epoch_N.pt"
        )
    position = content["position"]  # see `Progress.to_content`
    same = {name: position[name] for name in ("batch_size", "num_batches", "world_size", "batches_done")}
    same["left"] = tuple(Span(*span) for span in position["left"])
    shares = [Share(rank=rank, slots_done=tuple(done), **same) for rank, done in enumerate(position["slots_done"])]
    then, now = (
        (share.world_size, len(share.slots_done), share.batch_size, accum_freq)
        for share, accum_freq in ((shares[0], content["accum_freq"]), (whole, division.accum_freq))
    )
    if then == now:
        random_state: Any = copy_to_cpu(content["random_states"][whole.rank])
        return Progress(epoch, content["step"], shares[whole.rank], totals, random_state)
    left = tuple(span for share in shares for span in share.unread())
    per_step = whole.batch_size * division.accum_freq * whole.world_size
    num_steps, num_unfit = divmod(count_slots(left), per_step)
    if not whole.rank:
        logger.warning(
            "{} was saved by {} processes x {} workers with batches of {} x {}: ".format(path, *then)
            + f"the remaining {count_slots(left):,} samples of epoch {epoch + 1} come in another order, in "
            f"{num_steps:,} steps of {per_step:,}; {num_unfit:,} of them do not fill a step and are left out"
        )
    share = replace(whole, num_batches=num_steps * division.accum_freq, left=left)
    return Progress(epoch, (epoch + 1) * division.steps_per_epoch - num_steps, share, totals)


def restore(path: Path, stepper: Stepper) -> dict:
    """Loads a checkpoint's state into a stepper's model, optimizer, scaler, loss and average; returns its content.

    The checkpoint may come from open_clip's trainer. The optimizer keeps its own options, because the command line
    overrides the file.

    Args:
        path: a file that rank 0 has checked.
        stepper: gets the state.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    content = load_checkpoint(path)
    weights = dict(content["state_dict"])
    consume_prefix_in_state_dict_if_present(weights, "module.")  # added by open_clip's trainer with several processes
    try:
        stepper.core.load_state_dict(weights)
        if stepper.average is not None:
            stepper.average.module.load_state_dict(content.get(AVERAGE, weights))  # else it begins now
        parameters, of_loss = dict(stepper.core.named_parameters()), content.get(LOSS, {})
        if isinstance(stepper.loss, torch.nn.Module):
            stepper.loss.load_state_dict(of_loss)
            parameters |= dict(stepper.loss.named_parameters(LOSS))
        names = [*weights, *(f"{LOSS}.{name}" for name in of_loss)]
        load_optimizer_state(stepper.optimizer, content["optimizer"], names, parameters)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--resume {path}: the model or its locked parts differ from the flags ({reason})") from error
    if stepper.scaler and content.get("scaler"):
        stepper.scaler.load_state_dict(content["scaler"])
    return content


def changed_flags(path: Path, flags: dict[str, object]) -> dict[str, tuple[object, object]]:
    """Compares flags with those of the run that saved a checkpoint.

    Args:
        path: LOGS/NAME/checkpoints/FILE; the run's flags are in LOGS/NAME/params.json.
        flags: flags of this run, by name.

    Returns:
        Flag -> (then, now) for every flag that differs, except ``--resume``; empty if there is no params.json.
    """
    try:
        then = json.loads((path.parent.parent / "params.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    now = json.loads(json.dumps(flags))  # tuples are lists in the file
    changed = {name for name in set(then) | set(now) if then.get(name) != now.get(name)} - {"resume"}
    return {f"--{name.replace('_', '-')}": (then.get(name), now.get(name)) for name in sorted(changed)}
