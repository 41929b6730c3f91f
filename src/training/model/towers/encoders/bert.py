"""BERT, RoBERTa and similar encoders, run via their `embeddings` and `encoder` modules, whose interface is stable.

The linear layers run on the tokens of all buckets at once. The last layer computes queries, and everything after
attention, only for the positions whose output is used; all other positions need only keys and values there, which saves
nearly one layer's work.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from training.model.packing.attention import additive_mask, attend_in_buckets, compute_dtype, split_into_buckets
from training.model.towers.hf_tower import CornerHFText

ATTENTION = "lotlip_buckets"


class Bert(CornerHFText):
    """BERT: positions start at 0, and there is a pooler."""

    model_types = ("bert",)
    default_pooler = "cls_pooler"
    has_pooler = True
    joins_buckets = True

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.transformer.set_attn_implementation(ATTENTION)
        # Autocast would cast the hidden states for queries, keys and values separately, and their gradients back.
        for layer in self.layers():
            layer.attention.self.register_forward_pre_hook(_cast_once)

    def run_buckets(
        self, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor], num_first: int | None = None
    ) -> Sequence[torch.Tensor]:
        ids = torch.cat([bucket.flatten() for bucket in buckets])
        positions = torch.cat([self.positions(bucket).flatten() for bucket in buckets])
        hidden = self.transformer.embeddings(input_ids=ids[None], position_ids=positions[None])  # [1, total, width]
        masks = tuple(additive_mask(rule, compute_dtype(hidden)) for rule in allowed)
        *others, last = self.layers()
        for layer in others:
            hidden = layer(hidden, masks)
        hidden = _layer_on_first(last, hidden[0], masks, num_first) if num_first else last(hidden, masks)[0]
        return split_into_buckets(hidden, masks, num_first)

    def layers(self) -> nn.ModuleList:
        return self.transformer.encoder.layer

    def compilable(self) -> list[nn.Module]:
        # All but attention, whose masks, one per bucket, differ in number and shape in every step.
        return [
            module for layer in self.layers() for module in (layer.attention.output, layer.intermediate, layer.output)
        ]

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the row of the position table of each token: [n, seq_len]."""
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


class Roberta(Bert):
    """RoBERTa and similar encoders: positions start at padding's id + 1, and padding is not counted."""

    model_types = ("roberta", "xlm-roberta", "camembert")
    default_pooler = CornerHFText.default_pooler

    def offset_of(self, config: PretrainedConfig) -> int:
        return config.pad_token_id + 1

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        keep = ids != self.pad_id
        return keep.cumsum(dim=1) * keep + self.pad_id


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: tuple[torch.Tensor, ...] | torch.Tensor | None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """An attention function with transformers' signature: for buckets ours, for the encoder's own `forward` sdpa."""
    if not isinstance(attention_mask, tuple):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)
    tokens = (heads[0].transpose(0, 1) for heads in (query, key, value))  # [total, heads, d]
    return attend_in_buckets(*tokens, attention_mask, dropout)[None], None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _cast_once(attention: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *others = inputs
    return (hidden.to(compute_dtype(hidden)), *others)


def _layer_on_first(
    layer: nn.Module, hidden: torch.Tensor, masks: tuple[torch.Tensor, ...], num_first: int
) -> torch.Tensor:
    """Computes a layer for the first positions of each caption only: [total, width] -> [n x num_first, width]."""
    attend = layer.attention.self
    first = torch.cat([bucket[:, :num_first].flatten(0, 1) for bucket in split_into_buckets(hidden, masks)])
    hidden = hidden.to(compute_dtype(hidden))  # once for keys and values
    projected = attend.query(first), attend.key(hidden), attend.value(hidden)
    by_head = (tokens.unflatten(-1, (attend.num_attention_heads, -1)) for tokens in projected)
    seen = attend_in_buckets(*by_head, masks, attend.dropout.p if attend.training else 0.0, num_first)
    return layer.feed_forward_chunk(layer.attention.output(seen.flatten(1), first))
