"""The batches of an epoch, whose loader processes may start before the last steps of the epoch before."""

from collections.abc import Iterator

import torch

from training.data.batch import TrainBatch, to_device
from training.data.open import TrainData
from training.train.resume import Progress, set_random_state


class EpochBatches:
    """The remaining batches of an epoch. Its loader processes start at once, without changing this process's state.

    Args:
        data: training data.
        progress: progress at which the batches begin.
        seed: seed of this process for the steps of this epoch.
        device: device of the batches.
    """

    def __init__(self, data: TrainData, progress: Progress, seed: int, device: torch.device):
        self.progress, self.seed, self.device = progress, seed, device
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # unlike torch.manual_seed, leaves GPUs alone
        self.batches = iter(data.loader(progress.epoch, progress.share, pin=device.type == "cuda"))
        self.random_state = torch.get_rng_state()  # creating a loader draws a random number
        torch.set_rng_state(before)

    def begin(self) -> Iterator[tuple[TrainBatch, dict[str, object]]]:
        """Sets the random state of the epoch's steps; returns the batches, with their inputs on the device."""
        torch.manual_seed(self.seed)
        torch.set_rng_state(self.random_state)
        if self.progress.random_state:
            set_random_state(self.progress.random_state)
            self.progress.random_state = None
        return to_device(self.batches, self.device)
