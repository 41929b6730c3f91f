"""Image features of any two-tower model, for evaluation and for feature files."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from training.model.towers.locking import linear_head

# Larger tensors leave the processor's caches, and the allocator returns them to the system after each use. Measured on
# two cores with 224-pixel images, 8 at a time instead of 64: ViT-B/16 1.4, ResNet-50 1.6, EfficientNet-lite0 1.9 times
# as fast, ViT-B/32 1.06.
IMAGES_AT_ONCE_ON_CPU = 8
_USUAL = (CLIP.encode_image, CustomTextCLIP.encode_image)  # nothing but the tower


def image_encoder(model: Any, without_head: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that encodes images, `in_chunks`.

    Args:
        model: in eval mode, so that the features of an image do not depend on the others of its batch.
        without_head: leave out the tower's `locking.linear_head`, if it has one.

    Returns:
        Images [batch, 3, H, W] -> [batch, dim], or [batch, trunk_dim] without the head; not normalised.
    """
    visual: Any = getattr(model, "visual", None)
    encode = model.encode_image
    if without_head and linear_head(visual) is not None:
        encode = visual.trunk
    elif getattr(type(model), "encode_image", None) in _USUAL and _pools_class_token(visual):
        encode = partial(_class_token_features, visual)
    return partial(in_chunks, encode)


def _pools_class_token(visual: Any) -> bool:
    """Returns whether `_class_token_features` computes what this tower does: open_clip's usual transformer."""
    if type(visual) is not VisionTransformer or visual.attn_pool is not None or visual.output_tokens:
        return False
    blocks = visual.transformer.resblocks
    usual = type(blocks[-1]) is ResidualAttentionBlock and type(blocks[-1].attn) is nn.MultiheadAttention
    return visual.pool_type == "tok" and visual.proj is not None and len(blocks) > 1 and usual


def _class_token_features(visual: Any, images: torch.Tensor) -> torch.Tensor:
    """Features [batch, dim] of images [batch, 3, H, W]; of the last block, only the class token is computed.

    Its keys and values need all tokens, but everything else only the one that is pooled: of 12 blocks, a fourteenth of
    all operations is saved.
    """
    last, number = visual.transformer.resblocks[-1], len(visual.transformer.resblocks) - 2
    how = {"stop_early": True, "intermediates_only": True, "output_fmt": "NLC", "output_extra_tokens": True}
    found = visual.forward_intermediates(images, indices=[number], **how)
    tokens = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
    hidden = last.ln_1(tokens)
    pooled = tokens[:, :1] + last.ls_1(last.attn(hidden[:, :1], hidden, hidden, need_weights=False)[0])
    pooled = pooled + last.ls_2(last.mlp(last.ln_2(pooled)))
    return visual.ln_post(pooled[:, 0]) @ visual.proj


def in_chunks(tower: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Applies a tower to images [batch, 3, H, W], on a CPU to `IMAGES_AT_ONCE_ON_CPU` of them at a time."""
    if images.device.type != "cpu":
        return tower(images)
    return torch.cat([tower(chunk) for chunk in images.split(IMAGES_AT_ONCE_ON_CPU)])
