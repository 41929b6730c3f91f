"""LoTLIP's text tower: a Hugging Face encoder with corner tokens."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from training.model.names.config import ModelSpec
from training.model.towers.corner import max_without_corners, mean_without_corners, prefix_attention
from training.model.towers.encoders.family import EncoderFamily, family_of
from training.model.towers.hf_encoders import (
    POOLERS,
    build_encoder,
    encoder_config,
    fit_context,
    load_pretrained_encoder,
)
from training.model.towers.text_tower import TextTower
from training.model.weights.load import load_pretrained_text

CORNER_ATTENTION = ("published", "ordinary")
_NOT_ARCHITECTURE = ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type")


class CornerHFText(TextTower):
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

    rgb_first = True
    locks_norms_apart = True

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

    @classmethod
    def check(cls, spec: ModelSpec, cache_dir: str | None) -> None:
        encoder_config(spec.text_cfg, cache_dir)

    @classmethod
    def build(cls, spec: ModelSpec, stock: nn.Module, cache_dir: str | None) -> "CornerHFText":
        cfg = spec.text_cfg
        return cls(
            encoder_config(cfg, cache_dir),
            spec.model_cfg["embed_dim"],
            spec.num_corners,
            spec.context_length,
            cfg.get("hf_proj_type", "mlp"),
            cfg.get("hf_pooler_type"),
            cfg.get("corner_attention", CORNER_ATTENTION[0]),
        )

    def load_pretrained(self, spec: ModelSpec, cache_dir: str | None) -> None:
        if name := spec.text_cfg.get("hf_model_name"):
            state = load_pretrained_encoder(name, self.pooler_type == "cls_pooler", cache_dir)
            load_pretrained_text(self, state, name)

    def config_fields(self) -> dict:
        # The encoder's config written out in full, so that loading needs no hub access to get the encoder's size.
        config = self.transformer.config
        fields = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_ARCHITECTURE}
        fields["vocab_size"] = config.vocab_size - self.num_corners
        return {"hf_config": {"model_type": config.model_type, **fields}}

    @property
    def position_offset(self) -> int:
        return self.family.position_offset(self.transformer.config)

    @property
    def joins_buckets(self) -> bool:
        return self.family.joins_buckets

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bucket_features([ids])

    def bucket_features(self, buckets: Sequence[torch.Tensor]) -> torch.Tensor:
        keep = [ids != self.pad_id for ids in buckets]
        allowed = [prefix_attention(tokens, self.num_hidden_corners) for tokens in keep]
        if self.pooler_type in ("mean_pooler", "max_pooler"):  # the others read only [CLS] and the corners
            hidden = self.family.run_buckets(self.transformer, buckets, allowed)
            return self.proj(torch.cat([self._pool_all(*bucket) for bucket in zip(hidden, keep)]))
        states = self.family.run_buckets(self.transformer, buckets, allowed, self.num_corners + 1)
        return self.proj(self._pool(torch.cat(states)))

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

    def layers(self) -> Sequence[nn.Module]:
        return self.family.layers(self.transformer)

    def attention_weights(self, ids: torch.Tensor, layer: int) -> torch.Tensor:
        allowed = prefix_attention(ids != self.pad_id, self.num_hidden_corners)
        return self.family.attention_weights(self.transformer, ids, allowed, self.num_corners + 1, layer)

    def layer_groups(self, pooler_in_head: bool = True) -> list[tuple[str, Sequence[nn.Module]]]:
        """Returns all parts with parameters as (name, modules), from the input to the output.

        Args:
            pooler_in_head: put BERT's pooler into the projection's group; False makes it a separate group.
        """
        layers = [(f"layer.{i}", [layer]) for i, layer in enumerate(self.layers())]
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
