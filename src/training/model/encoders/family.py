"""What a family of Hugging Face encoders has to say to become a text tower with corner tokens.

A family is one file in this folder that assigns ``FAMILIES``; it is found here, and nowhere else. The encoders' own
`forward` builds its attention mask in ways that change from release to release (transformers 4 takes a 3-D mask and
refuses a 4-D one, 5 the reverse), so a family runs its encoder under a mask of ours.
"""

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

import training.model.encoders as folder
from training.model.packing import Row


class EncoderFamily:
    """One family; `run` and `layers` have to be given.

    Attributes:
        model_types: of the encoder's config.
        default_pooler: one of `hf_encoders.POOLERS`, where a model config names none.
        has_pooler: the encoder may end in BERT's pooler (``add_pooling_layer``).
        packs_rows: captions may stand one after another in a row; needs `run_on_row`.
        shows_attention: its layers have their keys at ``attention.self.key``, where `attention` looks.
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
        """Changes what has to be changed in an encoder that was just built."""

    def run(self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Runs an encoder under an attention mask.

        Args:
            encoder: of `hf_encoders.build_encoder`.
            ids: [batch, seq_len] int64.
            allowed: [batch, seq_len, seq_len] bool, (query, key).

        Returns:
            Last hidden states [batch, seq_len, width].
        """
        raise NotImplementedError

    def first_states(
        self, encoder: nn.Module, ids: torch.Tensor, allowed: torch.Tensor, num_first: int
    ) -> torch.Tensor:
        """As `run`, of the first positions alone: [batch, num_first, width]."""
        return self.run(encoder, ids, allowed)[:, :num_first]

    def run_on_row(self, encoder: nn.Module, row: Row, num_corners: int) -> torch.Tensor:
        """Runs an encoder on captions that stand in one row, each under the corner rule.

        Args:
            encoder: after `row_attention.let_attend_in_rows`.
            row: on the encoder's device.
            num_corners: m.

        Returns:
            Last hidden states [1, budget, width].
        """
        raise NotImplementedError

    def first_states_in_row(self, encoder: nn.Module, row: Row, num_corners: int, num_first: int) -> torch.Tensor:
        """As `run_on_row`, of the first positions of each caption alone: [n, num_first, width]."""
        raise NotImplementedError

    def layers(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """Returns the transformer layers, first to last."""
        raise NotImplementedError

    def after_layers(self, encoder: nn.Module) -> list[nn.Module]:
        """Returns the parts between the last layer and the pooler."""
        return []


@functools.cache
def families() -> dict[str, EncoderFamily]:
    """Imports every file of this folder that assigns ``FAMILIES``; returns model type -> family.

    Raises:
        ValueError: two families have one model type.
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
        ValueError: none takes this model type.
    """
    model_type = getattr(encoder, "config", encoder).model_type
    if model_type not in families():
        raise ValueError(f"text towers of type {model_type} can't take corner tokens; {', '.join(families())} can")
    return families()[model_type]
