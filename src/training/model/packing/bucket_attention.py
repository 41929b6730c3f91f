"""Attention within the captions of several buckets, while the linear layers run on the tokens of all buckets at once.

One large matrix product is faster than one per bucket, and the gradient of a weight, or of the embedding table, is
computed once and not added up over the buckets. Attention is the only part that needs the buckets apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from training.model.packing.attention import additive_mask, attention


class BucketMask(NamedTuple):
    """The attention mask of all buckets, whose captions are concatenated in the order of the buckets.

    Attributes:
        shapes: number of captions and padded length (n_b, L_b) of each bucket.
        allowed: additive mask of each bucket, [n_b, 1, L_b, L_b].
    """

    shapes: tuple[tuple[int, int], ...]
    allowed: tuple[torch.Tensor, ...]

    def split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Divides [total, ...] into the buckets, [n_b, L_b, ...] each."""
        parts = tokens.split([num * length for num, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes)]

    def first_tokens(self, count: int, device: torch.device) -> torch.Tensor:
        """Returns the index of the first tokens of each caption among all tokens, [n, count]."""
        starts, before = [], 0
        for num, length in self.shapes:
            starts.append(before + length * torch.arange(num, device=device))
            before += num * length
        return torch.cat(starts)[:, None] + torch.arange(count, device=device)


def make_bucket_mask(allowed: Sequence[torch.Tensor], dtype: torch.dtype) -> BucketMask:
    """Returns the mask of buckets whose tokens may attend as `allowed` says, [n_b, L_b, L_b] bool each."""
    return BucketMask(tuple(rule.shape[:2] for rule in allowed), tuple(additive_mask(rule, dtype) for rule in allowed))


def attend_in_buckets(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BucketMask, dropout: float, scaling: float
) -> torch.Tensor:
    """Attention within each caption: [1, heads, total, d] each -> [1, total, heads, d]."""
    parts = (mask.split(rows.transpose(1, 2).flatten(0, 1)) for rows in (query, key, value))
    seen = []
    for *inputs, allowed in zip(*parts, mask.allowed):
        by_head = (rows.transpose(1, 2) for rows in inputs)
        seen.append(attention(*by_head, allowed, dropout, scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(seen)[None]
