"""Builds the model of a search, and encodes queries with it."""

import argparse
from pathlib import Path

import torch

from training.eval.encode import ComputeOptions, Encoder
from training.flags.model import tokenizer_arguments
from training.model.assembly.factory import EncoderParts, check_vocabulary, create_model_and_transforms, get_tokenizer
from training.model.assembly.from_flags import find_weights
from training.readers.files import upright
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv, check_device


def make_encoder(args: argparse.Namespace) -> Encoder:
    """Builds the model that the flags of `training.search` ask for.

    Raises:
        ValueError, FileNotFoundError: see `factory.create_model`.
    """
    device = check_device(args.device)
    find_weights(args, device, "its results are random")
    overrides = tokenizer_arguments(vars(args))
    tokenizer = get_tokenizer(args.model, **overrides)
    torch.manual_seed(0)  # an untrained model has the same weights in every call
    model, train_transform, preprocess = create_model_and_transforms(
        args.model, args.pretrained, args.precision, device, **overrides
    )
    check_vocabulary(args.model, model, tokenizer)
    options = ComputeOptions(args.batch_size, args.workers, args.precision, allow_broken=True)
    return Encoder(EncoderParts(model.eval(), preprocess, tokenizer, train_transform), DistEnv(0, 1, device), options)


def encode_query(encoder: Encoder, query: str | Path) -> tuple[torch.Tensor, str]:
    """Encodes a text, or an image file, which is turned upright.

    Returns:
        The features [dim], and a note if the text was truncated (otherwise an empty string).

    Raises:
        BrokenImageError: the file can't be read.
    """
    if isinstance(query, Path):
        found = encoder.images([upright(query)])
        if found.broken:
            raise BrokenImageError(f"--image: {found.broken[0]}")
        return found.features[0], ""
    found = encoder.texts([query])
    lost, length = int(found.lost_tokens[0]), encoder.parts.tokenizer.context_length
    note = f"Query: truncated to the model's {length:,} tokens; the last {lost:,} tokens are ignored." if lost else ""
    return found.features[0], note
