"""BERT, RoBERTa and similar encoders, run via their `embeddings` and `encoder` modules, whose interface is stable.

The last layer computes queries, and everything after attention, only for the positions whose output is used. All other
positions need only keys and values, which saves nearly one layer's work.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from training.model.packing.arranger import Row
from training.model.packing.attention import additive_mask, attention
from training.model.packing.bucket_attention import BucketMask, make_bucket_mask
from training.model.towers.corner import prefix_attention
from training.model.towers.encoders.family import EncoderFamily
from training.model.towers.row_attention import RowMask, make_row_mask, row_places, row_slots


class Bert(EncoderFamily):
    """BERT: positions start at 0, and there is a pooler."""

    model_types = ("bert",)
    default_pooler = "cls_pooler"
    has_pooler = True
    packs_rows = True
    shows_attention = True

    def prepare(self, encoder: nn.Module) -> None:
        # Autocast would cast the hidden states for queries, keys and values separately, and their gradients back.
        for layer in encoder.encoder.layer:
            layer.attention.self.register_forward_pre_hook(_cast_once)

    def run(self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        hidden = encoder.embeddings(input_ids=ids)
        return encoder.encoder(hidden, attention_mask=additive_mask(allowed, _compute_dtype(hidden)))[0]

    def first_states(
        self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor, num_first: int
    ) -> torch.Tensor:
        hidden = encoder.embeddings(input_ids=ids)
        mask = additive_mask(allowed, _compute_dtype(hidden))
        hidden = _all_layers_but_last(encoder, hidden, mask)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return _attend(encoder, query, key, value, mask[:, :, :num_first])

        return _last_layer(encoder, hidden[:, :num_first], hidden, attend)

    def run_on_row(self, encoder: nn.Module, row: Row, num_corners: int) -> torch.Tensor:
        hidden, mask = self._start_row(encoder, row, num_corners)
        return encoder.encoder(hidden, attention_mask=mask)[0]

    def first_states_in_row(self, encoder: nn.Module, row: Row, num_corners: int, num_first: int) -> torch.Tensor:
        slots, keep = row_slots(row)
        hidden, mask = self._start_row(encoder, row, num_corners)
        hidden = _all_layers_but_last(encoder, hidden, mask)[0]  # [budget, width]
        mask = additive_mask(prefix_attention(keep, num_corners, num_first), _compute_dtype(hidden))

        def attend(query: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
            key, value = (rows.index_select(0, slots.flatten()).unflatten(0, slots.shape) for rows in tokens)
            return _attend(encoder, query, key, value, mask)

        return _last_layer(encoder, hidden[slots[:, :num_first]], hidden, attend)

    def run_on_buckets(
        self, encoder: nn.Module, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        hidden, mask = self._start_buckets(encoder, buckets, allowed)
        return mask.split(encoder.encoder(hidden, attention_mask=mask)[0].flatten(0, 1))

    def first_states_in_buckets(
        self, encoder: nn.Module, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor], num_first: int
    ) -> torch.Tensor:
        hidden, mask = self._start_buckets(encoder, buckets, allowed)
        hidden = _all_layers_but_last(encoder, hidden, mask).flatten(0, 1)  # [total, width]

        def attend(query: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
            queries = query.split([num for num, _ in mask.shapes])
            parts = zip(queries, *map(mask.split, tokens), (own[:, :, :num_first] for own in mask.allowed))
            return torch.cat([_attend(encoder, *part) for part in parts])

        return _last_layer(encoder, hidden[mask.first_tokens(num_first, hidden.device)], hidden, attend)

    def layers(self, encoder: nn.Module) -> nn.ModuleList:
        return encoder.encoder.layer

    def places(self, row: Row) -> torch.Tensor:
        """Returns the position of each token of a row within its caption, without `position_offset`: [1, budget]."""
        return row.positions

    def bucket_positions(self, ids: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
        """Returns the row of the position table of each token: [n, seq_len]."""
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def _start_buckets(
        self, encoder: nn.Module, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, BucketMask]:
        """Returns the embedded tokens of all buckets [1, total, width] and their attention mask."""
        ids = torch.cat([part.flatten() for part in buckets])
        positions = torch.cat([self.bucket_positions(part, encoder.config).flatten() for part in buckets])
        hidden = encoder.embeddings(input_ids=ids[None], position_ids=positions[None])
        return hidden, make_bucket_mask(allowed, _compute_dtype(hidden))

    def _start_row(self, encoder: nn.Module, row: Row, num_corners: int) -> tuple[torch.Tensor, RowMask]:
        """Returns the embedded row [1, budget, width] and its attention mask."""
        positions = self.places(row) + self.position_offset(encoder.config)
        hidden = encoder.embeddings(input_ids=row.ids, position_ids=positions)
        # FlexAttention does not support dropout.
        has_dropout = encoder.training and encoder.config.attention_probs_dropout_prob > 0
        use_flex = encoder.attends_by_flex and not has_dropout
        return hidden, make_row_mask(row, num_corners, _compute_dtype(hidden), use_flex)


class Roberta(Bert):
    """RoBERTa and similar encoders: positions start at padding's id + 1, and padding is not counted."""

    model_types = ("roberta", "xlm-roberta", "camembert")
    default_pooler = EncoderFamily.default_pooler

    def position_offset(self, config: PretrainedConfig) -> int:
        return config.pad_token_id + 1

    def places(self, row: Row) -> torch.Tensor:
        return row_places(row)[None]

    def bucket_positions(self, ids: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
        keep = ids != config.pad_token_id
        return keep.cumsum(dim=1) * keep + config.pad_token_id


FAMILIES = (Bert(), Roberta())


def _cast_once(attention: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *others = inputs
    return (hidden.to(_compute_dtype(hidden)), *others)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which a layer computes with hidden states, and which its attention mask should have."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _all_layers_but_last(encoder: nn.Module, hidden: torch.Tensor, mask: object) -> torch.Tensor:
    for layer in encoder.encoder.layer[:-1]:
        hidden = layer(hidden, mask)
    return hidden


def _last_layer(
    encoder: nn.Module, read: torch.Tensor, hidden: torch.Tensor, attend: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Computes BERT's last layer for some positions only.

    Args:
        encoder: a BERT-like encoder.
        read: hidden states of these positions, the queries, [n, k, width].
        hidden: hidden states of all tokens, the keys and values, [.., width].
        attend: attention of queries, keys and values, each as wide as the hidden states: [n, k, width].

    Returns:
        [n, k, width].
    """
    layer = encoder.encoder.layer[-1]
    own = layer.attention.self
    hidden = hidden.to(_compute_dtype(hidden))  # once for keys and values
    seen = attend(own.query(read), own.key(hidden), own.value(hidden))
    return layer.feed_forward_chunk(layer.attention.output(seen, read))


def _attend(
    encoder: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The last layer's attention: [n, k, width] and [n, seq_len, width] twice -> [n, k, width]."""
    own = encoder.encoder.layer[-1].attention.self
    query, key, value = (
        rows.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2) for rows in (query, key, value)
    )
    dropout = own.dropout.p if encoder.training else 0.0
    return attention(query, key, value, mask, dropout).transpose(1, 2).flatten(2)
