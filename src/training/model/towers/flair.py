"""FLAIR's text-conditioned pooling: an image gets a separate feature for each text that it is compared with.

Source: Xiao et al., FLAIR: VLM with Fine-grained Language-informed Image Representations, CVPR 2025.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

MAX_PAIRS = 8192  # pairs of an image and a text per block: attention of 8 heads over 196 patches takes 50 MB


class TextConditionedPooling(nn.Module):
    """Attention of texts over the patches of an image, with an additional all-zero key for texts that match no patch.

    Args:
        dim: dimension of the features.
        heads: number of attention heads.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.ln_q, self.ln_k, self.ln_v = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True, add_zero_attn=True)

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Pools the patches of each image for each text.

        Args:
            queries: [batch, num_texts, dim], text features that are not normalised.
            patches: [batch, num_patches, dim].

        Returns:
            [batch, num_texts, dim], not normalised.
        """
        keys, values = self.ln_k(patches), self.ln_v(patches)
        return self.attn(self.ln_q(queries), keys, values, need_weights=False)[0]


def encode_with_patches(visual: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the features of images and of their patches in one pass; patches are projected like the pooled token.

    Args:
        visual: a vision transformer of open_clip, or of timm behind open_clip's adapter.
        pixels: [batch, 3, H, W].

    Returns:
        [batch, dim] and [batch, num_patches, dim], not normalised.
    """
    found = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
    (patches,), projection = found["image_intermediates"], getattr(visual, "proj", None)
    return found["image_features"], visual.head(patches) if projection is None else patches @ projection


def conditioned_scores(
    pooling: nn.Module, queries: torch.Tensor, patches: torch.Tensor, max_pairs: int = MAX_PAIRS
) -> torch.Tensor:
    """Cosines between texts and the features that they pool from images, computed in blocks of pairs.

    Args:
        pooling: a `TextConditionedPooling`.
        queries: [batch, num_texts, dim], text features that are not normalised.
        patches: [batch, num_patches, dim].
        max_pairs: maximum number of pairs of an image and a text in a block.

    Returns:
        [batch, num_texts] float32.
    """
    num_texts = min(queries.shape[1], max_pairs)
    num_images = max(1, max_pairs // num_texts)
    rows = []
    for texts, images in zip(queries.split(num_images), patches.split(num_images)):
        blocks = []
        for block in texts.split(num_texts, dim=1):
            pooled = normalize(pooling(block, images).float(), dim=-1)
            blocks.append((pooled * normalize(block.float(), dim=-1)).sum(dim=-1))
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows)
