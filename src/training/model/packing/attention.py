"""Scaled dot-product attention with an additive mask, for one batch or for several buckets of captions.

With buckets, the linear layers of a tower run on the tokens of all buckets at once: one large matrix product is faster
than one per bucket, and the gradient of a weight, or of the embedding table, is computed once and not added up over the
buckets. Attention is the only part that needs the buckets apart.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor,
    dropout: float,
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
        by_head = (tokens.transpose(1, 2) for tokens in bucket)  # [n_b, heads, L_b, d]
        output = attention(*by_head, mask[:, :, :num_first], dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
