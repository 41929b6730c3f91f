"""Encodes images and queries for the search, with one model on one device."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from training.eval.encode import ComputeOptions, Encoding, encode_images, encode_texts
from training.model.assembly.factory import EncoderParts, create_model_and_transforms, get_tokenizer
from training.model.assembly.from_flags import check_precision
from training.model.names.resolve import resolve_weights
from training.readers.files import upright
from training.readers.images import BrokenImageError
from training.runtime.distributed import DistEnv


class SearchEncoder:
    """Encodes image files and texts.

    Args:
        args: the flags of `training.search`.

    Raises:
        ValueError, FileNotFoundError: see `factory.create_model`.
    """

    def __init__(self, args: argparse.Namespace):
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_precision(args.precision, device)
        if resolve_weights(args.model, args.pretrained, args.cache_dir) is None:
            logging.warning(f"{args.model} is UNTRAINED: no weights are given, so its results are random.")
        overrides = {
            "cache_dir": args.cache_dir,
            "num_corner_tokens": args.num_corner_tokens,
            "context_length": args.context_length,
        }
        tokenizer = get_tokenizer(args.model, **overrides)
        torch.manual_seed(0)  # an untrained model has the same weights in every call
        model, train_transform, preprocess = create_model_and_transforms(
            args.model, args.pretrained, args.precision, device, **overrides
        )
        self.parts = EncoderParts(model.eval(), preprocess, tokenizer, train_transform)
        self._env = DistEnv(0, 1, device)
        self._options = ComputeOptions(args.batch_size, args.workers, args.precision)

    def images(self, paths: Sequence[Path]) -> Encoding:
        """Returns the features of image files, turned upright; unreadable files are listed in `Encoding.broken`."""
        parts, paths = self.parts, [upright(path) for path in paths]
        return encode_images(parts.model, parts.preprocess, paths, self._env, self._options, allow_broken=True)

    def image(self, path: Path) -> torch.Tensor:
        """Returns the features [dim] of an image file.

        Raises:
            BrokenImageError: the file can't be read.
        """
        found = self.images([path])
        if found.broken:
            raise BrokenImageError(f"--image: {found.broken[0]}")
        return found.features[0]

    def text(self, text: str) -> tuple[torch.Tensor, str]:
        """Returns the features [dim] of a text, and a note if it was truncated (otherwise an empty string)."""
        found = encode_texts(self.parts.model, self.parts.tokenizer, [text], self._env, self._options)
        lost = int(found.lost_tokens[0])
        length = self.parts.tokenizer.context_length
        note = (
            f"Query: truncated to the model's {length:,} tokens; the last {lost:,} tokens are ignored." if lost else ""
        )
        return found.features[0], note
