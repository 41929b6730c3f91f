"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685): peft trains them, files are read with them merged.

The scale of an adapter is 1, as for ``lora_alpha`` equal to the rank, so that a file needs no further information.
"""

import logging

import torch
from torch import nn

_BASE, _DOWN, _UP = "base_layer.", "lora_A.default.weight", "lora_B.default.weight"
_TRAINED = ("position", "corner")  # parts of names of small tables of a text tower, which a longer context needs


def add_adapters(model: nn.Module, rank: int) -> None:
    """Adds adapters to all linear layers whose weight is trained, and freezes all other weights.

    Trained are also the positions and corner tokens of a text tower, if they were before, and the logit scale. The
    attention of open_clip's own blocks consists of no linear layers, so they get adapters in their MLPs.

    Args:
        model: a two-tower model, with its locked parts frozen; changed in place.
        rank: rank of the adapters.

    Raises:
        ValueError: peft is not installed, or no linear layer is trained.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora needs one more package: pip install peft") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = [
        name
        for name, module in model.named_modules()
        # The output of `nn.MultiheadAttention` is a subclass, whose weight is used without calling the module.
        if type(module) is nn.Linear and f"{name}.weight" in trained and name not in ("text.proj", "visual.head.proj")
    ]
    if not targets:
        raise ValueError(f"--lora {rank}: no linear layer is left to train; unlock a tower or omit the flag")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        is_table = not name.startswith("visual.") and any(part in name for part in _TRAINED)
        parameter.requires_grad_(parameter.requires_grad or (name in trained and (is_table or "logit_" in name)))


def merge_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict with its adapters added to the weights of their layers; one without adapters unchanged."""
    downs = [key for key in state if key.endswith(_DOWN)]
    if not downs:
        return state
    logging.info(f"{len(downs)} adapters are merged into the weights of their layers")
    merged = {key.replace(_BASE, ""): value for key, value in state.items() if "lora_" not in key}
    for key in downs:
        name, up = key.removesuffix(_DOWN), state[key.replace(_DOWN, _UP)]
        weight = merged[f"{name}weight"]
        merged[f"{name}weight"] = (weight.float() + up.float() @ state[key].float()).to(weight.dtype)
    return merged
