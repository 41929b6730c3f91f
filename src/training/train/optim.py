"""Optimizer and learning rate: AdamW or one of timm's, open_clip's weight-decay rule, one rate per tower, schedules."""

from collections.abc import Callable

import timm.optim
import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr


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


def make_optimizer(
    groups: list[dict], name: str, lr: float, betas: tuple[float, float], eps: float, momentum: float | None = None
) -> torch.optim.Optimizer:
    """Returns the optimizer of groups of `parameter_groups`.

    Args:
        groups: with their own rates and weight decays.
        name: ``adamw``, or ``timm/NAME``.
        lr: base learning rate.
        betas, eps, momentum: given to the optimizers that have them; momentum None is the optimizer's own.

    Raises:
        ValueError: timm has no such optimizer.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    name = name.removeprefix("timm/")
    if name not in timm.optim.list_optimizers():
        raise ValueError(f"--opt timm/{name}: unknown to timm; it has {', '.join(timm.optim.list_optimizers())}")
    info = timm.optim.get_optimizer_info(name)
    options = {"betas": betas} if info.has_betas and info.num_betas == 2 else {}
    if info.has_momentum and momentum is not None:
        options["momentum"] = momentum
    return timm.optim.create_optimizer_v2(groups, name, lr=lr, weight_decay=0.0, eps=eps, **options)


def make_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    lr: float,
    warmup: int,
    total_steps: int,
    cooldown_steps: int = 0,
    cooldown_power: float = 1.0,
    cooldown_end: float = 0.0,
) -> Callable[[int], float]:
    """Returns step -> base learning rate, which it also gives the optimizer, each group by its ``lr_scale``.

    Args:
        optimizer: with groups of `parameter_groups`.
        name: ``cosine`` (to zero at the end), ``const``, or ``const-cooldown``; all warm up linearly.
        lr: base learning rate.
        warmup: steps.
        total_steps: of the whole training.
        cooldown_steps: of ``const-cooldown``: the last steps, in which the rate falls.
        cooldown_power: 1 falls linearly.
        cooldown_end: the rate at the end.
    """
    if name == "const-cooldown":
        assign = const_lr_cooldown(optimizer, lr, warmup, total_steps, cooldown_steps, cooldown_power, cooldown_end)
    else:
        assign = {"cosine": cosine_lr, "const": const_lr}[name](optimizer, lr, warmup, total_steps)

    def schedule(step: int) -> float:
        rate = assign(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    return schedule
