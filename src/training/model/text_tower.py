"""Text towers with corner tokens: a Hugging Face encoder (LoTLIP), or open_clip's own causal transformer (CLIP).

Both take token ids [batch, seq_len] and return [batch, dim], or [batch, num_captions, seq_len] and return
[batch, T, dim] with T = 1 + (num_captions - 1)(m + 1): see `corner.features_of_captions`.
"""

import open_clip
import torch
from open_clip.transformer import lock_text_tower
from torch import nn
from transformers import PretrainedConfig

from training.model.corner import (
    additive_mask,
    features_of_captions,
    max_without_corners,
    mean_without_corners,
    prefix_attention,
    rows_before_end,
    suffix_attention,
)
from training.model.hf_encoders import (
    BERT_LIKE,
    DEFAULT_POOLER,
    POOLERS,
    build_encoder,
    encoder_layers,
    first_states,
    first_states_in_row,
    fit_context,
    position_offset,
    run_encoder,
    run_encoder_on_row,
)
from training.model.packing import BUCKET_COST_GPU, CaptionArranger, Captions
from training.model.row_attention import can_attend_in_rows, let_attend_in_rows, row_slots


class _CornerTower(nn.Module):
    """What both towers share: from the features of single captions to those of a batch."""

    num_corners: int

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, seq_len] -> [batch, m + 1, dim]: the pooled token's feature, then one per corner, not normalised."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Features, not normalised.

        Args:
            ids: [batch, seq_len], or [batch, num_captions, seq_len] with the short caption first.

        Returns:
            [batch, dim], or [batch, T, dim].
        """
        if ids.ndim == 2:
            return self.all_features(ids)[:, 0]
        return features_of_captions(self.all_features(ids.flatten(0, 1)), ids.shape[0])


class CornerHFText(_CornerTower):
    """A bidirectional Hugging Face encoder with corner tokens at positions 1..m.

    State-dict names are the published ones: ``transformer.*`` (the encoder's own), ``proj.*``.

    Args:
        config: the encoder's; its position table is lengthened if `context_length` needs it.
        output_dim: dim of the features.
        num_corners: m.
        context_length: longest sequence.
        proj_type: ``linear``, ``mlp`` or None (as open_clip).
        pooler_type: one of `hf_encoders.POOLERS`; None takes the family's. Mean and max leave the corners out, whose
            features are then their hidden states.

    Raises:
        ValueError: unknown pooler or projection.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        output_dim: int,
        num_corners: int,
        context_length: int,
        proj_type: str | None = "linear",
        pooler_type: str | None = None,
    ):
        super().__init__()
        pooler_type = pooler_type or DEFAULT_POOLER.get(config.model_type, "mean_pooler")
        if pooler_type not in POOLERS:
            raise ValueError(f"hf_pooler_type {pooler_type}: expected one of {', '.join(POOLERS)}")
        fit_context(config, context_length)
        self.num_corners = num_corners
        self.context_length = context_length
        self.output_dim = output_dim
        self.pooler_type = pooler_type
        self.pad_id = config.pad_token_id
        self.transformer = build_encoder(config, pooler_type == "cls_pooler", extra_rows=num_corners)
        self.vocab_size = self.transformer.config.vocab_size
        self.proj = _projection(proj_type, config.hidden_size, output_dim)

    @property
    def position_offset(self) -> int:
        """Rows of the position table before the first token's."""
        return position_offset(self.transformer.config)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        keep = ids != self.pad_id
        allowed = prefix_attention(keep, self.num_corners)
        if self._reads_all:
            return self.proj(self._pool_all(run_encoder(self.transformer, ids, allowed), keep))
        return self.proj(self._pool(first_states(self.transformer, ids, allowed, self.num_corners + 1)))

    def arranger(self, mode: str, device: torch.device, compiled: bool = False) -> CaptionArranger | None:
        """Returns what arranges captions for `packed_features`; None: they stay padded.

        Args:
            mode: ``auto``, or one of `packing.MODES`.
            device: where the tower runs.
            compiled: the tower is compiled, so that new shapes are dear: ``auto`` takes no buckets.

        Raises:
            ValueError: ``flex`` with an encoder that has no attention in rows.
        """
        in_rows = self.transformer.config.model_type in BERT_LIKE and can_attend_in_rows(self.transformer)
        if mode == "auto":
            mode = "flex" if device.type == "cuda" and in_rows else "padded" if compiled else "buckets"
        if mode == "padded":
            return None
        if mode == "flex":
            if not in_rows:
                raise ValueError(
                    f"--text-packing flex: needs transformers 5 and a text tower of {', '.join(BERT_LIKE)}, this one "
                    f"is {self.transformer.config.model_type}; take buckets"
                )
            let_attend_in_rows(self.transformer, device)
        if device.type == "cuda":
            return CaptionArranger(mode, self.pad_id, BUCKET_COST_GPU, multiple=8)
        return CaptionArranger(mode, self.pad_id)

    def packed_features(self, captions: Captions) -> torch.Tensor:
        """Features of captions that `packing.CaptionArranger` has arranged, as `all_features` gives them."""
        if captions.row is None:
            parts = [self.all_features(ids) for ids in captions.buckets]
            return torch.cat(parts).index_select(0, captions.places)
        row = captions.row
        if self._reads_all:
            slots, keep = row_slots(row)
            hidden = run_encoder_on_row(self.transformer, row, self.num_corners)[0]  # [budget, width]
            return self.proj(self._pool_all(hidden[slots], keep))
        first = first_states_in_row(self.transformer, row, self.num_corners, self.num_corners + 1)
        return self.proj(self._pool(first))

    @property
    def _reads_all(self) -> bool:
        """Whether the pooler needs every token's hidden state; the others need [CLS]'s and the corners' alone."""
        return self.pooler_type in ("mean_pooler", "max_pooler")

    def _pool_all(self, hidden: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """[batch, seq_len, width] -> [batch, m + 1, width]."""
        pool = mean_without_corners if self.pooler_type == "mean_pooler" else max_without_corners
        pooled = pool(hidden, keep, self.num_corners)
        return torch.cat([pooled[:, None], hidden[:, 1 : self.num_corners + 1]], dim=1)

    def _pool(self, special: torch.Tensor) -> torch.Tensor:
        """[batch, m + 1, width], as long."""
        pooler = getattr(self.transformer, "pooler", None)
        if self.pooler_type == "cls_pooler" and pooler is not None:
            return pooler.activation(pooler.dense(special))
        return special

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the encoder but for its last layers; the projection stays free (as open_clip does)."""
        parts = [self.transformer.embeddings, *encoder_layers(self.transformer)]
        locked = parts[:-unlocked_layers] if unlocked_layers else [self.transformer]
        for part in locked:
            for name, parameter in part.named_parameters():
                is_norm = "norm" in name.lower()
                parameter.requires_grad = is_norm and not freeze_layer_norm

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the encoder's activations in the backward pass instead of keeping them."""
        if enable:
            self.transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.transformer.gradient_checkpointing_disable()


def _projection(proj_type: str | None, width: int, output_dim: int) -> nn.Module:
    """The projections of open_clip's Hugging Face adapter, under the same names."""
    if proj_type is None and width == output_dim:
        return nn.Identity()
    if proj_type == "linear":
        return nn.Linear(width, output_dim, bias=False)
    if proj_type == "mlp":
        middle = (width + output_dim) // 2
        return nn.Sequential(nn.Linear(width, middle, bias=False), nn.GELU(), nn.Linear(middle, output_dim, bias=False))
    raise ValueError(f"hf_proj_type {proj_type}: expected linear or mlp, or none where both widths are {output_dim}")


class CornerCLIPText(_CornerTower):
    """open_clip's causal text transformer with corner tokens right before [EOT].

    CLIP's ids and pretrained embeddings stay as they are; corner ids come after them and have a table of their own,
    ``corner_embedding``. With m = 0 it equals the transformer it was made from.

    Args:
        tower: an open_clip `TextTransformer` as CLIP has it; its parts are taken over under their names.
        num_corners: m.

    Raises:
        ValueError: a tower that is not causal or does not pool the end token.
    """

    def __init__(self, tower: nn.Module, num_corners: int):
        super().__init__()
        if tower.pool_type != "argmax" or tower.attn_mask is None or tower.cls_emb is not None:
            raise ValueError("corner tokens need a causal text tower that pools [EOT], as CLIP's; this one is another")
        self.num_corners = num_corners
        self.context_length = tower.context_length
        self.output_dim = tower.output_dim
        self.heads = tower.heads
        self.base_vocab_size = tower.vocab_size
        self.end_id = tower.vocab_size - 1
        self.vocab_size = tower.vocab_size + num_corners
        self.position_offset = 0
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        if num_corners:
            weight = tower.token_embedding.weight
            self.corner_embedding = nn.Embedding(num_corners, weight.shape[1], dtype=weight.dtype)
            nn.init.normal_(self.corner_embedding.weight, std=0.02)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        dtype = self.transformer.get_cast_dtype()
        end = (ids == self.end_id).int().argmax(dim=-1)  # [batch]
        hidden = (self._embed(ids) + self.positional_embedding[: ids.shape[1]]).to(dtype)
        mask = additive_mask(suffix_attention(end, ids.shape[1], self.num_corners), dtype)
        # torch's attention wants one mask per head: [batch x heads, seq_len, seq_len].
        mask = mask.expand(-1, self.heads, -1, -1).flatten(0, 1)
        hidden = self.ln_final(self.transformer(hidden, attn_mask=mask))
        pooled = rows_before_end(hidden, end, self.num_corners)
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled)
        return pooled if self.text_projection is None else pooled @ self.text_projection

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.num_corners:
            return self.token_embedding(ids)
        corner = (ids - self.base_vocab_size).clamp(min=0)
        words = self.token_embedding(ids.clamp(max=self.base_vocab_size - 1))
        return torch.where((ids >= self.base_vocab_size)[..., None], self.corner_embedding(corner), words)

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the tower but for its last layers, as open_clip does; the corners go with the word embedding."""
        if not freeze_layer_norm:
            raise ValueError("--lock-text-freeze-layer-norm: open_clip's own text tower has no such choice")
        lock_text_tower(self, unlocked_layers)
        if self.num_corners:
            self.corner_embedding.requires_grad_(self.token_embedding.weight.requires_grad)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the layers' activations in the backward pass instead of keeping them."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer should not decay."""
        return {"positional_embedding"}


class LotlipCLIP(open_clip.CustomTextCLIP):
    """open_clip's two-tower model with one of the towers above as `text`. Made by `factory.create_model`.

    Attributes:
        lotlip_config: what `saving.save_pretrained` writes to ``open_clip_config.json``.
    """

    lotlip_config: dict
