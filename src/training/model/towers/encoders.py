"""Features of images and texts of any two-tower model; texts without their padding where the tower allows it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

from training.model.packing import Captions, caption_lengths
from training.model.towers.clip_tower import CLIP_PAD_ID, causal_features
from training.model.towers.locking import linear_head
from training.model.towers.text_tower import TextTower

# Larger tensors leave the processor's caches, and the allocator returns them to the system after each use. Measured on
# two cores with 224-pixel images, 8 at a time instead of 64: ViT-B/16 1.4, ResNet-50 1.6, EfficientNet-lite0 1.9 times
# as fast, ViT-B/32 1.06.
IMAGES_AT_ONCE_ON_CPU = 8
_USUAL = (CLIP.encode_image, CustomTextCLIP.encode_image)  # nothing but the tower
_HF_FAMILIES = ("bert", "roberta", "xlm-roberta", "mt5", "m2m_100")  # encoders that open_clip runs with a padding mask
PADDING_MULTIPLE = 8  # on a GPU, lengths are rounded up to a multiple, so that few different shapes occur


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


@dataclass(frozen=True)
class TextEncoder:
    """Computes features with a model's text tower.

    Attributes:
        bucket_features: token ids [n_b, L_b] of each bucket -> [n, m + 1, dim], not normalised, in the order of the
            buckets; m = 0 for towers without corner tokens.
        pad_id: id of the padding after a caption, which may be cut off; None for towers that attend to padding
            (SigLIP), whose input has to be padded to the context length.
        joins_buckets: computes all buckets together, not one after another.
    """

    bucket_features: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    pad_id: int | None
    joins_buckets: bool = False

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n, seq_len] -> [n, dim], equal to `encode_text` of open_clip's models."""
        return self.features(ids)[:, 0]

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n, seq_len] -> [n, m + 1, dim]."""
        return self.bucket_features([ids])

    def packed_features(self, captions: Captions) -> torch.Tensor:
        """Features [n, m + 1, dim] of captions arranged by `packing.CaptionArranger`, in their original order."""
        return self.bucket_features(captions.buckets).index_select(0, captions.index)


def text_encoder(model: Any) -> TextEncoder:
    """Returns the text encoder of one of our models or of open_clip's.

    With a causal tower that pools the end token, or with a Hugging Face encoder, padding does not affect the features
    beyond rounding, because no token whose output is used attends to it.
    """
    text = getattr(model, "text", model)  # open_clip.CLIP holds the parts of its text tower itself
    if isinstance(text, TextTower):
        return TextEncoder(text.bucket_features, text.pad_id, text.joins_buckets)
    encode, pad_id = model.encode_text, None
    pool = getattr(model, "text_pool_type", getattr(text, "pool_type", None))
    end_id = getattr(model, "text_eos_id", getattr(text, "eos_id", None))
    is_causal = isinstance(getattr(text, "attn_mask", None), torch.Tensor) and getattr(text, "cls_emb", None) is None
    pools_end = pool == "argmax" or (pool == "eos" and end_id != CLIP_PAD_ID)
    gives_tokens = getattr(text, "output_tokens", False)  # beside the features, as in CoCa
    if isinstance(text, HFTextEncoder) and text.config.model_type in _HF_FAMILIES and not gives_tokens:
        encode, pad_id = text, text.config.pad_token_id
    elif is_causal and pools_end and not gives_tokens:
        encode, pad_id = partial(_encode_causal, text, end_id if pool == "eos" else None), CLIP_PAD_ID
    return TextEncoder(lambda buckets: torch.cat([encode(ids) for ids in buckets])[:, None], pad_id)


def _encode_causal(text: Any, end_id: int | None, ids: torch.Tensor) -> torch.Tensor:
    """Features [n, dim] of ids [n, seq_len]; without an `end_id`, the end token has the largest id of a caption."""
    end = (ids if end_id is None else (ids == end_id).int()).argmax(dim=-1, keepdim=True)
    return causal_features(text, text.token_embedding(ids), end)[:, 0]


def cut_padding(ids: torch.Tensor, pad_id: int | None, multiple: int = PADDING_MULTIPLE) -> torch.Tensor:
    """Cuts token ids after the longest caption.

    Args:
        ids: [n, seq_len], padded at the end.
        pad_id: see `TextEncoder`; None returns the ids unchanged.
        multiple: the length is rounded up to a multiple of this, or to `seq_len`.

    Returns:
        [n, length].
    """
    if pad_id is None:
        return ids
    longest = int(caption_lengths(ids, pad_id).max()) if len(ids) else 1
    length = -(-max(longest, 1) // multiple) * multiple
    return ids[:, : min(ids.shape[1], length)].contiguous()
