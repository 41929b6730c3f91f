"""Corner tokens as arithmetic: who may attend to whom, and which hidden states become features. Pure tensors.

m corner tokens stand beside the token that a text tower pools ([CLS], or [EOT] in CLIP) and collect what it leaves
out. They are queries only: they read the text, nobody reads them. With m = 0 everything here is the ordinary tower.

Source: LoTLIP (arXiv 2410.05249), section 3.
"""

from collections.abc import Sequence

import torch


def prefix_attention(keep: torch.Tensor, num_corners: int, num_queries: int | None = None) -> torch.Tensor:
    """Who may attend to whom where [CLS] and then the corners lead the caption (BERT and its kin).

    Args:
        keep: [batch, seq_len] bool, True for tokens, False for padding.
        num_corners: m; the corners are at positions 1..m.
        num_queries: of the first positions alone; None takes all.

    Returns:
        [batch, num_queries, seq_len] bool, entry (query, key). Text sees [CLS] and text; [CLS] sees itself and text;
        corner i sees itself and text; nobody sees padding.
    """
    position = torch.arange(keep.shape[1], device=keep.device)
    query, key = position[:num_queries, None], position[None, :]
    is_corner = (position >= 1) & (position <= num_corners)
    rule = ~is_corner[None, :] & ~(is_corner[:num_queries, None] & (key == 0)) | (query == key)
    return rule & keep[:, None, :]


def suffix_attention(end: torch.Tensor, seq_len: int, num_corners: int) -> torch.Tensor:
    """Who may attend to whom where the corners stand right before the end token of a causal tower (CLIP).

    Args:
        end: [batch] int64, position of the end token; the corners are at end - m .. end - 1.
        seq_len: number of positions.
        num_corners: m.

    Returns:
        [batch, seq_len, seq_len] bool, entry (query, key): causal, and a corner or the end token is seen
        by itself only.
    """
    position = torch.arange(seq_len, device=end.device)
    query, key = position[:, None], position[None, :]
    # Keys from the first corner on: corners, the end token, and padding, which the causal order hides anyway.
    is_text_key = position[None, :] < (end - num_corners)[:, None]  # [batch, key]
    return (is_text_key[:, None, :] & (key <= query)) | (query == key)


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turns a boolean mask into what is added to attention scores: 0 where allowed, else the type's lowest number.

    The only form that is right with eager and sdpa attention alike: transformers 5 misreads a boolean 4-D mask under
    eager, silently. Every query keeps a key, so rounding to -inf in a smaller type does no harm.

    Args:
        allowed: [batch, seq_len, seq_len] bool.
        dtype: that of the hidden states.

    Returns:
        [batch, 1, seq_len, seq_len], broadcast over heads.
    """
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)[:, None]


def mean_without_corners(hidden: torch.Tensor, keep: torch.Tensor, num_corners: int) -> torch.Tensor:
    """Mean over all tokens but padding and corners: [batch, seq_len, width] -> [batch, width]."""
    weight = _without_corners(keep, num_corners).to(hidden.dtype)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1)


def max_without_corners(hidden: torch.Tensor, keep: torch.Tensor, num_corners: int) -> torch.Tensor:
    """Maximum over all tokens but padding and corners: [batch, seq_len, width] -> [batch, width]."""
    left_out = ~_without_corners(keep, num_corners)[..., None]
    return hidden.masked_fill(left_out, torch.finfo(hidden.dtype).min).amax(1)


def _without_corners(keep: torch.Tensor, num_corners: int) -> torch.Tensor:
    position = torch.arange(keep.shape[1], device=keep.device)
    return keep & ~((position >= 1) & (position <= num_corners))


def rows_before_end(hidden: torch.Tensor, end: torch.Tensor, num_corners: int) -> torch.Tensor:
    """The end token's hidden state, then the corners': [batch, seq_len, width] -> [batch, m + 1, width]."""
    offset = torch.arange(-num_corners - 1, 0, device=end.device).roll(1) + 1  # 0, -m, .., -1
    index = (end[:, None] + offset)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)


def corner_places(corners: Sequence[bool], num_corners: int) -> tuple[list[int], list[int]]:
    """Where, among the T text features of a sample, [CLS] and the corners of the same text lie.

    Args:
        corners: for each text of a sample, whether it has m + 1 features, not [CLS]'s alone.
        num_corners: m.

    Returns:
        For each corner the place of its [CLS], and its own.
    """
    cls, own, start = [], [], 0
    for has_corners in corners:
        count = num_corners if has_corners else 0
        cls += [start] * count
        own += range(start + 1, start + 1 + count)
        start += 1 + count
    return cls, own


def cosine_with_cls(text_features: torch.Tensor, places: tuple[list[int], list[int]]) -> torch.Tensor:
    """Mean cosine of the corners with [CLS] of the same text: at 1 they are copies. A scalar without a gradient.

    Args:
        text_features: [batch, T, dim], normalised.
        places: of `corner_places`, not empty.
    """
    features = text_features.detach()
    return (features[:, places[0]] * features[:, places[1]]).sum(dim=-1).mean()


def features_of_captions(features: torch.Tensor, batch: int) -> torch.Tensor:
    """Arranges the features of several captions per image as the loss takes them.

    Args:
        features: [batch x num_captions, m + 1, dim], the captions of an image one after another; caption 0 is the short
            one.
        batch: number of images.

    Returns:
        [batch, T, dim] with T = 1 + (num_captions - 1)(m + 1): of the short caption the first feature alone, of each
        long one all m + 1, in caption order.
    """
    features = features.unflatten(0, (batch, -1))  # [batch, num_captions, m + 1, dim]
    return torch.cat([features[:, 0, :1], features[:, 1:].flatten(1, 2)], dim=1)
