"""CLIP's causal text tower with corner tokens directly before [EOT]."""

from functools import partial
from typing import Any

import torch
from open_clip.transformer import TextTransformer
from torch import nn
from torch.nn import functional

from training.model.names.config import ModelSpec
from training.model.packing import additive_mask, attention, compute_dtype
from training.model.towers.corner import states_at, suffix_attention
from training.model.towers.text_tower import TEXT_TOWERS, TextTower

CLIP_PAD_ID = 0


@TEXT_TOWERS.register("clip")
class CornerCLIPText(TextTower, TextTransformer):
    """open_clip's causal text transformer with corner tokens directly before [EOT].

    CLIP's ids and pretrained embeddings are unchanged. Corner ids follow CLIP's ids and have their own table,
    ``corner_embedding``. With m = 0 the tower equals the transformer it was built from.

    Args:
        tower: an open_clip `TextTransformer` as CLIP uses it, whose modules, names and settings are taken over.
        num_corners: m.

    Raises:
        ValueError: the tower is not causal or does not pool the end token.
    """

    wraps_stock = True
    transformer: Any
    token_embedding: nn.Embedding
    corner_embedding: nn.Embedding
    num_words: int
    end_id: int

    def __init__(self, tower: TextTransformer, num_corners: int):
        nn.Module.__init__(self)
        self.__dict__.update(vars(tower))
        if self.pool_type != "argmax" or self.attn_mask is None or self.cls_emb is not None:
            raise ValueError(
                "corner tokens need a causal text tower that pools [EOT], like CLIP's; this tower does not"
            )
        self.num_corners, self.num_words, self.end_id = num_corners, tower.vocab_size, tower.vocab_size - 1
        self.vocab_size += num_corners
        if num_corners:
            weight = self.token_embedding.weight
            self.corner_embedding = nn.Embedding(num_corners, weight.shape[1], dtype=weight.dtype)
            nn.init.normal_(self.corner_embedding.weight, std=0.02)
            for block in self.layers():
                if isinstance(block.attn, nn.MultiheadAttention):
                    block.attention = partial(_attend, block.attn)

    @classmethod
    def build(cls, spec: ModelSpec, stock: nn.Module, cache_dir: str | None) -> "CornerCLIPText":
        return cls(stock, spec.num_corners)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        positions = self.special_positions(ids)
        if not self.num_corners:
            return causal_features(self, self.token_embedding(ids), positions)
        words = self.token_embedding(ids.clamp(max=self.num_words - 1))
        corners = self.corner_embedding((ids - self.num_words).clamp(min=0))
        tokens = torch.where((ids >= self.num_words)[..., None], corners, words)
        return causal_features(self, tokens, positions, self.num_corners)

    def special_positions(self, ids: torch.Tensor) -> torch.Tensor:
        end = (ids == self.end_id).int().argmax(dim=-1, keepdim=True)
        return torch.cat([end, end - torch.arange(self.num_corners, 0, -1, device=ids.device)], dim=1)

    def layers(self) -> nn.ModuleList:
        return self.transformer.resblocks

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the tower except its last groups, as open_clip does; the projection is the last group.

        Args:
            unlocked_layers: number of groups at the end that stay trainable.
            freeze_layer_norm: must be True: layer norms are frozen with the other weights of their group.
        """
        TextTransformer.lock(self, unlocked_layers, freeze_layer_norm)
        if self.num_corners:
            self.corner_embedding.requires_grad_(self.token_embedding.weight.requires_grad)
        self.train(self.training)


def _attend(attn: nn.MultiheadAttention, q_x: torch.Tensor, attn_mask: torch.Tensor, **_: object) -> torch.Tensor:
    """Self-attention with one mask for all heads, [batch, seq_len, width]; torch's module copies it for each head.

    The tokens are computed in torch's order, [seq_len, batch, width], so that all sums are the same.

    Args:
        attn: the module whose weights are used.
        q_x: [batch, seq_len, width]; the name is open_clip's.
        attn_mask: additive, [batch, 1, seq_len, seq_len].
    """
    projected = functional.linear(q_x.transpose(0, 1), attn.in_proj_weight, attn.in_proj_bias)
    by_head = projected.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 1, 3, 0, 4)  # [3, batch, heads, seq_len, d]
    query, key, value = by_head
    seen = attention(query, key, value, attn_mask, attn.dropout if attn.training else 0.0)
    return attn.out_proj(seen.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)


def causal_features(text: Any, tokens: torch.Tensor, positions: torch.Tensor, num_corners: int = 0) -> torch.Tensor:
    """Features of captions of any length up to the context length, by a causal text tower in any of open_clip's forms.

    Args:
        text: a module with the names of open_clip's `TextTransformer`.
        tokens: embedded tokens, [n, seq_len, width].
        positions: the positions whose states become features, [n, k]; that of the end token first.
        num_corners: m.

    Returns:
        [n, k, dim], not normalised.
    """
    length, dtype = tokens.shape[1], text.transformer.get_cast_dtype()
    hidden = tokens.to(dtype) + text.positional_embedding[:length].to(dtype)
    mask = text.attn_mask[:length, :length]  # shared by all captions and heads
    if num_corners:
        mask = additive_mask(suffix_attention(positions[:, 0], length, num_corners), compute_dtype(hidden))
    features = text.ln_final(states_at(text.transformer(hidden, attn_mask=mask), positions))
    if text.text_projection is None:
        return features
    linear = isinstance(text.text_projection, nn.Linear)
    return text.text_projection(features) if linear else features @ text.text_projection
