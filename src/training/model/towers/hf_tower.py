"""LoTLIP's text tower, a Hugging Face encoder with corner tokens, and the two-tower model."""

from collections.abc import Sequence

import open_clip
import torch
from torch import nn
from transformers import PretrainedConfig

from training.model.packing.arranger import Row
from training.model.towers.corner import max_without_corners, mean_without_corners, prefix_attention
from training.model.towers.corner_tower import CornerTower
from training.model.towers.encoders.family import EncoderFamily, family_of
from training.model.towers.hf_encoders import POOLERS, build_encoder, fit_context
from training.model.towers.row_attention import attends_in_buckets, row_slots

CORNER_ATTENTION = ("published", "ordinary")


class CornerHFText(CornerTower):
    """A bidirectional Hugging Face encoder with corner tokens at positions 1..m.

    State-dict names are the published ones: ``transformer.*`` (the encoder's own names) and ``proj.*``.

    Args:
        config: the encoder's config; its position table is lengthened if `context_length` needs it.
        output_dim: dimension of the features.
        num_corners: m.
        context_length: maximum number of tokens.
        proj_type: ``linear``, ``mlp`` or None, as in open_clip.
        pooler_type: one of `hf_encoders.POOLERS`; None uses the family's default. Mean and max pooling exclude the
            corners; the corners' features are always their own hidden states.
        corner_attention: one of `CORNER_ATTENTION`. ``published``: no other token attends to a corner;
            ``ordinary``: corners are attended to like any other token, an ablation of the published rule.

    Raises:
        ValueError: unknown pooler, projection or attention.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        output_dim: int,
        num_corners: int,
        context_length: int,
        proj_type: str | None = "linear",
        pooler_type: str | None = None,
        corner_attention: str = CORNER_ATTENTION[0],
    ):
        super().__init__()
        if corner_attention not in CORNER_ATTENTION:
            raise ValueError(f"corner_attention {corner_attention}: expected one of {', '.join(CORNER_ATTENTION)}")
        self.family: EncoderFamily = family_of(config)
        pooler_type = pooler_type or self.family.default_pooler
        if pooler_type not in POOLERS:
            raise ValueError(f"hf_pooler_type {pooler_type}: expected one of {', '.join(POOLERS)}")
        fit_context(config, context_length)
        self.num_corners = num_corners
        self.num_hidden_corners = num_corners if corner_attention == "published" else 0
        self.context_length = context_length
        self.output_dim = output_dim
        self.pooler_type = pooler_type
        self.pad_id = config.pad_token_id
        self.transformer = build_encoder(config, pooler_type == "cls_pooler", extra_rows=num_corners)
        self.vocab_size = self.transformer.config.vocab_size
        self.proj = _projection(proj_type, config.hidden_size, output_dim)

    @property
    def position_offset(self) -> int:
        """Number of rows of the position table before the first token's row."""
        return self.family.position_offset(self.transformer.config)

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        keep = ids != self.pad_id
        allowed = prefix_attention(keep, self.num_hidden_corners)
        if self._reads_all:
            return self.proj(self._pool_all(self.family.run(self.transformer, ids, allowed), keep))
        return self.proj(self._pool(self.family.first_states(self.transformer, ids, allowed, self.num_corners + 1)))

    @property
    def attends_in_rows(self) -> bool:
        """Whether captions can be packed in a row (``--text-packing flex``)."""
        return self.family.packs_rows and self.transformer._supports_attention_backend

    def row_features(self, row: Row) -> torch.Tensor:
        """Features [n, m + 1, dim] of captions packed in a row by `packing.CaptionArranger`, as in `all_features`."""
        if self._reads_all:
            slots, keep = row_slots(row)
            hidden = self.family.run_on_row(self.transformer, row, self.num_hidden_corners)[0]  # [budget, width]
            return self.proj(self._pool_all(hidden[slots], keep))
        hidden, num_first = self.num_hidden_corners, self.num_corners + 1
        return self.proj(self._pool(self.family.first_states_in_row(self.transformer, row, hidden, num_first)))

    def bucket_features(self, buckets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features [n, m + 1, dim] of buckets [n_b, L_b] of captions, in the order of the buckets.

        After `row_attention.let_attend_in_buckets` the linear layers run on all buckets at once.
        """
        if len(buckets) == 1 or not attends_in_buckets(self.transformer):
            return torch.cat([self.all_features(ids) for ids in buckets])
        keep = [ids != self.pad_id for ids in buckets]
        allowed = [prefix_attention(tokens, self.num_hidden_corners) for tokens in keep]
        if self._reads_all:
            hidden = self.family.run_on_buckets(self.transformer, buckets, allowed)
            return self.proj(torch.cat([self._pool_all(*part) for part in zip(hidden, keep)]))
        num_first = self.num_corners + 1
        return self.proj(self._pool(self.family.first_states_in_buckets(self.transformer, buckets, allowed, num_first)))

    @property
    def _reads_all(self) -> bool:
        """Whether the pooler needs all tokens' hidden states; other poolers need only [CLS] and the corners."""
        return self.pooler_type in ("mean_pooler", "max_pooler")

    def _pool_all(self, hidden: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """[batch, seq_len, width] -> [batch, m + 1, width]."""
        pool = mean_without_corners if self.pooler_type == "mean_pooler" else max_without_corners
        pooled = pool(hidden, keep, self.num_corners)
        return torch.cat([pooled[:, None], hidden[:, 1 : self.num_corners + 1]], dim=1)

    def _pool(self, special: torch.Tensor) -> torch.Tensor:
        """Applies BERT's pooler, if used, to the states of [CLS] and the corners: [batch, m + 1, width], unchanged."""
        pooler = getattr(self.transformer, "pooler", None)
        if self.pooler_type == "cls_pooler" and pooler is not None:
            return pooler.activation(pooler.dense(special))
        return special

    def layer_groups(self, pooler_in_head: bool = True) -> list[tuple[str, Sequence[nn.Module]]]:
        """Returns all parts with parameters as (name, modules), from the input to the output.

        Args:
            pooler_in_head: put BERT's pooler into the projection's group; False makes it a separate group.
        """
        layers = [(f"layer.{i}", [layer]) for i, layer in enumerate(self.family.layers(self.transformer))]
        layers[-1][1].extend(self.family.after_layers(self.transformer))
        pooler = getattr(self.transformer, "pooler", None)
        head = [("proj", [self.proj])]
        if pooler is not None:
            head = [("proj", [pooler, self.proj])] if pooler_in_head else [("pooler", [pooler]), *head]
        return [("embeddings", [self.transformer.embeddings]), *layers, *head]

    def lock(
        self, unlocked_layers: int = 0, freeze_layer_norm: bool = True, pooler_in_head: bool = False, **_: object
    ) -> None:
        """Freezes the encoder except its last layers; the projection stays trainable, as in open_clip.

        Args:
            unlocked_layers: number of layers at the end that stay trainable; if it is not 0, so does BERT's pooler.
            freeze_layer_norm: also freeze the layer norms of frozen layers.
            pooler_in_head: keep BERT's pooler trainable even if no layer is (open_clip 4's argument).
        """
        groups = self.layer_groups(pooler_in_head=pooler_in_head or unlocked_layers > 0)
        frozen = groups[: len(groups) - 1 - unlocked_layers]
        for parameters in (part.named_parameters() for _, parts in frozen for part in parts):
            for name, parameter in parameters:
                parameter.requires_grad = "norm" in name.lower() and not freeze_layer_norm
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline", **_: object) -> None:
        """Recomputes the encoder's activations in the backward pass instead of keeping them.

        Args:
            enable: switch it on or off.
            impl: open_clip 4's argument; transformers has only one implementation.
        """
        encoder = self.transformer
        # Late releases of transformers 5 have a new name for it, and warn of the old one.
        word = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
        if enable:
            getattr(encoder, f"{word}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(encoder, f"{word}_checkpointing_disable")()


def _projection(proj_type: str | None, width: int, output_dim: int) -> nn.Module:
    """Builds the projection of open_clip's Hugging Face adapter, with the same parameter names."""
    if proj_type is None and width == output_dim:
        return nn.Identity()
    if proj_type == "linear":
        return nn.Linear(width, output_dim, bias=False)
    if proj_type == "mlp":
        middle = (width + output_dim) // 2
        return nn.Sequential(nn.Linear(width, middle, bias=False), nn.GELU(), nn.Linear(middle, output_dim, bias=False))
    raise ValueError(f"hf_proj_type {proj_type}: expected linear or mlp, or none where both widths are {output_dim}")


class LotlipCLIP(open_clip.CustomTextCLIP):
    """open_clip's two-tower model with one of our text towers as `text`.

    Args:
        stock: open_clip's model; its image tower, temperature and settings are used.
        text: `CornerHFText` or `CornerCLIPText`.
    """

    def __init__(self, stock: open_clip.CustomTextCLIP, text: CornerTower):
        nn.Module.__init__(self)
        self.output_dict = stock.output_dict
        self.visual, self.text = stock.visual, text
        self.context_length, self.vocab_size = text.context_length, text.vocab_size
        self.logit_scale, self.logit_bias = stock.logit_scale, stock.logit_bias
