"""Builds Hugging Face text encoders for text towers: config, random or pretrained weights, rows for corner tokens.

`encoders` defines how the encoders of each family are run.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from training.model.names.config import find_pretrained_folder, not_found
from training.model.towers.encoders.family import EncoderFamily, family_of

POOLERS = ("cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler", "max_pooler")


def encoder_config(text_cfg: dict, cache_dir: str | None) -> PretrainedConfig:
    """Returns the encoder's config: ``hf_config`` if the model config has it, otherwise that of ``hf_model_name``.

    Raises:
        FileNotFoundError: the config is neither on this machine nor on the hub.
        ValueError: the encoder's family does not support corner tokens.
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
                f"put its folder (config.json, tokenizer files) into --cache-dir DIR"
            ) from error
    family_of(config)
    return config


def fit_context(config: PretrainedConfig, context_length: int) -> None:
    """Raises a config's number of positions to what the context length needs, in place."""
    needed = context_length + family_of(config).position_offset(config)
    config.max_position_embeddings = max(config.max_position_embeddings, needed)


def build_encoder(config: PretrainedConfig, with_pooler: bool, extra_rows: int) -> nn.Module:
    """Builds an encoder with random weights.

    Args:
        config: from `encoder_config`.
        with_pooler: keep BERT's dense + tanh pooler.
        extra_rows: number of rows to append to the word embedding.
    """
    # sdpa, because flash attention does not accept our masks.
    encoder = AutoModel.from_config(config, attn_implementation="sdpa", **_pooler(family_of(config), with_pooler))
    if getattr(config, "sinusoidal_start", None):
        _start_with_sinusoids(encoder.embeddings.position_embeddings.weight, config.sinusoidal_start)
    if extra_rows:
        encoder.resize_token_embeddings(config.vocab_size + extra_rows, mean_resizing=False)
    family_of(config).prepare(encoder)
    return encoder


def _pooler(family: EncoderFamily, with_pooler: bool) -> dict[str, bool]:
    return {"add_pooling_layer": with_pooler} if family.has_pooler else {}


@torch.no_grad()
def _start_with_sinusoids(table: torch.Tensor, amplitude: float) -> None:
    """Fills learned positions [rows, width] with scaled sinusoids of the Transformer (arXiv 1706.03762, section 3.5).

    A BERT trained from scratch then learns to distinguish neighbouring from distant words much earlier than with random
    positions.
    """
    rows, width = table.shape
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(rows)[:, None] * rates
    table.copy_(amplitude * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width])


def load_pretrained_encoder(name: str, with_pooler: bool, cache_dir: str | None) -> dict[str, torch.Tensor]:
    """Returns the weights of a pretrained encoder, from a local folder or the hub.

    Raises:
        FileNotFoundError: the encoder was not found, or has no weights.
    """
    folder = find_pretrained_folder(name, cache_dir)
    try:
        config = AutoConfig.from_pretrained(folder or name, cache_dir=cache_dir)
        pooler = _pooler(family_of(config), with_pooler)
        return AutoModel.from_pretrained(folder or name, cache_dir=cache_dir, **pooler).state_dict()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"pretrained text weights {name}: {not_found(cache_dir, error)}") from error
