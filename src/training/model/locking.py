"""Frozen parts of a model stay in evaluation mode: what is not trained should give the same output every time."""

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Model = TypeVar("Model", bound=nn.Module)


def rest_frozen(model: Model) -> Model:
    """Puts the parts of a model whose weights are all frozen into evaluation mode.

    A part counts as frozen if none of its matrices is trained; trained norms in it change nothing, as dropout there
    would disturb what the frozen matrices compute. Batch norms keep their mode: whether they go on collecting
    statistics is a choice of its own (``--lock-image-freeze-bn-stats``).

    Returns:
        The model.
    """
    for module in model.modules():
        matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
        if matrices and not any(parameter.requires_grad for parameter in matrices):
            for part in module.modules():
                part.training &= isinstance(part, _BatchNorm)
    return model
