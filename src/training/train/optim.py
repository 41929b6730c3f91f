"""Optimizer and learning rate: AdamW or one of timm's, open_clip's weight-decay rule, one rate per tower, schedules."""

from collections.abc import Callable, Iterable

import timm.optim
import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr


def parameter_groups(
    model: torch.nn.Module,
    lr: float,
    weight_decay: float,
    image_lr: float | None,
    text_lr: float | None,
    timm_rule: bool = False,
) -> list[dict]:
    """Sorts trained parameters by learning rate and by whether they decay.

    With one rate the result is that of open_clip's trainer, which can resume with such an optimizer: first the vectors,
    biases, norms and scalars, which do not decay, then the rest, both in the model's order.

    Args:
        model: with the image tower under ``visual``; everything but it and the scalars counts as text.
        lr: base learning rate.
        weight_decay: of the matrices.
        image_lr, text_lr: a tower's own rate; None takes `lr`.
        timm_rule: what the model lists as ``no_weight_decay`` (position tables) does not decay either, as under the
            ``timm/NAME`` optimizers of open_clip's trainer.

    Returns:
        Groups with ``lr_scale``, the group's rate relative to the base rate, and ``param_names``, which the optimizer
        saves with its state.
    """
    rates = {"image": image_lr or lr, "text": text_lr or lr, "scalar": lr}
    groups: dict[tuple[bool, float], dict] = {}
    exempt = model.no_weight_decay() if timm_rule and hasattr(model, "no_weight_decay") else ()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay, rate = _decays(name, parameter) and name not in exempt, rates[_part(name)]
        options = {"weight_decay": weight_decay if decay else 0.0, "lr": rate, "lr_scale": rate / lr}
        group = groups.setdefault((decay, rate), {"params": [], "param_names": [], **options})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def _decays(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and not any(word in name for word in ("bn", "ln", "bias"))


def _part(name: str) -> str:
    return "image" if name.startswith("visual.") else "scalar" if name.startswith("logit_") else "text"


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: dict, saved_order: Iterable[str], parameters: dict[str, torch.Tensor]
) -> None:
    """Loads what an optimizer's ``state_dict`` saved, parameter by parameter: the groups may have been others.

    The groups' options (weight decay, betas, rates, ..) stay those that the optimizer was built with.

    Args:
        optimizer: with groups of `parameter_groups`.
        saved: by this project or by open_clip's trainer, which keeps no names.
        saved_order: names in the order of the model that it was saved with.
        parameters: of the model, by name.

    Raises:
        ValueError: the state is that of other parameters.
    """
    own = {name: parameters[name] for group in optimizer.param_groups for name in group["param_names"]}
    names = _saved_names(saved["param_groups"], {name: own[name] for name in saved_order if name in own})
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if [len(group) for group in names] != [len(group["params"]) for group in saved["param_groups"]]:
        raise ValueError(f"its optimizer has {len(numbers)} parameters, the flags train {len(own)}: --lock-* differ")
    state = {name: saved["state"][number] for name, number in zip(sum(names, []), numbers) if number in saved["state"]}
    if state.keys() - own.keys() or (state and own.keys() - state.keys()):
        raise ValueError("its optimizer has other parameters than the flags train: --lock-* differ")
    for name, entries in state.items():
        shapes = {tuple(entries[key].shape) for key in ("exp_avg", "momentum_buffer") if key in entries}
        if shapes - {tuple(own[name].shape)}:
            raise ValueError(
                f"its optimizer's state of {name} has the shape {shapes.pop()}, expected {own[name].shape}"
            )
    groups = optimizer.state_dict()["param_groups"]
    numbered = {n: state[name] for g in groups for n, name in zip(g["params"], g["param_names"]) if name in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _saved_names(groups: list[dict], trained: dict[str, torch.Tensor]) -> list[list[str]]:
    """Returns the names of each saved group's parameters.

    Args:
        groups: with names, or as open_clip's trainer or earlier versions of this project sort parameters.
        trained: parameters by name, in the order of the model that was saved.
    """
    if all("param_names" in group for group in groups):
        return [group["param_names"] for group in groups]
    names: dict[object, list[str]] = {False: [], True: []} if len(groups) == 2 else {}
    for name, parameter in trained.items():
        decays = _decays(name, parameter)
        names.setdefault(decays if len(groups) == 2 else (_part(name), decays), []).append(name)
    return list(names.values())


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
