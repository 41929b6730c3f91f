"""Running statistics of batch norms in a run with several processes, each of which sees other samples."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from training.model.towers.locking import BATCH_NORMS
from training.runtime.distributed import DistEnv


def statistics_average(model: nn.Module, env: DistEnv) -> Callable[[], None]:
    """Returns a function to be called after each step: it averages the statistics over ranks, in place.

    All ranks then evaluate the same model, which is the one that is saved, and a resumed run continues with the same
    statistics. A mean is that of all ranks' batches; a variance is the mean of the variances within these batches.
    Training itself does not read the statistics. Source: timm's ``distribute_bn`` with ``reduce``, at each step.

    Args:
        model: both towers.
        env: this process.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    return partial(_average, norms, env.world_size) if norms and env.world_size > 1 else lambda: None


@torch.no_grad()
def _average(norms: list[nn.Module], world_size: int) -> None:
    moving = [norm for norm in norms if norm.training]  # frozen ones are in eval mode
    buffers = [buffer for norm in moving for buffer in (norm.running_mean, norm.running_var)]
    if not buffers:
        return
    together = torch.cat([buffer.float() for buffer in buffers])
    dist.all_reduce(together)
    together /= world_size
    for buffer, part in zip(buffers, together.split([len(buffer) for buffer in buffers])):
        buffer.copy_(part)
