"""Arranges the captions of a batch in buckets by length, so that little padding is computed.

This happens on the CPU, where batches are built, so that no training step has to read lengths back from the device.
The text tower returns features in the original order of the captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

# Fixed cost of a bucket, expressed in tokens: kernel launches, and gradients that are added up; where all buckets are
# computed together on a CPU, of its attention only. Estimates, not measured.
BUCKET_COST_CPU, BUCKET_COST_TOGETHER, BUCKET_COST_GPU = 32, 4, 1024


class Captions(NamedTuple):
    """A batch's captions, arranged for the text tower.

    Attributes:
        buckets: token ids of each bucket, [n_b, L_b], padded.
        index: index of each caption among the captions of all buckets in order, [n] int64.
        num_padded: number of tokens to compute, padding included.
    """

    buckets: tuple[torch.Tensor, ...]
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    num_padded: int

    def to(self, device: torch.device, non_blocking: bool = True) -> "Captions":
        """Returns a copy on a device."""
        buckets = tuple(ids.to(device, non_blocking=non_blocking) for ids in self.buckets)
        return Captions(buckets, self.index.to(device, non_blocking=non_blocking), self.num_padded)


def caption_lengths(ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Returns the length of each caption, up to its last token that is not padding.

    This is not the number of tokens that differ from `pad_id`. That id may also occur within a caption (CLIP's is an
    exclamation mark, and BERT's tokenizer reads ``[PAD]`` in a text as the token), or before it.

    Args:
        ids: [n, seq_len].
        pad_id: id of padding.

    Returns:
        [n] int64.
    """
    return ((ids != pad_id) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(dim=1)


def bucket_bounds(lengths: Sequence[int], cost: int) -> list[int]:
    """Divides captions into buckets so that the total of padded tokens, plus `cost` per bucket, is minimal.

    Args:
        lengths: lengths of the captions, ascending.
        cost: fixed cost of a bucket, in tokens.

    Returns:
        The end of each bucket in `lengths`, ascending; a bucket is as wide as its last caption.
    """
    ends = [i + 1 for i in range(len(lengths)) if i + 1 == len(lengths) or lengths[i + 1] != lengths[i]]
    best, before = {0: 0}, {}
    for end in ends:
        width = lengths[end - 1]
        best[end], before[end] = min((total + (end - start) * width + cost, start) for start, total in best.items())
    bounds, end = [], len(lengths)
    while end:
        bounds.append(end)
        end = before[end]
    return bounds[::-1]


@dataclass(frozen=True)
class CaptionArranger:
    """Arranges the short and long captions of a batch in buckets.

    Attributes:
        pad_id: id of padding.
        bucket_cost: fixed cost of a bucket, in tokens.
        multiple: bucket widths are rounded up to a multiple of this, so that few different shapes occur.
    """

    pad_id: int
    bucket_cost: int = BUCKET_COST_CPU
    multiple: int = 1

    def __call__(self, *groups: torch.Tensor) -> Captions:
        """Arranges captions.

        Args:
            groups: token ids [n, L] or [n, K, L] on the CPU, with [CLS] first and padding last.

        Returns:
            All captions, in the order of the groups.
        """
        flat = [ids.flatten(0, -2) for ids in groups if ids.shape[-2]]
        lengths = torch.cat([caption_lengths(ids, self.pad_id) for ids in flat]).clamp(min=1)
        longest = max(ids.shape[1] for ids in flat)
        ids = torch.cat([nn.functional.pad(ids, (0, longest - ids.shape[1]), value=self.pad_id) for ids in flat])
        widths = (-(-lengths // self.multiple) * self.multiple).clamp(max=longest)
        widths, order = widths.sort(stable=True)
        bounds = bucket_bounds(widths.tolist(), self.bucket_cost)
        buckets = tuple(
            ids[order[start:end], : int(widths[end - 1])].contiguous() for start, end in zip([0, *bounds], bounds)
        )
        return Captions(buckets, order.argsort(), sum(bucket.numel() for bucket in buckets))


MASK_ALIGNMENT = 16  # elements; CUDA's kernels would copy a mask with other strides, for every head and layer


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which a layer computes with hidden states, and which its attention mask should have."""
    device = hidden.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on meta
    return torch.get_autocast_dtype(device) if is_cast else hidden.dtype


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts a boolean mask into one that is added to attention scores: 0 if allowed, else the dtype's lowest number.

    Only this form works with both eager and sdpa attention: transformers 5 silently misinterprets a boolean 4-D mask
    with eager attention. Every query has an allowed key, so rounding to -inf in a smaller dtype does no harm.

    Args:
        allowed: [batch, num_queries, seq_len] bool.
        dtype: dtype in which the layer computes, see `compute_dtype`. In another one, autocast would cast the mask in
            every layer, and keep each copy for the backward pass.

    Returns:
        [batch, 1, num_queries, seq_len], to be broadcast over heads.
    """
    length = allowed.shape[-1]
    hidden = functional.pad(~allowed, (0, -length % MASK_ALIGNMENT))
    mask = torch.zeros(hidden.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, :, :length]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Scaled dot-product attention by the fastest implementation.

    On a CPU, PyTorch's fused kernel does not support dropout, and its backward pass in 16 bits takes up to seven times
    as long as plain matrix products.

    Args:
        query: [n, heads, k, d].
        key, value: [n, heads, seq_len, d].
        allowed: additive mask, broadcast to [n, heads, k, seq_len].
        dropout: probability that a weight is set to 0.

    Returns:
        [n, heads, k, d].
    """
    is_fast = query.dtype in (torch.float32, torch.float64) or not query.requires_grad
    if query.device.type != "cpu" or (is_fast and not dropout):
        return functional.scaled_dot_product_attention(query, key, value, allowed, dropout_p=dropout)
    scores = ((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)).add_(allowed)
    return functional.dropout(scores.softmax(dim=-1), dropout) @ value


def split_into_buckets(
    tokens: torch.Tensor, masks: Sequence[torch.Tensor], num_first: int | None = None
) -> list[torch.Tensor]:
    """Divides the tokens of all captions, one after another, into buckets.

    Args:
        tokens: [total, ...].
        masks: additive mask of each bucket, [n_b, 1, L_b, L_b].
        num_first: number of tokens of each caption; None means all L_b.

    Returns:
        The tokens of each bucket, [n_b, L_b or num_first, ...].
    """
    shapes = [(mask.shape[0], num_first or mask.shape[-1]) for mask in masks]
    buckets = tokens.split([num * length for num, length in shapes])
    return [bucket.unflatten(0, shape) for bucket, shape in zip(buckets, shapes)]


def attend_in_buckets(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: Sequence[torch.Tensor],
    dropout: float,
    num_first: int | None = None,
) -> torch.Tensor:
    """Attention within each caption.

    Args:
        query: [total, heads, d], or only the first `num_first` tokens of each caption.
        key, value: [total, heads, d].
        masks, num_first: see `split_into_buckets`.
        dropout: see `attention`.

    Returns:
        [total, heads, d] of the query's tokens.
    """
    queries = split_into_buckets(query, masks, num_first)
    keys, values = (split_into_buckets(tokens, masks) for tokens in (key, value))
    outputs = []
    for *bucket, mask in zip(queries, keys, values, masks):
        queried, attended, read = (tokens.transpose(1, 2) for tokens in bucket)  # [n_b, heads, L_b, d]
        output = attention(queried, attended, read, mask[:, :, :num_first], dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
