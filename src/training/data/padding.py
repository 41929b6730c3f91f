"""Padding in front of a caption's text (--text-views .. pad=front), as DeBias-CLIP trains CLIP's own text tower."""

import random
from collections.abc import Callable, Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer

from training.data.captions import CaptionRule


def check_front_padding(tokenizer: Callable) -> None:
    """Raises ValueError if a model's text tower can't have padding in front of the text."""
    if not isinstance(getattr(tokenizer, "tokenizer", tokenizer), SimpleTokenizer):
        raise ValueError(
            "--text-views pad=front: this model's text tower ignores padding; take one with CLIP's tokenizer, such as "
            "ViT-B-16, or leave pad=front out"
        )


def front_shares(stream: str, keys: Sequence[str], rule: CaptionRule) -> list[list[float]]:
    """Draws which share of the free places of each text goes in front of it.

    Args:
        stream: names the random stream; with a sample's key it seeds the draws of that sample.
        keys: of the samples.
        rule: says which texts are padded in front.

    Returns:
        By sample and text: from 0 to below 1, 0 where it is not wanted.
    """
    wanted = [entry.front for entry in rule.texts]
    if not any(wanted):
        return [[0.0] * len(wanted)] * len(keys)
    streams = [random.Random(f"{stream}/{key}/front") for key in keys]
    return [[own.random() if front else 0.0 for front in wanted] for own in streams]


def pad_in_front(ids: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """Moves padding from behind the text to between its start token and its first word.

    With f free places, floor(share x (f + 1)) of them go in front: 0 to f, evenly.

    Args:
        ids: [n, context_length] of CLIP's tokenizer, padded with 0.
        shares: of each row's free places.

    Source: DeBias-CLIP (CVPR 2026) as others describe it; see scripts/recipes/debias-clip.yaml.
    """
    places = torch.arange(ids.shape[1])
    lengths = ((ids != 0) * (places + 1)).amax(dim=1)
    fronts = (torch.tensor(shares, dtype=torch.float64) * (ids.shape[1] - lengths + 1)).long()
    sources = places - fronts[:, None]
    moved = ids.gather(1, sources.clamp(min=0))
    moved[(sources < 1) & (places > 0)] = 0
    moved[:, 0] = ids[:, 0]
    return moved
