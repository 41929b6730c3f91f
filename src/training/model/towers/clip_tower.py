"""CLIP's causal text tower with corner tokens directly before [EOT]."""

from collections.abc import Sequence

import torch
from open_clip.transformer import lock_text_tower
from torch import nn

from training.model.packing.attention import additive_mask
from training.model.towers.corner import rows_before_end, suffix_attention
from training.model.towers.corner_tower import CornerTower

CLIP_PAD_ID = 0


class CornerCLIPText(CornerTower):
    """open_clip's causal text transformer with corner tokens directly before [EOT].

    CLIP's ids and pretrained embeddings are unchanged. Corner ids follow CLIP's ids and have their own table,
    ``corner_embedding``. With m = 0 the tower equals the transformer it was built from.

    Args:
        tower: an open_clip `TextTransformer` as CLIP uses it; its parts keep their names.
        num_corners: m.

    Raises:
        ValueError: the tower is not causal or does not pool the end token.
    """

    def __init__(self, tower: nn.Module, num_corners: int):
        super().__init__()
        if tower.pool_type != "argmax" or tower.attn_mask is None or tower.cls_emb is not None:
            raise ValueError(
                "corner tokens need a causal text tower that pools [EOT], like CLIP's; this tower does not"
            )
        self.num_corners = num_corners
        self.context_length = tower.context_length
        self.output_dim = tower.output_dim
        self.heads = tower.heads
        self.base_vocab_size = tower.vocab_size
        self.end_id = tower.vocab_size - 1
        self.vocab_size = tower.vocab_size + num_corners
        self.position_offset = 0
        self.pad_id = CLIP_PAD_ID
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)  # [context_length, context_length]
        if num_corners:
            weight = tower.token_embedding.weight
            self.corner_embedding = nn.Embedding(num_corners, weight.shape[1], dtype=weight.dtype)
            nn.init.normal_(self.corner_embedding.weight, std=0.02)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        dtype = self.transformer.get_cast_dtype()
        end = (ids == self.end_id).int().argmax(dim=-1)  # [batch]
        hidden = (self._embed(ids) + self.positional_embedding[: ids.shape[1]]).to(dtype)
        if self.num_corners:
            mask = additive_mask(suffix_attention(end, ids.shape[1], self.num_corners), dtype)
            # torch's attention expects one mask per head: [batch x heads, seq_len, seq_len].
            mask = mask.expand(-1, self.heads, -1, -1).flatten(0, 1)
        else:  # only the causal mask, shared by all captions and heads
            mask = self.attn_mask[: ids.shape[1], : ids.shape[1]]
        hidden = self.ln_final(self.transformer(hidden, attn_mask=mask))
        pooled = rows_before_end(hidden, end, self.num_corners)
        return project(pooled, self.text_projection)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.num_corners:
            return self.token_embedding(ids)
        corner = (ids - self.base_vocab_size).clamp(min=0)
        words = self.token_embedding(ids.clamp(max=self.base_vocab_size - 1))
        return torch.where((ids >= self.base_vocab_size)[..., None], self.corner_embedding(corner), words)

    def layer_groups(self, pooler_in_head: bool = True) -> list[tuple[str, Sequence[nn.Module | nn.Parameter]]]:
        """Returns all parts with parameters as (name, modules and parameters), from the input to the output.

        Args:
            pooler_in_head: open_clip 4's argument; this tower has no pooler.
        """
        corners = [self.corner_embedding] if self.num_corners else []
        layers = [(f"layer.{i}", [block]) for i, block in enumerate(self.transformer.resblocks)]
        layers[-1][1].append(self.ln_final)
        head = [("proj", [self.text_projection])] if self.text_projection is not None else []
        return [("embeddings", [self.token_embedding, self.positional_embedding, *corners]), *layers, *head]

    def lock(
        self, unlocked_layers: int = 0, freeze_layer_norm: bool = True, pooler_in_head: bool = False, **_: object
    ) -> None:
        """Freezes the tower except its last groups, as open_clip does; the projection is the last group.

        Args:
            unlocked_layers: number of groups at the end that stay trainable.
            freeze_layer_norm: must be True: layer norms are frozen with the other weights of their group.
            pooler_in_head: open_clip 4's argument; this tower has no pooler.

        Raises:
            ValueError: `freeze_layer_norm` is False.
        """
        if not freeze_layer_norm:
            raise ValueError("--lock-text-freeze-layer-norm: open_clip's own text tower always freezes its layer norms")
        lock_text_tower(self, unlocked_layers)
        if self.num_corners:
            self.corner_embedding.requires_grad_(self.token_embedding.weight.requires_grad)
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline", **_: object) -> None:
        """Recomputes the layers' activations in the backward pass instead of keeping them.

        Args:
            enable: switch it on or off.
            impl: open_clip 4's argument; open_clip 3's transformer has only one implementation.
        """
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that timm's optimizers (``--opt timm/NAME``) exclude from weight decay.

        AdamW does not call this and decays them, as in open_clip's trainer.
        """
        return {"positional_embedding"}


def project(features: torch.Tensor, projection: nn.Module | torch.Tensor | None) -> torch.Tensor:
    """Projects features [..., width] -> [..., dim], with a projection in any of open_clip's forms."""
    if projection is None:
        return features
    return projection(features) if isinstance(projection, nn.Linear) else features @ projection
