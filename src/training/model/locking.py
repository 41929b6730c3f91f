"""Which parts of a model a lock freezes; frozen parts stay in evaluation mode and give the same output every time."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

HEAD = "head."
_FROZEN = "statistics_are_frozen"
Model = TypeVar("Model", bound=nn.Module)


def linear_head(visual: nn.Module) -> nn.Module | None:
    """Returns the projection [trunk_dim] -> [dim] that ``timm_proj: linear`` puts behind an image tower's trunk.

    open_clip's lock freezes the trunk and leaves this head to be trained. A linear map without a bias commutes with
    the length of its input, so that the trunk's features may be kept on disk normalised.

    Returns:
        The head; None for a tower without one, or with another kind of head.
    """
    head = getattr(visual, "head", None)
    if not hasattr(visual, "trunk") or not isinstance(head, nn.Sequential):
        return None
    kinds = [part for part in head if not isinstance(part, nn.Dropout)]
    return head if len(kinds) == 1 and isinstance(kinds[0], nn.Linear) and kinds[0].bias is None else None


def image_encoder_without_head(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what gives an image's features [batch, trunk_dim] before its `linear_head`, if the tower has one."""
    return model.encode_image if linear_head(model.visual) is None else model.visual.trunk


@torch.no_grad()
def apply_linear_head(visual: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Features [n, trunk_dim] of `image_encoder_without_head` -> the tower's own [n, dim], both normalised, float32.

    Broken images stay zeros. A tower without a linear head gives the features back as they are.
    """
    head = linear_head(visual)
    if head is None or not len(features):
        return features
    weight = head[-1].weight
    return normalize(head(features.to(weight.device, weight.dtype)).float(), dim=-1).to(features.device)


def rest_frozen(model: Model) -> Model:
    """Puts the parts of a model whose weights are all frozen into evaluation mode.

    A part counts as frozen if none of its matrices is trained; trained norms in it change nothing, as dropout there
    would disturb what the frozen matrices compute. Batch norms keep their mode, except those that
    `freeze_batch_norm_statistics` marked.

    Returns:
        The model.
    """
    for module in model.modules():
        matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
        if matrices and not any(parameter.requires_grad for parameter in matrices):
            for part in module.modules():
                part.training &= isinstance(part, _BatchNorm) and not getattr(part, _FROZEN, False)
    return model


def freeze_batch_norm_statistics(tower: nn.Module) -> None:
    """Marks the locked batch norms of a tower, so that `rest_frozen` keeps them in evaluation mode, too.

    open_clip's lock would replace them by a module that drops the activation inside timm's BatchNormAct2d.
    """
    for module in tower.modules():
        if isinstance(module, _BatchNorm) and not any(parameter.requires_grad for parameter in module.parameters()):
            setattr(module, _FROZEN, True)
