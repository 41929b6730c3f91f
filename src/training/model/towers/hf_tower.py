"""LoTLIP's text tower: a Hugging Face encoder with corner tokens.

An encoder's own `forward` derives its attention mask from the padding alone, so each family of encoders is a subclass
of `CornerHFText` that runs its encoder with our own mask. `encoders` contains one file per family.
"""

import importlib
import pkgutil
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

import training.model.towers.encoders as folder
from training.model.names.config import ModelSpec
from training.model.names.files import downloading, find_pretrained_folder
from training.model.towers.corner import pool_without_corners, prefix_attention
from training.model.towers.text_tower import TextTower
from training.model.weights.load import load_pretrained_text

POOLERS = ("cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler", "max_pooler")
PUBLISHED = "published"
CORNER_ATTENTION = (PUBLISHED, "ordinary")
_NOT_ARCHITECTURE = ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type")


_FAMILIES: dict[str, type["CornerHFText"]] = {}


class CornerHFText(TextTower, name="hugging_face"):
    """A bidirectional Hugging Face encoder with corner tokens at positions 1..m.

    State-dict names are the published ones: ``transformer.*`` (the encoder's own names) and ``proj.*``. Calling this
    class returns an object of the subclass that has the config's model type. Such a subclass defines `run` or
    `run_buckets`, and `layers`; defining it registers it for its model types.

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
        model_types: values of ``model_type`` in the encoder's config.
        default_pooler: one of `POOLERS`, used if a model config names none.
        has_pooler: the encoder can end in BERT's pooler (``add_pooling_layer``).

    Raises:
        ValueError: unknown model type, pooler, projection or attention.
    """

    rgb_first = True
    locks_norms_apart = True
    model_types: tuple[str, ...] = ()
    default_pooler = "mean_pooler"
    has_pooler = False

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        _FAMILIES.update(dict.fromkeys(cls.__dict__.get("model_types", ()), cls))

    def __new__(cls, config: PretrainedConfig | None = None, *_: object, **__: object) -> "CornerHFText":
        return super().__new__(family_of(config) if cls is CornerHFText else cls)

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
        for name, value, known in (
            ("corner_attention", corner_attention, CORNER_ATTENTION),
            ("hf_pooler_type", pooler_type, POOLERS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value}: expected one of {', '.join(known)}")
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
        states, pooler = torch.cat(states), getattr(self.transformer, "pooler", None)  # [n, m + 1, width]
        if self.pooler_type == "cls_pooler" and pooler is not None:
            states = pooler.activation(pooler.dense(states))
        return self.proj(states)

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


def family_of(config: PretrainedConfig) -> type[CornerHFText]:
    """Returns the class of text towers for an encoder's config.

    Raises:
        ValueError: no family supports this model type.
    """
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    if config.model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"text towers of type {config.model_type} can't take corner tokens; {known} can")
    return _FAMILIES[config.model_type]


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
