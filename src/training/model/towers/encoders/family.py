"""The interface of a family of Hugging Face encoders that can be a text tower with corner tokens.

An encoder's own `forward` derives its attention mask from the padding alone, so a family runs its encoder with our own
mask. Defining a subclass registers it for its model types; the files of this folder are imported when needed.
"""

import importlib
import pkgutil
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

import training.model.towers.encoders as folder

_FAMILIES: dict[str, "EncoderFamily"] = {}


class EncoderFamily:
    """A family of encoders; subclasses must define `run` (or `run_buckets`) and `layers`.

    Attributes:
        model_types: values of ``model_type`` in the encoder's config.
        default_pooler: one of `hf_encoders.POOLERS`, used if a model config names none.
        has_pooler: the encoder can end in BERT's pooler (``add_pooling_layer``).
        joins_buckets: `run_buckets` computes all buckets together.
    """

    model_types: tuple[str, ...] = ()
    default_pooler = "mean_pooler"
    has_pooler = False
    joins_buckets = False

    def __init_subclass__(cls):
        for model_type in cls.__dict__.get("model_types", ()):
            if model_type in _FAMILIES and type(_FAMILIES[model_type]).__qualname__ != cls.__qualname__:
                raise ValueError(f"two families of encoders have the model type {model_type}")
            _FAMILIES[model_type] = cls()

    def position_offset(self, config: PretrainedConfig) -> int:
        """Returns the number of rows at the start of the position table that no token uses."""
        return 0

    def prepare(self, encoder: nn.Module) -> None:
        """Adapts a new encoder, without changing its weights."""

    def run(self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Runs an encoder with an attention mask.

        Args:
            encoder: from `hf_encoders.build_encoder`.
            ids: [batch, seq_len] int64.
            allowed: [batch, seq_len, seq_len] bool, (query, key).

        Returns:
            Last hidden states [batch, seq_len, width].
        """
        return self.run_buckets(encoder, [ids], [allowed])[0]

    def run_buckets(
        self,
        encoder: nn.Module,
        buckets: Sequence[torch.Tensor],
        allowed: Sequence[torch.Tensor],
        num_first: int | None = None,
    ) -> list[torch.Tensor]:
        """Runs an encoder on several buckets of captions, each with its attention mask.

        Args:
            encoder: from `hf_encoders.build_encoder`.
            buckets: token ids, [n_b, L_b] int64 each.
            allowed: [n_b, L_b, L_b] bool each, (query, key).
            num_first: number of positions at the start of a caption whose states are needed; None means all.

        Returns:
            Last hidden states of each bucket, [n_b, L_b, width] or [n_b, num_first, width].
        """
        return [self.run(encoder, *bucket)[:, :num_first] for bucket in zip(buckets, allowed)]

    def attention_weights(
        self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor, num_first: int, layer: int
    ) -> torch.Tensor:
        """Returns the attention of the first positions in a layer, averaged over heads: [batch, num_first, seq_len]."""
        raise NotImplementedError

    def layers(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """Returns the transformer layers, first to last."""
        raise NotImplementedError

    def after_layers(self, encoder: nn.Module) -> list[nn.Module]:
        """Returns the modules between the last layer and the pooler."""
        return []


def family_of(encoder: nn.Module | PretrainedConfig) -> EncoderFamily:
    """Returns the family of an encoder or of its config.

    Raises:
        ValueError: no family supports this model type.
    """
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    model_type = getattr(encoder, "config", encoder).model_type
    if model_type not in _FAMILIES:
        raise ValueError(f"text towers of type {model_type} can't take corner tokens; {', '.join(_FAMILIES)} can")
    return _FAMILIES[model_type]
