"""Padding in front of a caption's text (pad=front in --text-views), as DeBias-CLIP trains CLIP's text tower."""

import random
from collections.abc import Callable, Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer

from training.data.captions import CaptionRule


def check_front_padding(tokenizer: Callable) -> None:
    """Raises ValueError if a model's text tower doesn't support padding in front of the text."""
    if not isinstance(getattr(tokenizer, "tokenizer", tokenizer), SimpleTokenizer):
        raise ValueError(
            "--text-views pad=front: this model's text tower ignores padding; use a model with CLIP's tokenizer, such "
            "as ViT-B-16, or leave pad=front out"
        )


def front_fractions(name: str, rule: CaptionRule) -> list[float]:
    """Draws, for each text of a sample, the fraction of its padding that is put in front of it.

    Args:
        name: seed of the draws.
        rule: says which texts are padded in front.

    Returns:
        For each text a fraction, 0 <= fraction < 1; 0 for texts that are not padded in front.
    """
    rng = random.Random(f"{name}/front")
    return [rng.random() if entry.front else 0.0 for entry in rule.texts]


def pad_in_front(ids: torch.Tensor, fractions: Sequence[float]) -> torch.Tensor:
    """Moves padding from behind the text to between its start token and its first word.

    Of f padding tokens, floor(fraction x (f + 1)) are moved: 0 to f with equal probability.

    Args:
        ids: int64 [n, context_length] from CLIP's tokenizer, padded with 0.
        fractions: for each row the fraction of its padding to move, 0 <= fraction < 1.

    Returns:
        int64 [n, context_length].

    Source: DeBias-CLIP (CVPR 2026) as other papers describe it; see src/training/recipes/debias-clip.yaml.
    """
    positions = torch.arange(ids.shape[1])
    lengths = ((ids != 0) * (positions + 1)).amax(dim=1)
    fronts = (torch.tensor(fractions, dtype=torch.float64) * (ids.shape[1] - lengths + 1)).long()
    sources = positions - fronts[:, None]
    moved = ids.gather(1, sources.clamp(min=0))
    moved[(sources < 1) & (positions > 0)] = 0
    moved[:, 0] = ids[:, 0]
    return moved
