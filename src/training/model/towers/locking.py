"""Freezing parts of a model: frozen parts stay in evaluation mode, so that they always give the same output."""

from typing import TypeVar

import torch
from torch import nn
from torch.nn.functional import normalize

HEAD = "head."
BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_FROZEN = "statistics_are_frozen"
Model = TypeVar("Model", bound=nn.Module)


def linear_head(visual: nn.Module) -> nn.Sequential | None:
    """Returns the projection [trunk_dim] -> [dim] that ``timm_proj: linear`` puts behind an image tower's trunk.

    open_clip's lock freezes the trunk and leaves this head trainable. The head has no bias, so scaling its input scales
    its output: the trunk's features can be cached on disk normalised.

    Returns:
        The head; None for a tower with another kind of head or none.
    """
    head = getattr(visual, "head", None)
    if not hasattr(visual, "trunk") or not isinstance(head, nn.Sequential):
        return None
    layers = [layer for layer in head if not isinstance(layer, nn.Dropout)]
    return head if len(layers) == 1 and isinstance(layers[0], nn.Linear) and layers[0].bias is None else None


@torch.no_grad()
def apply_linear_head(visual: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Applies the linear head to features of `image_encoder(model, without_head=True)`.

    Args:
        visual: an image tower.
        features: [n, trunk_dim], normalised; all zeros for an image that could not be read.

    Returns:
        [n, dim] float32, normalised, with zeros kept as zeros; `features` unchanged if the tower has no linear head.
    """
    head = linear_head(visual)
    if head is None or not len(features):
        return features
    weight = next(head.parameters())
    return normalize(head(features.to(weight.device, weight.dtype)).float(), dim=-1).to(features.device)


def rest_frozen(model: Model) -> Model:
    """Puts the frozen parts of a model into evaluation mode, which switches off their dropout.

    A module counts as frozen if none of its weight matrices is trained, even if its norms are. Batch norms keep their
    mode, except those marked by `freeze_batch_norm_statistics`.

    Returns:
        The model.
    """
    for module in model.modules():
        matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
        if matrices and not any(parameter.requires_grad for parameter in matrices):
            for frozen in module.modules():
                frozen.training &= isinstance(frozen, BATCH_NORMS) and not getattr(frozen, _FROZEN, False)
    return model


def freeze_batch_norm_statistics(tower: nn.Module) -> None:
    """Marks the locked batch norms of a tower, so that `rest_frozen` puts them into evaluation mode, too.

    open_clip's own lock replaces them by a module without the activation that timm's BatchNormAct2d includes.
    """
    for module in tower.modules():
        if isinstance(module, BATCH_NORMS) and not any(parameter.requires_grad for parameter in module.parameters()):
            setattr(module, _FROZEN, True)
