"""Corner tokens: which token may attend to which, and which hidden states become features. Pure tensor functions.

m corner tokens stand next to the token that a text tower pools ([CLS], or [EOT] in CLIP) and collect what it leaves
out. They are queries only: they attend to the text, but no other token attends to them. With m = 0 all functions here
describe the ordinary tower.

Source: LoTLIP (arXiv 2410.05249), section 3.
"""

from collections.abc import Sequence

import torch


def prefix_attention(keep: torch.Tensor, num_corners: int) -> torch.Tensor:
    """Attention mask for captions that start with [CLS] and then the corners (BERT-like encoders).

    Args:
        keep: [batch, seq_len] bool, True for tokens, False for padding.
        num_corners: m; the corners are at positions 1..m.

    Returns:
        [batch, seq_len, seq_len] bool, entry (query, key). Text attends to [CLS] and text; [CLS] attends to itself
        and text; corner i attends to itself and text; nothing attends to padding.
    """
    position = torch.arange(keep.shape[1], device=keep.device)
    is_corner = (position >= 1) & (position <= num_corners)
    rule = ~is_corner & ~(is_corner[:, None] & (position == 0)) | (position[:, None] == position)
    return rule & keep[:, None, :]


def suffix_attention(end: torch.Tensor, seq_len: int, num_corners: int) -> torch.Tensor:
    """Attention mask for a causal tower (CLIP) with the corners directly before the end token.

    Args:
        end: [batch] int64, position of the end token; the corners are at end - m to end - 1.
        seq_len: number of positions.
        num_corners: m.

    Returns:
        [batch, seq_len, seq_len] bool, entry (query, key): causal, and only a corner itself attends to it, likewise for
        the end token.
    """
    position = torch.arange(seq_len, device=end.device)
    query, key = position[:, None], position[None, :]
    # From the first corner on, keys are corners, the end token, and padding, which the causal order hides anyway.
    is_text_key = position[None, :] < (end - num_corners)[:, None]  # [batch, key]
    return (is_text_key[:, None, :] & (key <= query)) | (query == key)


def pool_without_corners(kind: str, hidden: torch.Tensor, keep: torch.Tensor, num_corners: int) -> torch.Tensor:
    """Mean or maximum over all tokens except padding and corners, then the corners' own states.

    Args:
        kind: ``mean`` or ``max``.
        hidden: [batch, seq_len, width].
        keep: [batch, seq_len] bool, True for tokens, False for padding.
        num_corners: m; the corners are at positions 1..m.

    Returns:
        [batch, m + 1, width].
    """
    position = torch.arange(keep.shape[1], device=keep.device)
    pooled = (keep & ~((position >= 1) & (position <= num_corners)))[..., None]
    if kind == "mean":
        weight = pooled.to(hidden.dtype)
        first = (hidden * weight).sum(1) / weight.sum(1)
    else:
        first = hidden.masked_fill(~pooled, torch.finfo(hidden.dtype).min).amax(1)
    return torch.cat([first[:, None], hidden[:, 1 : num_corners + 1]], dim=1)


def states_at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """States at some positions of each caption: [batch, seq_len, width], [batch, k] -> [batch, k, width]."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def corner_indices(corners: Sequence[bool], num_corners: int) -> tuple[list[int], list[int]]:
    """Returns the indices, among the T text features of a sample, of each corner and of the [CLS] of the same text.

    Args:
        corners: for each text of a sample, whether it has m + 1 features or only that of [CLS].
        num_corners: m.

    Returns:
        For each corner the index of its [CLS], and its own index.
    """
    cls: list[int] = []
    corner: list[int] = []
    start = 0
    for has_corners in corners:
        count = num_corners if has_corners else 0
        cls += [start] * count
        corner += range(start + 1, start + 1 + count)
        start += 1 + count
    return cls, corner


def cosine_with_cls(text_features: torch.Tensor, indices: tuple[list[int], list[int]]) -> torch.Tensor:
    """Mean cosine between the corners and [CLS] of the same text; at 1, all corners equal [CLS].

    Args:
        text_features: [batch, T, dim], normalised.
        indices: result of `corner_indices`, not empty.

    Returns:
        A scalar without a gradient.
    """
    features = text_features.detach().unbind(1)  # an index made of a list would be copied to the device and waited for
    cls, corner = (torch.stack([features[index] for index in side], dim=1) for side in indices)
    return (cls * corner).sum(dim=-1).mean()


def features_of_captions(captions: Sequence[torch.Tensor], corners: Sequence[bool] | None = None) -> torch.Tensor:
    """Arranges the features of several captions per image in the form that the loss expects.

    Args:
        captions: for each caption of an image its features, [batch, m + 1, dim]; the short one first.
        corners: for each caption whether it gives all m + 1 features or only the first, as further captions do; None:
            all but the short caption give all.

    Returns:
        [batch, T, dim] in caption order; by default T = 1 + (num_captions - 1)(m + 1).
    """
    corners = corners or [False] + [True] * (len(captions) - 1)
    wanted = [*corners, *[False] * len(captions)]
    return torch.cat([features if all_ else features[:, :1] for features, all_ in zip(captions, wanted)], dim=1)
