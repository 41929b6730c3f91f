"""Scaled dot-product attention with an additive mask."""

import torch
from torch.nn import functional


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Converts a boolean mask into one that is added to attention scores: 0 if allowed, else the dtype's lowest number.

    Only this form works with both eager and sdpa attention: transformers 5 silently misinterprets a boolean 4-D mask
    with eager attention. Every query has an allowed key, so rounding to -inf in a smaller dtype does no harm.

    Args:
        allowed: [batch, num_queries, seq_len] bool.
        dtype: dtype of the hidden states.

    Returns:
        [batch, 1, num_queries, seq_len], to be broadcast over heads.
    """
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)[:, None]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor,
    dropout: float,
    scaling: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention by the fastest implementation.

    On a CPU, PyTorch's fused kernel does not support dropout, and its backward pass in 16 bits takes up to seven times
    as long as plain matrix products.

    Args:
        query: [n, heads, k, d].
        key, value: [n, heads, seq_len, d].
        allowed: additive mask, broadcast to [n, heads, k, seq_len].
        dropout: probability that a weight is set to 0.
        scaling: of the scores; None is 1 / sqrt(d).

    Returns:
        [n, heads, k, d].
    """
    if query.device.type != "cpu" or (not dropout and query.dtype in (torch.float32, torch.float64)):
        return functional.scaled_dot_product_attention(query, key, value, allowed, dropout_p=dropout, scale=scaling)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = ((query * scaling) @ key.transpose(-1, -2)).add_(allowed)
    return functional.dropout(scores.softmax(dim=-1), dropout) @ value
