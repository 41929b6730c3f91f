"""Base of the text towers: what the rest of the program asks a tower, and the towers by name."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from training.model.names.config import ModelSpec
from training.model.names.files import find_pretrained_folder
from training.model.tokenizers import CornerCLIPTokenizer, CornerHFTokenizer
from training.model.towers.corner import features_of_captions, states_at
from training.model.towers.locking import rest_frozen
from training.runtime.registry import Registry

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "tokenizer_config.json")
TEXT_TOWERS: Registry[type["TextTower"]] = Registry("text tower")  # by the key ``tower`` of a text_cfg


class TextTower(nn.Module):
    """A text tower, possibly with corner tokens.

    It maps token ids [batch, seq_len] to features [batch, dim], and [batch, num_captions, seq_len] to [batch, T, dim]
    with T = 1 + (num_captions - 1)(m + 1): see `corner.features_of_captions`.

    A subclass defines `build`, `all_features`, `layers` and the attributes; it may stand in any file. Below
    ``@TEXT_TOWERS.register("mine")`` it is registered for model configs with ``"text_cfg": {"tower": "mine", ...}``.

    Attributes:
        num_corners: number of corner tokens, m.
        context_length: maximum number of tokens of a caption.
        vocab_size: number of token ids, corners included.
        pad_id: id of padding, which the tower ignores; None for a tower that attends to padding.
        position_offset: number of rows of the position table before the first token's row.
        joins_buckets: `bucket_features` computes all buckets together.
        wraps_stock: `build` uses the text tower that open_clip builds from the same config.
        rgb_first: images are converted to RGB before they are resized, as in LoTLIP; open_clip does it afterwards.
        locks_norms_apart: `lock` can freeze weights without their layer norms.
    """

    num_corners = 0
    context_length: int
    vocab_size: int
    pad_id: int | None
    position_offset = 0
    joins_buckets = False
    wraps_stock = False
    rgb_first = False
    locks_norms_apart = False

    @classmethod
    def build(cls, spec: ModelSpec, stock: nn.Module, cache_dir: str | None) -> "TextTower":
        """Builds the tower with random weights on the CPU.

        Args:
            spec: the model's config; features have its ``embed_dim``.
            stock: open_clip's text tower, if `wraps_stock`.
            cache_dir: folder for downloads.
        """
        raise NotImplementedError

    @classmethod
    def tokenizer(cls, spec: ModelSpec, cache_dir: str | None = None) -> Callable:
        """Returns the tokenizer, texts -> ids [n, context_length]: from the model's folder, by name, or CLIP's."""
        name = spec.text_cfg.get("hf_tokenizer_name")
        if not name:
            return CornerCLIPTokenizer(spec.context_length, spec.num_corners)
        has_own = spec.folder and any((spec.folder / file).is_file() for file in TOKENIZER_FILES)
        source = (spec.folder if has_own else find_pretrained_folder(name, cache_dir)) or name
        return CornerHFTokenizer(source, spec.context_length, spec.num_corners, cache_dir)

    def load_pretrained(self, spec: ModelSpec, cache_dir: str | None) -> None:
        """Loads the pretrained weights that the config names, if any."""

    def config_fields(self) -> dict:
        """Returns the entries that a saved ``text_cfg`` needs in addition to those of the model's config."""
        return {}

    def train(self, mode: bool = True) -> "TextTower":
        """Sets the mode like `nn.Module.train`, but keeps frozen parts in evaluation mode, with dropout off."""
        super().train(mode)
        return rest_frozen(self)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the pooled token's feature, then one feature per corner, not normalised.

        Args:
            ids: [batch, seq_len].

        Returns:
            [batch, m + 1, dim].
        """
        raise NotImplementedError

    def bucket_features(self, buckets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the features [n, m + 1, dim] of buckets [n_b, L_b] of captions, in the order of the buckets."""
        return torch.cat([self.all_features(ids) for ids in buckets])

    def layers(self) -> Iterable[nn.Module]:
        """Returns the transformer layers, first to last."""
        raise NotImplementedError

    def compilable(self) -> Iterable[nn.Module]:
        """Returns the modules that ``--torchcompile`` compiles, each on its own: the layers."""
        return self.layers()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Computes features, not normalised.

        Args:
            ids: [batch, seq_len], or [batch, num_captions, seq_len] with the short caption first.

        Returns:
            [batch, dim], or [batch, T, dim].
        """
        if ids.ndim == 2:
            return self.all_features(ids)[:, 0]
        return features_of_captions(self.all_features(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]).unbind(1))

    def special_positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the positions of the pooled token and of the corners behind it, [batch, m + 1]: here [CLS] first."""
        return torch.arange(self.num_corners + 1, device=ids.device).expand(ids.shape[0], -1)


class _SeenAttention(TorchFunctionMode):
    """Keeps the inputs of each call of torch's attention within it: query, key, additive mask, in this order."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], args[3] if len(args) > 3 else kwargs["attn_mask"]))
        return function(*args, **kwargs or {})


@torch.no_grad()
def special_attention(tower: Any, ids: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """Attention of the pooled token and of each corner over all positions, in one layer, averaged over its heads.

    Args:
        tower: a text tower in eval mode.
        ids: [batch, seq_len] int64.
        layer: index of the layer, from 0 for the first; negative indices count from the last.

    Returns:
        [batch, m + 1, seq_len]; each row sums to 1.

    Raises:
        ValueError: a tower that does not show its attention, or no such layer.
    """
    seen = _SeenAttention()
    if isinstance(tower, TextTower):
        with seen:
            tower(ids)
    num = len(seen.calls)
    if not num:
        raise ValueError(
            f"attention can be shown for Hugging Face's encoders and for CLIP's text tower with corner tokens, not for "
            f"a {type(tower).__name__}; use one of our models, or add --num-corner-tokens 2"
        )
    if not -num <= layer < num:
        raise ValueError(f"--layer {layer}: the text tower has layers 0 to {num - 1}, or -1 for the last")
    query, key, mask = seen.calls[layer]
    weights = (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5 + mask).softmax(dim=-1)
    return states_at(weights.mean(dim=1), tower.special_positions(ids))
