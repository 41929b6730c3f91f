"""BERT, RoBERTa and similar encoders, run via their `embeddings` and `encoder` modules, whose interface is stable.

The last layer computes queries, and everything after attention, only for the positions whose output is used. All other
positions need only keys and values, which saves nearly one layer's work.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig

from training.model.corner import additive_mask, prefix_attention
from training.model.encoders.family import EncoderFamily
from training.model.packing import Row
from training.model.row_attention import RowMask, make_row_mask, row_places, row_slots


class Bert(EncoderFamily):
    """BERT: positions start at 0, and there is a pooler."""

    model_types = ("bert",)
    default_pooler = "cls_pooler"
    has_pooler = True
    packs_rows = True
    shows_attention = True

    def run(self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        hidden = encoder.embeddings(input_ids=ids)
        return encoder.encoder(hidden, attention_mask=additive_mask(allowed, hidden.dtype))[0]

    def first_states(
        self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor, num_first: int
    ) -> torch.Tensor:
        hidden = encoder.embeddings(input_ids=ids)
        mask = additive_mask(allowed, hidden.dtype)
        hidden = _all_layers_but_last(encoder, hidden, mask)
        return _last_layer(encoder, hidden[:, :num_first], hidden, mask[:, :, :num_first])

    def run_on_row(self, encoder: nn.Module, row: Row, num_corners: int) -> torch.Tensor:
        hidden, mask = self._start_row(encoder, row, num_corners)
        return encoder.encoder(hidden, attention_mask=mask)[0]

    def first_states_in_row(self, encoder: nn.Module, row: Row, num_corners: int, num_first: int) -> torch.Tensor:
        slots, keep = row_slots(row)
        hidden, mask = self._start_row(encoder, row, num_corners)
        hidden = _all_layers_but_last(encoder, hidden, mask)[0]  # [budget, width]
        mask = additive_mask(prefix_attention(keep, num_corners, num_first), hidden.dtype)
        return _last_layer(encoder, hidden[slots[:, :num_first]], hidden, mask, slots)

    def layers(self, encoder: nn.Module) -> nn.ModuleList:
        return encoder.encoder.layer

    def places(self, row: Row) -> torch.Tensor:
        """Returns the position of each token of a row within its caption, without `position_offset`: [1, budget]."""
        return row.positions

    def _start_row(self, encoder: nn.Module, row: Row, num_corners: int) -> tuple[torch.Tensor, RowMask]:
        """Returns the embedded row [1, budget, width] and its attention mask."""
        positions = self.places(row) + self.position_offset(encoder.config)
        hidden = encoder.embeddings(input_ids=row.ids, position_ids=positions)
        # FlexAttention does not support dropout.
        has_dropout = encoder.training and encoder.config.attention_probs_dropout_prob > 0
        return hidden, make_row_mask(row, num_corners, hidden.dtype, encoder.attends_by_flex and not has_dropout)


class Roberta(Bert):
    """RoBERTa and similar encoders: positions start at padding's id + 1, and padding is not counted."""

    model_types = ("roberta", "xlm-roberta", "camembert")
    default_pooler = EncoderFamily.default_pooler

    def position_offset(self, config: PretrainedConfig) -> int:
        return config.pad_token_id + 1

    def places(self, row: Row) -> torch.Tensor:
        return row_places(row)[None]


FAMILIES = (Bert(), Roberta())


def _all_layers_but_last(encoder: nn.Module, hidden: torch.Tensor, mask: object) -> torch.Tensor:
    for layer in encoder.encoder.layer[:-1]:
        hidden = layer(hidden, mask)
    return hidden


def _last_layer(
    encoder: nn.Module, read: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor, slots: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes BERT's last layer for some positions only.

    Args:
        encoder: a BERT-like encoder.
        read: hidden states of these positions, the queries, [n, k, width].
        hidden: hidden states of all tokens, the keys and values: [n, seq_len, width], or [budget, width] with `slots`.
        mask: additive, [n, 1, k, seq_len].
        slots: for packed captions, the index in `hidden` of each caption's tokens, [n, seq_len].

    Returns:
        [n, k, width].
    """
    layer = encoder.encoder.layer[-1]
    attention = layer.attention.self

    def by_head(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    key, value = attention.key(hidden), attention.value(hidden)
    if slots is not None:
        key, value = (rows.index_select(0, slots.flatten()).unflatten(0, slots.shape) for rows in (key, value))
    dropout = attention.dropout.p if encoder.training else 0.0
    query = by_head(attention.query(read))
    seen = scaled_dot_product_attention(query, by_head(key), by_head(value), mask, dropout_p=dropout)
    return layer.feed_forward_chunk(layer.attention.output(seen.transpose(1, 2).flatten(2), read))
