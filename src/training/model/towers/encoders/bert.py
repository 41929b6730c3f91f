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

from training.model.packing.attention import BucketMask, attend_in_buckets, attention, compute_dtype
from training.model.towers.corner import prefix_attention
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
        *others, last = self.layers()
        if num_first is None:
            hidden, mask = self._run_layers(buckets, allowed, [*others, last])
            return mask.split(hidden)
        return _run_on_first(last, *self._run_layers(buckets, allowed, others), num_first)

    def _run_layers(
        self, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor], layers: Sequence[nn.Module]
    ) -> tuple[torch.Tensor, BucketMask]:
        """Runs the first layers on the tokens of all buckets; returns hidden states [total, width] and the mask."""
        ids = torch.cat([bucket.flatten() for bucket in buckets])
        positions = torch.cat([self.positions(bucket).flatten() for bucket in buckets])
        hidden = self.transformer.embeddings(input_ids=ids[None], position_ids=positions[None])  # [1, total, width]
        mask = BucketMask.of(allowed, compute_dtype(hidden))
        for layer in layers:
            hidden = layer(hidden, mask)
        return hidden[0], mask

    def attention_weights(self, ids: torch.Tensor, layer: int) -> torch.Tensor:
        allowed = prefix_attention(ids != self.pad_id, self.num_hidden_corners)
        hidden, mask = self._run_layers([ids], [allowed], self.layers()[:layer])
        (hidden,), module = mask.split(hidden), self.layers()[layer].attention.self
        query, key = (
            project(hidden).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)  # [b, h, positions, d]
            for project in (module.query, module.key)
        )
        weights = (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5 + mask.allowed[0]).softmax(dim=-1)
        return weights.mean(dim=1)[:, : self.num_corners + 1]

    def layers(self) -> nn.ModuleList:
        return self.transformer.encoder.layer

    def compilable(self) -> list[nn.Module]:
        # All but attention, whose masks, one per bucket, differ in number and shape in every step.
        return [part for layer in self.layers() for part in (layer.attention.output, layer.intermediate, layer.output)]

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
    attention_mask: BucketMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """An attention function with transformers' signature: for buckets ours, for the encoder's own `forward` sdpa."""
    if isinstance(attention_mask, BucketMask):
        return attend_in_buckets(query, key, value, attention_mask, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _cast_once(attention: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *others = inputs
    return (hidden.to(compute_dtype(hidden)), *others)


def _run_on_first(layer: nn.Module, hidden: torch.Tensor, mask: BucketMask, num_first: int) -> list[torch.Tensor]:
    """Computes a layer for the first positions of each caption only: [total, width] -> [n_b, num_first, width] each."""
    attend = layer.attention.self
    first = torch.cat([tokens[:, :num_first] for tokens in mask.split(hidden)])  # [n, num_first, width]
    hidden = hidden.to(compute_dtype(hidden))  # once for keys and values
    counts = [num for num, _ in mask.shapes]
    buckets = zip(attend.query(first).split(counts), mask.split(attend.key(hidden)), mask.split(attend.value(hidden)))
    dropout = attend.dropout.p if attend.training else 0.0
    outputs = []
    for inputs, allowed in zip(buckets, mask.allowed):
        by_head = (tokens.unflatten(-1, (attend.num_attention_heads, -1)).transpose(1, 2) for tokens in inputs)
        outputs.append(attention(*by_head, allowed[:, :, :num_first], dropout).transpose(1, 2).flatten(2))
    return layer.feed_forward_chunk(layer.attention.output(torch.cat(outputs), first)).split(counts)
