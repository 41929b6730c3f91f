"""Text features of any two-tower model, from captions cut after their last token where the tower allows it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import text_global_pool
from torch import nn

from training.model.clip_tower import CLIP_PAD_ID, project
from training.model.corner_tower import CornerTower
from training.model.packing import Captions, Row, caption_lengths

_HF_FAMILIES = ("bert", "roberta", "xlm-roberta", "mt5", "m2m_100")  # encoders that open_clip gives a padding mask


@dataclass(frozen=True)
class TextEncoder:
    """How to get features from a model's text tower.

    Attributes:
        features: token ids [n, seq_len] -> [n, m + 1, dim], not normalised; m = 0 for towers without corner tokens.
        pad_id: padding behind a caption, which may be cut off; None where the tower reads it (SigLIP) and every row
            has to be as long as the context.
        row_features: the same for all captions in one row; None where the tower can't.
    """

    features: Callable[[torch.Tensor], torch.Tensor]
    pad_id: int | None
    row_features: Callable[[Row], torch.Tensor] | None = None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n, seq_len] -> [n, dim], as `encode_text` of open_clip's models gives them."""
        return self.features(ids)[:, 0]

    def packed_features(self, captions: Captions) -> torch.Tensor:
        """Features [n, m + 1, dim] of captions as `packing.CaptionArranger` arranges them, in their own order."""
        if captions.row is not None:
            return self.row_features(captions.row)
        parts = [self.features(ids) for ids in captions.buckets]
        return torch.cat(parts).index_select(0, captions.places)


def text_encoder(model: nn.Module) -> TextEncoder:
    """Returns how to encode captions with a model of ours or of open_clip's.

    A causal tower that pools the end token and a Hugging Face encoder give the same features, up to rounding, whatever
    padding follows: nothing that is read attends to it.
    """
    text = getattr(model, "text", model)  # open_clip.CLIP holds the parts of its text tower itself
    if isinstance(text, CornerTower):
        return TextEncoder(text.all_features, text.pad_id, getattr(text, "row_features", None))
    if isinstance(text, HFTextEncoder) and text.config.model_type in _HF_FAMILIES and not text.output_tokens:
        return TextEncoder(lambda ids: text(ids)[:, None], text.config.pad_token_id)
    pool = getattr(model, "text_pool_type", getattr(text, "pool_type", None))
    end_id = getattr(model, "text_eos_id", getattr(text, "eos_id", None))
    if _reads_up_to_the_end(text, pool, end_id):
        return TextEncoder(partial(_causal_features, text, pool, end_id), CLIP_PAD_ID)
    return TextEncoder(lambda ids: model.encode_text(ids)[:, None], None)


def _reads_up_to_the_end(text: nn.Module, pool: str | None, end_id: int | None) -> bool:
    """Whether this is a causal transformer of open_clip's that pools the end token."""
    pools_end = pool == "argmax" or (pool == "eos" and end_id != CLIP_PAD_ID)
    is_causal = isinstance(getattr(text, "attn_mask", None), torch.Tensor)
    return (
        pools_end and is_causal and getattr(text, "cls_emb", None) is None and not getattr(text, "output_tokens", False)
    )


def _causal_features(text: nn.Module, pool: str, end_id: int | None, ids: torch.Tensor) -> torch.Tensor:
    """[n, seq_len] -> [n, 1, dim], for any seq_len up to the context length."""
    length, dtype = ids.shape[1], text.transformer.get_cast_dtype()
    hidden = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
    hidden = text.transformer(hidden, attn_mask=text.attn_mask[:length, :length])
    pooled = text.ln_final(text_global_pool(hidden, ids, pool, eos_token_id=end_id))
    return project(pooled, text.text_projection)[:, None]


def cut_padding(ids: torch.Tensor, pad_id: int | None, multiple: int = 8) -> torch.Tensor:
    """Cuts token ids [n, seq_len] after the longest caption, rounded up so that few different shapes occur.

    Args:
        ids: padded behind.
        pad_id: as of `TextEncoder`; None leaves the ids as they are.
        multiple: the result's length is one of it, or `seq_len`.
    """
    if pad_id is None:
        return ids
    longest = int(caption_lengths(ids, pad_id).max()) if len(ids) else 1
    return ids[:, : min(ids.shape[1], -(-max(longest, 1) // multiple) * multiple)].contiguous()
