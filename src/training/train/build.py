"""Builds from flags what takes a step: the terms of the loss, the model in DDP, and the `Stepper`."""

import argparse
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from open_clip_train.precision import get_autocast
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training.data.open import caption_rule
from training.flags.effects import caption_entries, reads
from training.loss.caption_loss import LongCaptionLoss, LongCaptionSigLipLoss, LossTerm, reduce_features
from training.model.towers.compiling import compile_layers
from training.model.towers.corner import corner_indices
from training.model.towers.train_model import TrainModel
from training.runtime.arithmetic import tf32
from training.runtime.distributed import DistEnv
from training.runtime.experiment import Experiment
from training.train.resume import LOSS
from training.train.step import Stepper


def make_loss(args: argparse.Namespace, num_corners: int, env: DistEnv) -> nn.Module:
    """Builds the loss.

    Args:
        args: flags.
        num_corners: m of the text tower; 0 for a tower without corner tokens.
        env: this process.
    """
    kind = LongCaptionSigLipLoss if args.siglip else LongCaptionLoss
    return kind(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        terms=loss_terms(args, num_corners),
        rank=env.rank,
        world_size=env.world_size,
        label_smoothing=args.label_smoothing,
        normalisation=args.loss_normalisation,
        gather_dtype=getattr(torch, args.gather_dtype),
    )


def loss_terms(args: argparse.Namespace, num_corners: int) -> list[LossTerm]:
    """Returns the terms of the loss.

    ``--text-views`` gives one term per entry, named after it. Without this flag there is one term for the short caption
    and one for the long captions. A single text feature gives one unweighted term. ``--short-loss-weight`` and
    ``--short-image-components`` apply to the first of several terms, ``--long-loss-weight`` to all others.
    ``--long-text-variance`` appends another term for each term that compares long captions.
    """
    entries = caption_entries(args)
    components = args.short_image_components
    form = None if components is None else partial(reduce_features, components=components)
    first = LossTerm("short_caption_loss", (0,), args.short_loss_weight, image_form=form)
    counts = [entry.count * (num_corners + 1 if entry.corners else 1) for entry in entries]
    if sum(counts) == 1:
        terms, sources = [LossTerm("contrastive_loss", (0,))], [entries]
    elif not args.text_views:
        terms = [first, LossTerm("long_caption_loss", None, args.long_loss_weight)]
        sources = [entries[:1], entries[1:]]
    else:
        bases = [first, *[LossTerm("", weight=args.long_loss_weight)] * (len(entries) - 1)]
        terms = [
            replace(base, name=f"{entry.name}_loss", texts=range(end)[-count:], weight=entry.weight * base.weight)
            for base, entry, count, end in zip(bases, entries, counts, accumulate(counts))
        ]
        sources = [(entry,) for entry in entries]
    if args.long_text_variance is None:
        return terms
    # The same texts, reduced to principal components, with unreduced image features.
    form = partial(reduce_features, variance=args.long_text_variance)
    for term, source in zip(list(terms), sources):
        if reads(source, "long"):
            name, weight = term.name.removesuffix("_loss"), term.weight * args.long_text_variance_weight
            terms.append(LossTerm(f"{name}_component_loss", term.texts, weight, text_form=form))
    return terms


def num_corners(core: torch.nn.Module) -> int:
    """Returns m of a model's text tower; 0 for a tower without corner tokens."""
    return getattr(getattr(core, "text", None), "num_corners", 0)


def wrap_model(args: argparse.Namespace, core: Any, kind: type[TrainModel] = TrainModel) -> TrainModel:
    """Returns both towers as one module that encodes batches of the texts that the flags describe."""
    corners, pixels = [entry.corners for entry in caption_rule(args).texts], core.visual.preprocess_cfg
    return kind(core, pixels["mean"], pixels["std"], corners)


def make_stepper(
    args: argparse.Namespace,
    core: Any,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    env: DistEnv,
    experiment: Experiment | None = None,
) -> Stepper:
    """Builds the `Stepper`, and adds the parameters of an experiment's loss to the optimizer."""
    experiment = experiment or Experiment(args)
    if args.use_bn_sync and env.world_size > 1:
        convert_sync_batchnorm(core)  # timm's, which keeps the activations of its own batch norms
    with core.logit_scale.device:  # what an experiment creates is on the model's device
        average = experiment.make_average(core)
        whole = wrap_model(args, core, experiment.model_class(TrainModel))
        loss = experiment.make_loss(make_loss(args, num_corners(core), env), core)
    ignored = [name for name, _ in whole.named_buffers()]  # all ranks have the same ones
    if isinstance(loss, nn.Module):
        taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        of_loss = {n: p for n, p in loss.named_parameters(LOSS) if p.requires_grad}
        if added := {name: parameter for name, parameter in of_loss.items() if id(parameter) not in taken}:
            options = {"lr": args.lr, "lr_scale": 1.0, "weight_decay": 0.0, "param_names": list(added)}
            optimizer.add_param_group({"params": list(added.values()), **options})
        # `Stepper.backward` averages them over ranks, also those of parts of the model that only the loss calls.
        ids = {id(parameter) for parameter in of_loss.values()}
        ignored += [name for name, parameter in whole.named_parameters() if id(parameter) in ids]
    if args.torchcompile:
        compile_layers(core, only_images=args.torchcompile == "image")
    model: nn.Module = whole
    if env.world_size > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(whole, ignored)
        model = DistributedDataParallel(whole, gradient_as_bucket_view=True)
    return experiment.stepper_class(Stepper)(
        model=model,
        core=core,
        loss=loss,
        optimizer=optimizer,
        autocast=get_autocast(args.precision, device_type=env.device.type),
        scaler=scaler,
        arithmetic=partial(tf32, env.device),
        max_norm=args.grad_clip_norm,
        locked_images=whole.encode_images if whole.image_is_locked else None,
        corners=corner_indices(whole.corners or (), num_corners(core)),
        average=average,
        env=env,
    )
