"""CLIP's causal text tower with corner tokens directly before [EOT]."""

from functools import partial

import torch
from open_clip.transformer import lock_text_tower
from torch import nn
from torch.nn import functional

from training.model.names.config import ModelSpec
from training.model.packing.attention import additive_mask, attention, compute_dtype
from training.model.towers.corner import rows_before_end, suffix_attention
from training.model.towers.text_tower import TextTower

CLIP_PAD_ID = 0


class CornerCLIPText(TextTower):
    """open_clip's causal text transformer with corner tokens directly before [EOT].

    CLIP's ids and pretrained embeddings are unchanged. Corner ids follow CLIP's ids and have their own table,
    ``corner_embedding``. With m = 0 the tower equals the transformer it was built from.

    Args:
        tower: an open_clip `TextTransformer` as CLIP uses it; its parts keep their names.
        num_corners: m.

    Raises:
        ValueError: the tower is not causal or does not pool the end token.
    """

    wraps_stock = True

    def __init__(self, tower: nn.Module, num_corners: int):
        super().__init__()
        if tower.pool_type != "argmax" or tower.attn_mask is None or tower.cls_emb is not None:
            raise ValueError(
                "corner tokens need a causal text tower that pools [EOT], like CLIP's; this tower does not"
            )
        self.num_corners = num_corners
        self.context_length = tower.context_length
        self.output_dim = tower.output_dim
        self.base_vocab_size = tower.vocab_size
        self.end_id = tower.vocab_size - 1
        self.vocab_size = tower.vocab_size + num_corners
        self.pad_id = CLIP_PAD_ID
        for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
            setattr(self, name, getattr(tower, name))
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)  # [context_length, context_length]
        if num_corners:
            weight = tower.token_embedding.weight
            self.corner_embedding = nn.Embedding(num_corners, weight.shape[1], dtype=weight.dtype)
            nn.init.normal_(self.corner_embedding.weight, std=0.02)
            for block in self.layers():
                if isinstance(block.attn, nn.MultiheadAttention):
                    block.attention = partial(_attend, block.attn)

    @classmethod
    def check(cls, spec: ModelSpec, cache_dir: str | None) -> None:
        rule = spec.text_cfg.get("corner_attention", "published")
        if rule != "published":
            raise ValueError(f"--model {spec.name}: corner_attention {rule} needs a Hugging Face text tower")

    @classmethod
    def build(cls, spec: ModelSpec, stock: nn.Module, cache_dir: str | None) -> "CornerCLIPText":
        return cls(stock, spec.num_corners)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, end, mask = self._start(ids)
        hidden = self.ln_final(self.transformer(hidden, attn_mask=mask))
        return project(rows_before_end(hidden, end, self.num_corners), self.text_projection)

    def _start(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the embedded tokens [batch, seq_len, width], the position of [EOT] [batch], and the mask."""
        end = (ids == self.end_id).int().argmax(dim=-1)
        length = ids.shape[1]
        hidden = (self._embed(ids) + self.positional_embedding[:length]).to(self.transformer.get_cast_dtype())
        if not self.num_corners:  # only the causal mask, shared by all captions and heads
            return hidden, end, self.attn_mask[:length, :length]
        return hidden, end, additive_mask(suffix_attention(end, length, self.num_corners), compute_dtype(hidden))

    def attention_weights(self, ids: torch.Tensor, layer: int) -> torch.Tensor:
        hidden, end, mask = self._start(ids)
        for block in self.layers()[:layer]:
            hidden = block(hidden, attn_mask=mask)
        block = self.layers()[layer]
        query, key, _ = _project_in(block.attn, block.ln_1(hidden))
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask).softmax(dim=-1).mean(dim=1)
        return rows_before_end(weights, end, self.num_corners)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.num_corners:
            return self.token_embedding(ids)
        corner = (ids - self.base_vocab_size).clamp(min=0)
        words = self.token_embedding(ids.clamp(max=self.base_vocab_size - 1))
        return torch.where((ids >= self.base_vocab_size)[..., None], self.corner_embedding(corner), words)

    def layers(self) -> nn.ModuleList:
        return self.transformer.resblocks

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the tower except its last groups, as open_clip does; the projection is the last group.

        Args:
            unlocked_layers: number of groups at the end that stay trainable.
            freeze_layer_norm: must be True: layer norms are frozen with the other weights of their group.

        Raises:
            ValueError: `freeze_layer_norm` is False.
        """
        if not freeze_layer_norm:
            raise ValueError("--lock-text-freeze-layer-norm: open_clip's own text tower always freezes its layer norms")
        lock_text_tower(self, unlocked_layers)
        if self.num_corners:
            self.corner_embedding.requires_grad_(self.token_embedding.weight.requires_grad)
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the layers' activations in the backward pass instead of keeping them."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that timm's optimizers (``--opt timm/NAME``) exclude from weight decay.

        AdamW does not call this and decays them, as in open_clip's trainer.
        """
        return {"positional_embedding"}


def _attend(attn: nn.MultiheadAttention, q_x: torch.Tensor, attn_mask: torch.Tensor, **_: object) -> torch.Tensor:
    """Self-attention with one mask for all heads, [batch, seq_len, width]; torch's module copies it for each head.

    The tokens are computed in torch's order, [seq_len, batch, width], so that all sums are the same.

    Args:
        attn: the module whose weights are used.
        q_x: [batch, seq_len, width]; the name is open_clip's.
        attn_mask: additive, [batch, 1, seq_len, seq_len].
    """
    seen = attention(*_project_in(attn, q_x), attn_mask, attn.dropout if attn.training else 0.0)
    return attn.out_proj(seen.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)


def _project_in(attn: nn.MultiheadAttention, tokens: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values: [batch, seq_len, width] -> [3, batch, heads, seq_len, d]."""
    projected = functional.linear(tokens.transpose(0, 1), attn.in_proj_weight, attn.in_proj_bias)
    return projected.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 1, 3, 0, 4)


def project(features: torch.Tensor, projection: nn.Module | torch.Tensor | None) -> torch.Tensor:
    """Projects features [..., width] -> [..., dim], with a projection in any of open_clip's forms."""
    if projection is None:
        return features
    return projection(features) if isinstance(projection, nn.Linear) else features @ projection
