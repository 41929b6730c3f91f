"""The interface of a family of Hugging Face encoders that can be a text tower with corner tokens.

A family is one file in this folder that assigns ``FAMILIES``; no other registration is needed. An encoder's own
`forward` derives its attention mask from the padding alone, so a family runs its encoder with our own mask.
"""

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

import training.model.towers.encoders as folder
from training.model.packing.arranger import Row


class EncoderFamily:
    """A family of encoders; subclasses must define `run` and `layers`.

    Attributes:
        model_types: values of ``model_type`` in the encoder's config.
        default_pooler: one of `hf_encoders.POOLERS`, used if a model config names none.
        has_pooler: the encoder can end in BERT's pooler (``add_pooling_layer``).
        packs_rows: captions can be packed in a row, and buckets computed together; needs `run_on_row` and
            `run_on_buckets`.
        shows_attention: the layers compute keys in ``attention.self.key``, which `special_attention` relies on.
    """

    model_types: tuple[str, ...] = ()
    default_pooler = "mean_pooler"
    has_pooler = False
    packs_rows = False
    shows_attention = False

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
        raise NotImplementedError

    def first_states(
        self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor, num_first: int
    ) -> torch.Tensor:
        """Returns the same as `run`, for the first positions only: [batch, num_first, width]."""
        return self.run(encoder, ids, allowed)[:, :num_first]

    def run_on_row(self, encoder: nn.Module, row: Row, num_corners: int) -> torch.Tensor:
        """Runs an encoder on captions packed in one row, with the corner tokens' mask for each.

        Args:
            encoder: after `row_attention.let_attend_in_rows`.
            row: on the encoder's device.
            num_corners: m.

        Returns:
            Last hidden states [1, budget, width].
        """
        raise NotImplementedError

    def first_states_in_row(self, encoder: nn.Module, row: Row, num_corners: int, num_first: int) -> torch.Tensor:
        """Returns the same as `run_on_row`, for the first positions of each caption only: [n, num_first, width]."""
        raise NotImplementedError

    def run_on_buckets(
        self, encoder: nn.Module, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Runs an encoder on all buckets at once; only attention is computed bucket by bucket.

        Args:
            encoder: after `row_attention.let_attend_in_buckets`.
            buckets: token ids, [n_b, L_b] int64 each.
            allowed: [n_b, L_b, L_b] bool each, (query, key).

        Returns:
            Last hidden states [n_b, L_b, width] of each bucket.
        """
        raise NotImplementedError

    def first_states_in_buckets(
        self, encoder: nn.Module, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor], num_first: int
    ) -> torch.Tensor:
        """Returns the same as `run_on_buckets`, for the first positions of each caption only: [n, num_first, width]."""
        raise NotImplementedError

    def layers(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """Returns the transformer layers, first to last."""
        raise NotImplementedError

    def after_layers(self, encoder: nn.Module) -> list[nn.Module]:
        """Returns the modules between the last layer and the pooler."""
        return []


@functools.cache
def families() -> dict[str, EncoderFamily]:
    """Imports the families from all files of this folder; returns model type -> family.

    Raises:
        ValueError: two families have the same model type.
    """
    found: dict[str, EncoderFamily] = {}
    for path in sorted(path for place in folder.__path__ for path in Path(place).glob("*.py")):
        if path.stem in ("__init__", "family"):
            continue
        for family in importlib.import_module(f"{folder.__name__}.{path.stem}").FAMILIES:
            for model_type in family.model_types:
                if model_type in found:
                    raise ValueError(f"two families of encoders have the model type {model_type}")
                found[model_type] = family
    return found


def family_of(encoder: nn.Module | PretrainedConfig) -> EncoderFamily:
    """Returns the family of an encoder or of its config.

    Raises:
        ValueError: no family supports this model type.
    """
    model_type = getattr(encoder, "config", encoder).model_type
    if model_type not in families():
        raise ValueError(f"text towers of type {model_type} can't take corner tokens; {', '.join(families())} can")
    return families()[model_type]
