"""Optimizer and learning rate: AdamW or timm's optimizers, open_clip's weight-decay rule, tower rates, schedules."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm.optim
import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr


def parameter_groups(
    model: Any, lr: float, weight_decay: float, image_lr: float | None, text_lr: float | None, timm_rule: bool = False
) -> list[dict]:
    """Groups trainable parameters by learning rate and weight decay.

    With a single rate, the groups are those of open_clip's trainer, which can therefore resume with such an optimizer:
    first vectors, biases, norms and scalars, which have no weight decay, then all others, both in the model's order.

    Args:
        model: a model with an image tower ``visual``; all other parameters except the scalars count as text.
        lr: base learning rate.
        weight_decay: weight decay of matrices.
        image_lr, text_lr: learning rates of the towers; None uses `lr`.
        timm_rule: also exclude parameters that the model lists in ``no_weight_decay`` (position tables), like the
            ``timm/NAME`` optimizers of open_clip's trainer.

    Returns:
        Groups with ``lr_scale``, the group's rate relative to the base rate, and ``param_names``, which the optimizer
        saves with its state.
    """
    groups: dict[tuple[bool, float], dict] = {}
    exempt = model.no_weight_decay() if timm_rule and hasattr(model, "no_weight_decay") else ()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower_lr = image_lr if name.startswith("visual.") else None if name.startswith("logit_") else text_lr
        decay, rate = _decays(name, parameter) and name not in exempt, tower_lr or lr
        options = {"weight_decay": weight_decay if decay else 0.0, "lr": rate, "lr_scale": rate / lr}
        group = groups.setdefault((decay, rate), {"params": [], "param_names": [], **options})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def _decays(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and not any(word in name for word in ("bn", "ln", "bias"))


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: dict, saved_order: Iterable[str], parameters: Mapping[str, torch.Tensor]
) -> None:
    """Loads an optimizer's saved state parameter by parameter, even if it was saved with other groups.

    The groups' options (weight decay, betas, rates, ...) are not loaded; the optimizer keeps its own.

    Args:
        optimizer: an optimizer with the groups of `parameter_groups`.
        saved: ``state_dict`` of an optimizer of this project or of open_clip's trainer, which stores no names.
        saved_order: names of the parameters in the order of the model that was saved.
        parameters: parameters of the model, by name.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    trained = {name: parameters[name] for group in optimizer.param_groups for name in group["param_names"]}
    names = _saved_names(saved["param_groups"], {name: trained[name] for name in saved_order if name in trained})
    numbers = [group["params"] for group in saved["param_groups"]]
    named = zip(sum(names, []), sum(numbers, []))
    state = {name: saved["state"][number] for name, number in named if number in saved["state"]}
    if list(map(len, names)) != list(map(len, numbers)) or state and state.keys() != trained.keys():
        raise ValueError(f"its optimizer has other parameters than the {len(trained)} to train: --lock-* differ")
    for name, entries in state.items():
        shapes = [list(entries[key].shape) for key in ("exp_avg", "momentum_buffer") if key in entries]
        if shapes and shapes[0] != (shape := list(trained[name].shape)):
            raise ValueError(f"its optimizer's state of {name} has the shape {shapes[0]}, expected {shape}")
    groups = optimizer.state_dict()["param_groups"]
    pairs = [pair for group in groups for pair in zip(group["params"], group["param_names"]) if pair[1] in state]
    numbered = {n: {key: _copy(value, trained[name]) for key, value in state[name].items()} for n, name in pairs}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _copy(value: object, parameter: torch.Tensor) -> object:
    """Copies a tensor of the state, which may be mapped from a file, to its parameter's device; scalars stay."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(parameter.device if value.ndim else value.device, copy=True)


def _saved_names(groups: list[dict], trained: dict[str, torch.Tensor]) -> list[list[str]]:
    """Returns the names of each saved group's parameters.

    Args:
        groups: saved groups, with names, or without names as saved by open_clip's trainer.
        trained: trainable parameters by name, in the order of the model that was saved.
    """
    if all("param_names" in group for group in groups):
        return [group["param_names"] for group in groups]
    return [[name for name, p in trained.items() if _decays(name, p) == decays] for decays in (False, True)]


def make_optimizer(
    groups: list[dict], name: str, lr: float, betas: tuple[float, float], eps: float, momentum: float | None = None
) -> torch.optim.Optimizer:
    """Creates the optimizer.

    Args:
        groups: result of `parameter_groups`.
        name: ``adamw``, or ``timm/NAME``.
        lr: base learning rate.
        betas, eps, momentum: passed to optimizers that have these options; momentum None uses the optimizer's default.

    Raises:
        ValueError: timm has no such optimizer.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    name = name.removeprefix("timm/")
    if name not in (known := timm.optim.list_optimizers()):
        raise ValueError(f"--opt timm/{name}: unknown to timm; it has {', '.join(map(str, known))}")
    info = timm.optim.get_optimizer_info(name)
    options: dict[str, Any] = {"betas": betas} if info.has_betas and info.num_betas == 2 else {}
    if info.has_momentum and momentum is not None:
        options["momentum"] = momentum
    return timm.optim.create_optimizer_v2(groups, name, lr=lr, weight_decay=0.0, eps=eps, **options)


def optimizer_from_flags(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Creates the optimizer of a model's trainable parameters that the flags describe."""
    groups = parameter_groups(model, args.lr, args.wd, args.image_lr, args.text_lr, args.opt.startswith("timm/"))
    return make_optimizer(groups, args.opt, args.lr, (args.beta1, args.beta2), args.eps, args.momentum)


def make_schedule(
    optimizer: torch.optim.Optimizer, name: str, lr: float, warmup: int, total_steps: int, *cooldown: float
) -> Callable[[int], float]:
    """Returns a function that sets the optimizer's learning rates for a step and returns the base learning rate.

    Args:
        optimizer: an optimizer with the groups of `parameter_groups`, whose ``lr_scale`` multiplies the base rate.
        name: ``cosine`` (to zero at the end), ``const``, or ``const-cooldown``; all start with a linear warm-up.
        lr: base learning rate.
        warmup: number of warm-up steps.
        total_steps: number of steps of the whole training.
        cooldown: with ``const-cooldown``, number of steps at the end in which the rate decays, exponent of the decay
            (1 is linear), and final learning rate.
    """
    if name == "const-cooldown":
        assign = const_lr_cooldown(optimizer, lr, warmup, total_steps, *cooldown)
    else:
        assign = {"cosine": cosine_lr, "const": const_lr}[name](optimizer, lr, warmup, total_steps)

    def schedule(step: int) -> float:
        rate = assign(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    return schedule
