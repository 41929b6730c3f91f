"""Hugging Face text encoders as text towers need them: built, given an attention mask of our own, and run.

The encoders' own `forward` builds its mask in ways that change from release to release (transformers 4 takes a 3-D
mask and refuses a 4-D one, 5 the reverse), so BERT and its kin are run through their two parts, embeddings and encoder,
whose interface has stayed the same.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from training.model.config import find_pretrained_folder
from training.model.corner import additive_mask
from training.model.packing import Row
from training.model.row_attention import make_row_mask

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
                f"hf_model_name {name}: not below --cache-dir {cache_dir}, and not from the hub "
                f"({str(error).splitlines()[0][:200]}); put its folder (config.json, tokenizer files) there"
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


def run_encoder_on_row(encoder: nn.Module, row: Row, num_corners: int) -> torch.Tensor:
    """Runs an encoder of BERT's kin on captions that stand in one row, each under the corner rule.

    Args:
        encoder: of `build_encoder`, after `row_attention.let_attend_in_rows`.
        row: on the encoder's device.
        num_corners: m.

    Returns:
        Last hidden states [1, budget, width].
    """
    config = encoder.config
    hidden = encoder.embeddings(input_ids=row.ids, position_ids=row.positions + position_offset(config))
    # FlexAttention knows no dropout of attention, and no backward pass on the CPU.
    has_dropout = encoder.training and config.attention_probs_dropout_prob > 0
    mask = make_row_mask(row, num_corners, hidden.dtype, use_flex=hidden.is_cuda and not has_dropout)
    return encoder.encoder(hidden, attention_mask=mask)[0]


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
        raise FileNotFoundError(
            f"pretrained text weights {name}: not below --cache-dir {cache_dir}, and not from the hub "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
