"""Optimizer and learning rate: AdamW with open_clip's weight-decay rule, one rate per tower, schedules by name."""

from collections.abc import Callable

import torch
from open_clip_train.scheduler import const_lr, cosine_lr


def parameter_groups(
    model: torch.nn.Module, lr: float, weight_decay: float, image_lr: float | None, text_lr: float | None
) -> list[dict]:
    """Sorts trained parameters by tower and by whether they decay (vectors, biases, norms and the logit scale do not).

    Args:
        model: with the image tower under ``visual``; everything but it and the scalars counts as text.
        lr: base learning rate.
        weight_decay: of the matrices.
        image_lr, text_lr: a tower's own rate; None takes `lr`.

    Returns:
        Groups with ``lr_scale``, the group's rate relative to the base rate.
    """
    groups: dict[tuple[str, bool], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "image" if name.startswith("visual.") else "scalar" if name.startswith("logit_") else "text"
        decays = parameter.ndim >= 2 and not any(word in name for word in ("bn", "ln", "bias"))
        groups.setdefault((part, decays), []).append(parameter)
    rates = {"image": image_lr or lr, "text": text_lr or lr, "scalar": lr}
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr": rates[part],
            "lr_scale": rates[part] / lr,
        }
        for (part, decays), parameters in groups.items()
    ]


def make_schedule(
    optimizer: torch.optim.Optimizer, name: str, lr: float, warmup: int, total_steps: int
) -> Callable[[int], float]:
    """Returns step -> base learning rate, which it also gives the optimizer, each group by its ``lr_scale``.

    Args:
        optimizer: with groups of `parameter_groups`.
        name: ``cosine`` (to zero at the end) or ``const``; both warm up linearly.
        lr: base learning rate.
        warmup: steps.
        total_steps: of the whole training.
    """
    assign = {"cosine": cosine_lr, "const": const_lr}[name](optimizer, lr, warmup, total_steps)

    def schedule(step: int) -> float:
        rate = assign(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    return schedule
