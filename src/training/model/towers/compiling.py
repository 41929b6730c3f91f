"""Compiles the layers of the towers, each on its own, for ``--torchcompile``.

A layer is compiled once for all layers of its class. Those of the text tower take captions of any number and length, so
packed captions, whose shapes change in every step, don't compile them again.
"""

from typing import Any

import torch
from torch import nn

from training.model.towers.text_tower import TextTower

# Layers of one class share their limit over both towers, gradients on and off, and training and evaluation.
RECOMPILE_LIMIT = 64


def compile_layers(model: Any, only_images: bool = False, **options: Any) -> None:
    """Compiles a model's layers, in place; the names of its weights stay the same.

    Args:
        model: one of our models or of open_clip's.
        only_images: compile only the image tower.
        **options: of `torch.compile`.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, RECOMPILE_LIMIT)
    for layer in _layers(model.visual):
        layer.compile(**options)
    if not only_images:
        text = getattr(model, "text", None) or model.transformer  # open_clip.CLIP holds the parts of its text tower
        for layer in text.compilable() if isinstance(text, TextTower) else _layers(text):
            layer.compile(dynamic=True, **options)


def _layers(tower: nn.Module) -> list[nn.Module]:
    """Returns the modules that stand in a sequence of several of one class; the whole tower if there are none."""
    found: list[nn.Module] = []
    waiting = [tower]
    for module in waiting:
        children = list(module.children())
        is_stack = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in children}) == 1
        (found if is_stack and len(children) > 1 else waiting).extend(children)
    return found or [tower]
