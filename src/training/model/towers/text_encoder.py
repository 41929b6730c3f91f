"""Text features of any two-tower model, from captions without their padding where the tower allows it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import text_global_pool
from torch import nn

from training.model.packing.arranger import Captions, caption_lengths
from training.model.towers.clip_tower import CLIP_PAD_ID, project
from training.model.towers.text_tower import TextTower

_HF_FAMILIES = ("bert", "roberta", "xlm-roberta", "mt5", "m2m_100")  # encoders that open_clip runs with a padding mask
PADDING_MULTIPLE = 8  # lengths are rounded up to a multiple, so that few different shapes occur


@dataclass(frozen=True)
class TextEncoder:
    """Computes features with a model's text tower.

    Attributes:
        features: token ids [n, seq_len] -> [n, m + 1, dim], not normalised; m = 0 for towers without corner tokens.
        pad_id: id of the padding after a caption, which may be cut off; None for towers that attend to padding
            (SigLIP), whose input has to be padded to the context length.
        joined_features: computes the features [n, m + 1, dim] of buckets [n_b, L_b] of captions together; None
            computes one bucket after another.
    """

    features: Callable[[torch.Tensor], torch.Tensor]
    pad_id: int | None
    joined_features: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n, seq_len] -> [n, dim], equal to `encode_text` of open_clip's models."""
        return self.features(ids)[:, 0]

    def packed_features(self, captions: Captions) -> torch.Tensor:
        """Features [n, m + 1, dim] of captions arranged by `packing.CaptionArranger`, in their original order."""
        join = self.joined_features or (lambda buckets: torch.cat([self.features(ids) for ids in buckets]))
        return join(captions.buckets).index_select(0, captions.index)


def text_encoder(model: nn.Module) -> TextEncoder:
    """Returns the text encoder of one of our models or of open_clip's.

    With a causal tower that pools the end token, or with a Hugging Face encoder, padding does not affect the features
    beyond rounding, because no token whose output is used attends to it.
    """
    text = getattr(model, "text", model)  # open_clip.CLIP holds the parts of its text tower itself
    if isinstance(text, TextTower):
        return TextEncoder(text.all_features, text.pad_id, text.bucket_features if text.joins_buckets else None)
    if isinstance(text, HFTextEncoder) and text.config.model_type in _HF_FAMILIES and not text.output_tokens:
        return TextEncoder(lambda ids: text(ids)[:, None], text.config.pad_token_id)
    pool = getattr(model, "text_pool_type", getattr(text, "pool_type", None))
    end_id = getattr(model, "text_eos_id", getattr(text, "eos_id", None))
    is_causal = isinstance(getattr(text, "attn_mask", None), torch.Tensor) and getattr(text, "cls_emb", None) is None
    pools_end = pool == "argmax" or (pool == "eos" and end_id != CLIP_PAD_ID)
    if is_causal and pools_end and not getattr(text, "output_tokens", False):
        return TextEncoder(partial(_causal_features, text, pool, end_id), CLIP_PAD_ID)
    return TextEncoder(lambda ids: model.encode_text(ids)[:, None], None)


def _causal_features(text: nn.Module, pool: str, end_id: int | None, ids: torch.Tensor) -> torch.Tensor:
    """Features [n, 1, dim] of ids [n, seq_len], for any seq_len up to the context length."""
    length, dtype = ids.shape[1], text.transformer.get_cast_dtype()
    hidden = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
    hidden = text.transformer(hidden, attn_mask=text.attn_mask[:length, :length])
    pooled = text.ln_final(text_global_pool(hidden, ids, pool, eos_token_id=end_id))
    return project(pooled, text.text_projection)[:, None]


def cut_padding(ids: torch.Tensor, pad_id: int | None) -> torch.Tensor:
    """Cuts token ids after the longest caption.

    Args:
        ids: [n, seq_len], padded at the end.
        pad_id: see `TextEncoder`; None returns the ids unchanged.

    Returns:
        [n, length], where length is `seq_len` or a smaller multiple of `PADDING_MULTIPLE`.
    """
    if pad_id is None:
        return ids
    longest = int(caption_lengths(ids, pad_id).max()) if len(ids) else 1
    length = -(-max(longest, 1) // PADDING_MULTIPLE) * PADDING_MULTIPLE
    return ids[:, : min(ids.shape[1], length)].contiguous()
