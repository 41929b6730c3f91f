"""LoTLIP's text tower: a Hugging Face encoder with corner tokens, and the families of encoders that can be one.

An encoder's own `forward` derives its attention mask from the padding alone, so each family is a subclass of
`CornerHFText` that runs its encoder with our own mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from training.model.names.config import ModelSpec
from training.model.names.files import downloading, find_pretrained_folder
from training.model.packing import additive_mask, attend_in_buckets, compute_dtype, split_into_buckets
from training.model.towers.corner import pool_without_corners, prefix_attention
from training.model.towers.text_tower import TEXT_TOWERS, TextTower
from training.model.weights.load import load_pretrained_text
from training.runtime.registry import Registry, expect_one_of

POOLERS = ("cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler", "max_pooler")
PUBLISHED = "published"
CORNER_ATTENTION = (PUBLISHED, "ordinary")
_NOT_ARCHITECTURE = ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type")


ENCODERS: Registry[type["CornerHFText"]] = Registry("encoder with corner tokens")  # by the model_type of a config


@TEXT_TOWERS.register("hugging_face")
class CornerHFText(TextTower):
    """A bidirectional Hugging Face encoder with corner tokens at positions 1..m.

    State-dict names are the published ones: ``transformer.*`` (the encoder's own names) and ``proj.*``. Calling this
    class returns an object of the subclass in `ENCODERS` that has the config's model type. Such a subclass defines
    `run` or `run_buckets`, and `layers`.

    Args:
        config: the encoder's config; its position table is lengthened if `context_length` needs it.
        output_dim: dimension of the features.
        num_corners: m.
        context_length: maximum number of tokens.
        proj_type: ``linear``, ``mlp`` or None, as in open_clip.
        pooler_type: one of `POOLERS`; None uses the family's default. Mean and max pooling exclude the corners; the
            corners' features are always their own hidden states.
        corner_attention: one of `CORNER_ATTENTION`. ``published``: no other token attends to a corner;
            ``ordinary``: corners are attended to like any other token, an ablation of the published rule.

    Attributes:
        default_pooler: one of `POOLERS`, used if a model config names none.
        has_pooler: the encoder can end in BERT's pooler (``add_pooling_layer``).

    Raises:
        ValueError: unknown model type, pooler, projection or attention.
    """

    rgb_first = True
    locks_norms_apart = True
    transformer: Any
    pad_id: int
    default_pooler = "mean_pooler"
    has_pooler = False

    def __new__(cls, config: Any = None, *_: object, **__: object) -> "CornerHFText":
        return super().__new__(ENCODERS.find(config.model_type) if cls is CornerHFText else cls)

    def __init__(
        self,
        config: PretrainedConfig,
        output_dim: int,
        num_corners: int,
        context_length: int,
        proj_type: str | None = "linear",
        pooler_type: str | None = None,
        corner_attention: str = PUBLISHED,
    ):
        super().__init__()
        pooler_type = pooler_type or self.default_pooler
        expect_one_of(CORNER_ATTENTION, corner_attention, "corner_attention")
        expect_one_of(POOLERS, pooler_type, "hf_pooler_type")
        self.num_corners, self.context_length, self.output_dim = num_corners, context_length, output_dim
        self.num_hidden_corners = num_corners if corner_attention == PUBLISHED else 0
        self.pooler_type, self.pad_id, self.position_offset = pooler_type, config.pad_token_id, self.offset_of(config)
        needed = context_length + self.position_offset
        config.max_position_embeddings = max(config.max_position_embeddings, needed)
        # sdpa, because flash attention does not accept our masks.
        self.transformer = AutoModel.from_config(config, attn_implementation="sdpa", **self._pooler())
        if getattr(config, "sinusoidal_start", None):
            _start_with_sinusoids(self.transformer.embeddings.position_embeddings.weight, config.sinusoidal_start)
        if num_corners:
            self.transformer.resize_token_embeddings(config.vocab_size + num_corners, mean_resizing=False)
        self.vocab_size = self.transformer.config.vocab_size
        self.proj = _projection(proj_type, config.hidden_size, output_dim)

    def _pooler(self) -> dict[str, bool]:
        return {"add_pooling_layer": self.pooler_type == "cls_pooler"} if self.has_pooler else {}

    def offset_of(self, config: PretrainedConfig) -> int:
        """Returns the number of rows at the start of the position table that no token uses."""
        return 0

    @classmethod
    def build(cls, spec: ModelSpec, stock: nn.Module, cache_dir: str | None) -> "CornerHFText":
        cfg, sizes = spec.text_cfg, (spec.model_cfg["embed_dim"], spec.num_corners, spec.context_length)
        kinds = cfg.get("hf_proj_type", "mlp"), cfg.get("hf_pooler_type"), cfg.get("corner_attention", PUBLISHED)
        return cls(_encoder_config(cfg, cache_dir), *sizes, *kinds)

    def load_pretrained(self, spec: ModelSpec, cache_dir: str | None) -> None:
        if name := spec.text_cfg.get("hf_model_name"):
            with downloading(f"pretrained text weights {name}", cache_dir):
                source = find_pretrained_folder(name, cache_dir) or name
                encoder = AutoModel.from_pretrained(source, cache_dir=cache_dir, **self._pooler())
            load_pretrained_text(self, encoder.state_dict(), name)

    def config_fields(self) -> dict:
        # The encoder's config written out in full, so that loading needs no hub access to get the encoder's size.
        config = self.transformer.config
        fields = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_ARCHITECTURE}
        fields["vocab_size"] = config.vocab_size - self.num_corners
        return {"hf_config": {"model_type": config.model_type, **fields}}

    def all_features(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bucket_features([ids])

    def bucket_features(self, buckets: Sequence[torch.Tensor]) -> torch.Tensor:
        keep = [ids != self.pad_id for ids in buckets]
        allowed = [prefix_attention(tokens, self.num_hidden_corners) for tokens in keep]
        reads_all = self.pooler_type in ("mean_pooler", "max_pooler")  # the others read only [CLS] and the corners
        states = self.run_buckets(buckets, allowed, None if reads_all else self.num_corners + 1)
        if reads_all:
            kind = self.pooler_type.removesuffix("_pooler")
            states = [pool_without_corners(kind, *bucket, self.num_corners) for bucket in zip(states, keep)]
        joined, pooler = torch.cat([*states]), getattr(self.transformer, "pooler", None)  # [n, m + 1, width]
        if self.pooler_type == "cls_pooler" and pooler is not None:
            joined = pooler.activation(pooler.dense(joined))
        return self.proj(joined)

    def run(self, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Runs the encoder with an attention mask.

        Args:
            ids: [batch, seq_len] int64.
            allowed: [batch, seq_len, seq_len] bool, (query, key).

        Returns:
            Last hidden states [batch, seq_len, width].
        """
        return self.run_buckets([ids], [allowed])[0]

    def run_buckets(
        self, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor], num_first: int | None = None
    ) -> Sequence[torch.Tensor]:
        """Runs the encoder on several buckets of captions, each with its attention mask.

        Args:
            buckets: token ids, [n_b, L_b] int64 each.
            allowed: [n_b, L_b, L_b] bool each, (query, key).
            num_first: number of positions at the start of a caption whose states are needed; None means all.

        Returns:
            Last hidden states of each bucket, [n_b, L_b, width] or [n_b, num_first, width].
        """
        return [self.run(*bucket)[:, :num_first] for bucket in zip(buckets, allowed)]

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the encoder except its last layers; the projection stays trainable, as in open_clip.

        Args:
            unlocked_layers: number of layers at the end that stay trainable, with all that follows them.
            freeze_layer_norm: also freeze the layer norms of frozen layers.
        """
        frozen = [self.transformer.embeddings, *self.layers()][:-unlocked_layers]
        for module in frozen if unlocked_layers else [self.transformer]:
            for name, parameter in module.named_parameters():
                parameter.requires_grad = "norm" in name.lower() and not freeze_layer_norm
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the encoder's activations in the backward pass instead of keeping them."""
        encoder = self.transformer
        # Late releases of transformers 5 have a new name for it, and warn of the old one.
        word = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
        if enable:
            getattr(encoder, f"{word}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(encoder, f"{word}_checkpointing_disable")()


ATTENTION = "lotlip_buckets"


@ENCODERS.register("bert")
class Bert(CornerHFText):
    """BERT and similar encoders, run via their `embeddings` and `encoder` modules, whose interface is stable.

    The linear layers run on the tokens of all buckets at once. The last layer computes queries, and everything after
    attention, only for the positions whose output is used; all other positions need only keys and values there, which
    saves nearly one layer's work. Positions start at 0, and there is a pooler.
    """

    default_pooler = "cls_pooler"
    has_pooler = True
    joins_buckets = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transformer.set_attn_implementation(ATTENTION)
        # Autocast would cast the hidden states for queries, keys and values separately, and their gradients back.
        for layer in self.transformer.encoder.layer:
            layer.attention.self.register_forward_pre_hook(_cast_once)

    def run_buckets(
        self, buckets: Sequence[torch.Tensor], allowed: Sequence[torch.Tensor], num_first: int | None = None
    ) -> Sequence[torch.Tensor]:
        ids = torch.cat([bucket.flatten() for bucket in buckets])
        positions = torch.cat([self.positions(bucket).flatten() for bucket in buckets])
        hidden = self.transformer.embeddings(input_ids=ids[None], position_ids=positions[None])  # [1, total, width]
        masks = tuple(additive_mask(rule, compute_dtype(hidden)) for rule in allowed)
        *others, last = self.layers()
        for layer in others:
            hidden = layer(hidden, masks)
        hidden = _layer_on_first(last, hidden[0], masks, num_first) if num_first else last(hidden, masks)[0]
        return split_into_buckets(hidden, masks, num_first)

    def layers(self) -> nn.ModuleList:
        return self.transformer.encoder.layer

    def compilable(self) -> list[nn.Module]:
        # All but attention, whose masks, one per bucket, differ in number and shape in every step.
        layers = self.transformer.encoder.layer
        return [module for layer in layers for module in (layer.attention.output, layer.intermediate, layer.output)]

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the row of the position table of each token: [n, seq_len]."""
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


@ENCODERS.register("roberta", "xlm-roberta", "camembert")
class Roberta(Bert):
    """RoBERTa and similar encoders: positions start at padding's id + 1, and padding is not counted."""

    default_pooler = CornerHFText.default_pooler

    def offset_of(self, config: PretrainedConfig) -> int:
        return config.pad_token_id + 1

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        keep = ids != self.pad_id
        return keep.cumsum(dim=1) * keep + self.pad_id


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: tuple[torch.Tensor, ...] | torch.Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function with transformers' signature: for buckets ours, for the encoder's own `forward` sdpa."""
    if not isinstance(attention_mask, tuple):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))  # [total, heads, d]
    return attend_in_buckets(query, key, value, attention_mask, dropout)[None], None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _cast_once(attention: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *others = inputs
    return (hidden.to(compute_dtype(hidden)), *others)


def _layer_on_first(layer: Any, hidden: torch.Tensor, masks: tuple[torch.Tensor, ...], num_first: int) -> torch.Tensor:
    """Computes a layer for the first positions of each caption only: [total, width] -> [n x num_first, width]."""
    attend = layer.attention.self
    first = torch.cat([bucket[:, :num_first].flatten(0, 1) for bucket in split_into_buckets(hidden, masks)])
    hidden = hidden.to(compute_dtype(hidden))  # once for keys and values
    projected = attend.query(first), attend.key(hidden), attend.value(hidden)
    query, key, value = (tokens.unflatten(-1, (attend.num_attention_heads, -1)) for tokens in projected)
    seen = attend_in_buckets(query, key, value, masks, attend.dropout.p if attend.training else 0.0, num_first)
    return layer.feed_forward_chunk(layer.attention.output(seen.flatten(1), first))


@ENCODERS.register("modernbert")
class ModernBert(CornerHFText):
    """ModernBERT: every third layer attends to all tokens, the others to a window."""

    default_pooler = "cls_last_hidden_state_pooler"

    def run(self, ids: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        encoder = self.transformer
        window, dtype = encoder.config.local_attention // 2, compute_dtype(encoder.get_input_embeddings().weight)
        full = sliding = additive_mask(allowed, dtype)
        if ids.shape[1] > window + 1:  # in a shorter caption all tokens are near each other
            position = torch.arange(ids.shape[1], device=ids.device)
            near = (position[:, None] - position[None, :]).abs() <= window
            sliding = additive_mask(allowed & near, dtype)
        return encoder(input_ids=ids, attention_mask={"full_attention": full, "sliding_attention": sliding})[0]

    def layers(self) -> nn.ModuleList:
        return self.transformer.layers


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


def _encoder_config(text_cfg: dict, cache_dir: str | None) -> PretrainedConfig:
    """Returns the encoder's config: ``hf_config`` if the model config has it, otherwise that of ``hf_model_name``.

    Raises:
        FileNotFoundError: the config is neither on this machine nor on the hub.
    """
    if fields := text_cfg.get("hf_config"):
        return AutoConfig.for_model(**fields)
    name = text_cfg["hf_model_name"]
    with downloading(f"hf_model_name {name}", cache_dir):
        return AutoConfig.from_pretrained(find_pretrained_folder(name, cache_dir) or name, cache_dir=cache_dir)


@torch.no_grad()
def _start_with_sinusoids(table: torch.Tensor, amplitude: float) -> None:
    """Fills learned positions [rows, width] with scaled sinusoids of the Transformer (arXiv 1706.03762, section 3.5).

    A BERT trained from scratch then learns to distinguish neighbouring from distant words much earlier than with random
    positions.
    """
    rows, width = table.shape
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(rows)[:, None] * rates
    table.copy_(amplitude * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width])
