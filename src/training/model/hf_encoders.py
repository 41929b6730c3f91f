"""Hugging Face text encoders as text towers need them: built, given an attention mask of our own, and run.

The encoders' own `forward` builds its mask in ways that change from release to release (transformers 4 takes a 3-D
mask and refuses a 4-D one, 5 the reverse), so BERT and its kin are run through their two parts, embeddings and encoder,
whose interface has stayed the same.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, PretrainedConfig

from training.model.config import find_pretrained_folder, not_found
from training.model.corner import additive_mask, prefix_attention
from training.model.packing import Row
from training.model.row_attention import RowMask, make_row_mask, row_places, row_slots

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert")
SUPPORTED = (*BERT_LIKE, "modernbert")
DEFAULT_POOLER = {"bert": "cls_pooler", "modernbert": "cls_last_hidden_state_pooler"}  # others: mean, as open_clip
POOLERS = ("cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler", "max_pooler")


def encoder_config(text_cfg: dict, cache_dir: str | None) -> PretrainedConfig:
    """Returns the encoder's config: ``hf_config`` if the model config spells it out, else that of ``hf_model_name``.

    Raises:
        FileNotFoundError: neither on this machine nor on the hub.
        ValueError: an encoder of a family that has no [CLS] to put corner tokens beside.
    """
    if text_cfg.get("hf_config"):
        fields = dict(text_cfg["hf_config"])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        name = text_cfg["hf_model_name"]
        folder = find_pretrained_folder(name, cache_dir)
        try:
            config = AutoConfig.from_pretrained(folder or name, cache_dir=cache_dir)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"hf_model_name {name}: {not_found(cache_dir, error)}; "
                f"put its folder (config.json, tokenizer files) below --cache-dir DIR"
            ) from error
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"text towers of type {config.model_type} can't take corner tokens; {', '.join(SUPPORTED)} can"
        )
    return config


def position_offset(config: PretrainedConfig) -> int:
    """Rows at the start of the position table that no token uses (RoBERTa counts from padding's id + 1)."""
    return config.pad_token_id + 1 if config.model_type in BERT_LIKE and config.model_type != "bert" else 0


def fit_context(config: PretrainedConfig, context_length: int) -> None:
    """Lengthens the position table of a config to be built, if the context needs it."""
    config.max_position_embeddings = max(config.max_position_embeddings, context_length + position_offset(config))


def build_encoder(config: PretrainedConfig, with_pooler: bool, extra_rows: int) -> nn.Module:
    """Builds an encoder with random weights.

    Args:
        config: as `encoder_config` gives it.
        with_pooler: keep BERT's dense + tanh pooler.
        extra_rows: rows to add to the word embedding, last.
    """
    pooler = {"add_pooling_layer": with_pooler} if config.model_type in BERT_LIKE else {}
    # sdpa: flash attention can't take a mask of ours.
    encoder = AutoModel.from_config(config, attn_implementation="sdpa", **pooler)
    if getattr(config, "sinusoidal_start", None):
        _start_with_sinusoids(encoder.embeddings.position_embeddings.weight, config.sinusoidal_start)
    if extra_rows:
        encoder.resize_token_embeddings(config.vocab_size + extra_rows, mean_resizing=False)
    if hasattr(encoder, "_update_attention_mask"):
        # ModernBERT in transformers 4: its hook for masks, here told to take what it is given.
        encoder._update_attention_mask = _take_masks_as_given
    return encoder


@torch.no_grad()
def _start_with_sinusoids(table: torch.Tensor, amplitude: float) -> None:
    """Fills learned positions [rows, width] with the Transformer's waves (arXiv 1706.03762, section 3.5), scaled.

    A BERT trained from nothing tells neighbouring words from distant ones much earlier than with random positions.
    """
    rows, width = table.shape
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(rows)[:, None] * rates
    table.copy_(amplitude * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width])


def _take_masks_as_given(masks: tuple, output_attentions: bool) -> tuple:
    return masks


def run_encoder(encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Runs an encoder under an attention mask.

    Args:
        encoder: of `build_encoder`.
        ids: [batch, seq_len] int64.
        allowed: [batch, seq_len, seq_len] bool, (query, key).

    Returns:
        Last hidden states [batch, seq_len, width].
    """
    if encoder.config.model_type in BERT_LIKE:
        hidden = encoder.embeddings(input_ids=ids)
        return encoder.encoder(hidden, attention_mask=additive_mask(allowed, hidden.dtype))[0]
    # ModernBERT: every third layer sees all, the others a window around each position.
    position = torch.arange(ids.shape[1], device=ids.device)
    near = (position[:, None] - position[None, :]).abs() <= encoder.config.local_attention // 2
    dtype = encoder.get_input_embeddings().weight.dtype
    full, sliding = additive_mask(allowed, dtype), additive_mask(allowed & near, dtype)
    if hasattr(encoder, "_update_attention_mask"):
        return encoder(input_ids=ids, attention_mask=(full, sliding))[0]
    return encoder(input_ids=ids, attention_mask={"full_attention": full, "sliding_attention": sliding})[0]


def first_states(encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor, num_first: int) -> torch.Tensor:
    """As `run_encoder`, of the first positions alone.

    BERT's last layer computes nothing but their queries and what comes of them: of the others it needs keys and values.
    That spares a twelfth of 12 layers but for those two products.

    Returns:
        Last hidden states [batch, num_first, width].
    """
    if not _can_shorten_last_layer(encoder):
        return run_encoder(encoder, ids, allowed)[:, :num_first]
    hidden = encoder.embeddings(input_ids=ids)
    mask = additive_mask(allowed, hidden.dtype)
    hidden = _all_layers_but_last(encoder, hidden, mask)
    return _last_layer(encoder, hidden[:, :num_first], hidden, mask[:, :, :num_first])


def first_states_in_row(encoder: nn.Module, row: Row, num_corners: int, num_first: int) -> torch.Tensor:
    """As `run_encoder_on_row`, of the first positions of each caption alone.

    Returns:
        Last hidden states [n, num_first, width].
    """
    slots, keep = row_slots(row)
    if not _can_shorten_last_layer(encoder):
        return run_encoder_on_row(encoder, row, num_corners)[0][slots[:, :num_first]]
    hidden, mask = _start_row(encoder, row, num_corners)
    hidden = _all_layers_but_last(encoder, hidden, mask)[0]  # [budget, width]
    mask = additive_mask(prefix_attention(keep, num_corners, num_first), hidden.dtype)
    return _last_layer(encoder, hidden[slots[:, :num_first]], hidden, mask, slots)


def _can_shorten_last_layer(encoder: nn.Module) -> bool:
    config = encoder.config
    if config.model_type not in BERT_LIKE or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return False
    # transformers 4 recomputes activations around its loop over the layers, 5 within each layer.
    return not (encoder.training and getattr(encoder.encoder, "gradient_checkpointing", False))


def _all_layers_but_last(encoder: nn.Module, hidden: torch.Tensor, mask: object) -> torch.Tensor:
    for layer in encoder_layers(encoder)[:-1]:
        hidden = layer(hidden, mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # transformers 4
    return hidden


def _last_layer(
    encoder: nn.Module, read: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor, slots: torch.Tensor | None = None
) -> torch.Tensor:
    """BERT's last layer at the positions of `read` [n, k, width], which look at `hidden`: [n, seq_len, width], or
    [budget, width] with `slots` [n, seq_len] that say where in it each one's tokens are; mask [n, 1, k, seq_len]."""
    layer = encoder_layers(encoder)[-1]
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


def run_encoder_on_row(encoder: nn.Module, row: Row, num_corners: int) -> torch.Tensor:
    """Runs an encoder of BERT's kin on captions that stand in one row, each under the corner rule.

    Args:
        encoder: of `build_encoder`, after `row_attention.let_attend_in_rows`.
        row: on the encoder's device.
        num_corners: m.

    Returns:
        Last hidden states [1, budget, width].
    """
    hidden, mask = _start_row(encoder, row, num_corners)
    return encoder.encoder(hidden, attention_mask=mask)[0]


def _start_row(encoder: nn.Module, row: Row, num_corners: int) -> tuple[torch.Tensor, RowMask]:
    """Returns the embedded row [1, budget, width] and what its attention needs."""
    config = encoder.config
    positions = row.positions if config.model_type == "bert" else row_places(row)[None]  # RoBERTa counts no padding
    hidden = encoder.embeddings(input_ids=row.ids, position_ids=positions + position_offset(config))
    has_dropout = encoder.training and config.attention_probs_dropout_prob > 0  # which FlexAttention does not know
    return hidden, make_row_mask(row, num_corners, hidden.dtype, encoder.attends_by_flex and not has_dropout)


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """The transformer layers, first to last."""
    return encoder.encoder.layer if encoder.config.model_type in BERT_LIKE else encoder.layers


def load_pretrained_encoder(name: str, with_pooler: bool, cache_dir: str | None) -> dict[str, torch.Tensor]:
    """Returns the weights of a pretrained encoder, from a local folder or the hub.

    Raises:
        FileNotFoundError: not there, or no weights in it.
    """
    folder = find_pretrained_folder(name, cache_dir)
    try:
        config = AutoConfig.from_pretrained(folder or name, cache_dir=cache_dir)
        pooler = {"add_pooling_layer": with_pooler} if config.model_type in BERT_LIKE else {}
        return AutoModel.from_pretrained(folder or name, cache_dir=cache_dir, **pooler).state_dict()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"pretrained text weights {name}: {not_found(cache_dir, error)}") from error
