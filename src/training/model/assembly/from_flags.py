"""Builds models from flags, for both evaluation and training."""

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder

from training.data.images import parse_augmentation, strong_augmentation
from training.flags.model import AUTO, model_arguments, tokenizer_arguments
from training.model.assembly.factory import EncoderParts, check_vocabulary, create_model_and_transforms, get_tokenizer
from training.model.names.config import POOLING, resolve_model_config, resolve_weights
from training.model.packing import BUCKET_COST_CPU, BUCKET_COST_GPU, BUCKET_COST_TOGETHER, CaptionArranger
from training.model.towers.encoders import text_encoder
from training.model.towers.locking import freeze_batch_norm_statistics
from training.model.weights.adapters import add_adapters

CPU_PRECISIONS = ("fp32", "bf16", "pure_bf16", "amp_bf16", "amp_bfloat16")
_SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # as in open_clip's SigLIP configs


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError if the device does not support a precision."""
    if device.type == "cpu" and precision not in CPU_PRECISIONS:
        raise ValueError(f"--precision {precision} needs a GPU; on CPU use one of {', '.join(CPU_PRECISIONS)}")


def find_weights(args: argparse.Namespace, device: torch.device, untrained: str) -> Path | None:
    """Returns the weights file that the flags name; without one, warns that the model is untrained.

    Args:
        args: flags of the model.
        device: where it will run.
        untrained: what this means for the results.

    Raises:
        ValueError, FileNotFoundError: the precision or the weights can't be used.
    """
    check_precision(args.precision, device)
    weights = resolve_weights(args.model, args.pretrained, args.cache_dir)
    if weights is None:
        logging.warning(f"{args.model} is UNTRAINED: no weights are given, so {untrained}.")
    return weights


def check_pooling(name: str, cache_dir: str | None) -> None:
    """Raises ValueError for a model without text-conditioned pooling, which ``--rerank`` needs."""
    if not resolve_model_config(name, cache_dir=cache_dir).model_cfg.get(POOLING):
        raise ValueError(
            f"--rerank: --model {name} has no text-conditioned pooling; use --model flair-ViT-B-16, or omit --rerank"
        )


def build_from_flags(args: argparse.Namespace, device: torch.device) -> EncoderParts:
    """Builds the tokenizer and the model that the flags ask for, in eval mode and with the locked parts frozen.

    Every rank builds the same weights, because random weights are drawn with ``--seed``.

    Raises:
        ValueError, FileNotFoundError: see `factory.create_model`.
    """
    torch.manual_seed(args.seed)
    tokenizer = get_tokenizer(args.model, **tokenizer_arguments(vars(args)))
    model, train_transform, transform = create_model_and_transforms(
        args.model,
        args.pretrained,
        precision="fp32" if args.precision == AUTO else args.precision,
        device=device,
        pretrained_image=args.pretrained_image,
        pretrained_text=bool(args.train_data) if args.pretrained_text is None else args.pretrained_text,
        aug_cfg=parse_augmentation(args.aug_cfg),
        **(_SIGLIP if args.siglip else {}),
        **model_arguments(vars(args)),
    )
    check_vocabulary(args.model, model, tokenizer)
    if args.aug_cfg == ["none"]:
        train_transform = transform
    if args.strong_augment:
        cfg = model.visual.preprocess_cfg
        train_transform = strong_augmentation(cfg["size"], cfg["mean"], cfg["std"])
    if args.lock_image:
        model.lock_image_tower(unlocked_groups=args.lock_image_unlocked_groups)
        if args.lock_image_freeze_bn_stats:
            freeze_batch_norm_statistics(model.visual)
    if args.lock_text:
        # open_clip's own text tower can only freeze its layer norms together with all other weights.
        text = getattr(model, "text", model)
        norms_apart = getattr(text, "locks_norms_apart", isinstance(text, HFTextEncoder))
        model.lock_text_tower(
            unlocked_layers=args.lock_text_unlocked_layers,
            freeze_layer_norm=args.lock_text_freeze_layer_norm or not norms_apart,
        )
    if args.train_data and args.logit_scale is not None:
        torch.nn.init.constant_(model.logit_scale, math.log(args.logit_scale))
    if args.train_data and args.lock_logit_scale:
        model.logit_scale.requires_grad_(False)
    if args.train_data and args.lora:
        add_adapters(model, args.lora)
    arrange = make_arranger(model, args.text_packing, device) if args.train_data else None
    return EncoderParts(model.eval(), transform, tokenizer, train_transform, arrange)


def make_arranger(model: Any, mode: str, device: torch.device) -> CaptionArranger | None:
    """Returns the arranger of ``--text-packing`` for a model's captions; None leaves the captions padded.

    Args:
        model: one of our models or of open_clip's, or one of our text towers.
        mode: ``auto``, ``padded`` or ``buckets``.
        device: device of the model.

    Raises:
        ValueError: the model's text tower does not support the mode.
    """
    encoder = text_encoder(model)
    if mode == "padded" or (mode == "auto" and encoder.pad_id is None):
        return None
    if encoder.pad_id is None:
        raise ValueError(f"--text-packing {mode}: this model's text tower attends to padding; use auto or padded")
    if device.type == "cuda":
        return CaptionArranger(encoder.pad_id, BUCKET_COST_GPU, multiple=8)
    return CaptionArranger(encoder.pad_id, BUCKET_COST_TOGETHER if encoder.joins_buckets else BUCKET_COST_CPU)
