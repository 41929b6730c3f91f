"""LoTLIP for transformers, in one file: AutoModel.from_pretrained(FOLDER, trust_remote_code=True).

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(FOLDER), CLIPImageProcessor.from_pretrained(FOLDER)
    text = model.get_text_features(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))
    image = model.get_image_features(**processor(images, return_tensors="pt"))

The text tower is a BERT with m corner tokens after [CLS], which the tokenizer inserts. They attend to the text, but no
other token attends to them; the first feature of a caption is that of [CLS]. The image tower is CLIP's or a timm model
(pip install timm).
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPOutput


class LotlipConfig(PretrainedConfig):
    """Config of both towers.

    Args:
        text_config: config of the BERT.
        vision_config: config of a CLIP image tower; None for a timm model.
        vision_pool: pooling of a CLIP image tower: ``tok`` (class token) or ``avg`` (mean of patches).
        timm_model_name, timm_pool: name and pooling of a timm image tower.
        vision_projection: whether a linear projection follows a timm image tower.
        image_size: size of images in pixels.
        num_corner_tokens: m.
        pooler: ``cls_pooler`` (BERT's dense + tanh) or ``cls_last_hidden_state_pooler``.
        text_projection: ``linear``, ``mlp`` or None.
        projection_dim: dimension of the features.
    """

    model_type = "lotlip"

    def __init__(
        self,
        text_config: dict | None = None,
        vision_config: dict | None = None,
        vision_pool: str = "tok",
        timm_model_name: str | None = None,
        timm_pool: str = "",
        vision_projection: bool = False,
        image_size: int = 224,
        num_corner_tokens: int = 0,
        pooler: str = "cls_pooler",
        text_projection: str | None = "linear",
        projection_dim: int = 512,
        **kwargs,
    ):
        self.text_config, self.vision_config = text_config or {"model_type": "bert"}, vision_config
        self.vision_pool = vision_pool
        self.timm_model_name, self.timm_pool, self.vision_projection = timm_model_name, timm_pool, vision_projection
        self.image_size, self.num_corner_tokens, self.pooler = image_size, num_corner_tokens, pooler
        self.text_projection, self.projection_dim = text_projection, projection_dim
        super().__init__(**kwargs)


class LotlipModel(PreTrainedModel):
    """Both towers; like those of transformers' CLIPModel, the features are not normalised."""

    config_class = LotlipConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["BertLayer", "RobertaLayer", "XLMRobertaLayer", "CLIPEncoderLayer"]
    config: LotlipConfig
    text_model: Any
    vision_model: Any
    text_projection: nn.Module
    visual_projection: nn.Module

    def __init__(self, config: LotlipConfig):
        super().__init__(config)
        fields = dict(config.text_config)
        text = AutoConfig.for_model(fields.pop("model_type"), **fields)
        has_pooler = config.pooler == "cls_pooler"
        self.text_model = AutoModel.from_config(text, add_pooling_layer=has_pooler, attn_implementation="sdpa")
        width, dim = text.hidden_size, config.projection_dim
        if config.text_projection == "linear":
            self.text_projection = nn.Linear(width, dim, bias=False)
        elif config.text_projection == "mlp":
            middle = (width + dim) // 2
            layers = nn.Linear(width, middle, bias=False), nn.GELU(), nn.Linear(middle, dim, bias=False)
            self.text_projection = nn.Sequential(*layers)
        else:
            self.text_projection = nn.Identity()
        if config.vision_config:
            self.vision_model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.vision_config))
        else:
            import timm

            name = config.timm_model_name or ""
            self.vision_model = timm.create_model(name, num_classes=0, global_pool=config.timm_pool)
            width = self.vision_model.num_features
            self.visual_projection = nn.Linear(width, dim, bias=False) if config.vision_projection else nn.Identity()
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        all_features: bool = False,
    ) -> torch.Tensor:
        """Returns features of captions.

        Args:
            input_ids: [batch, seq_len], from the tokenizer in this folder.
            attention_mask: [batch, seq_len], 0 for tokens to ignore; padding always is.
            token_type_ids: not used: all tokens are of type 0.
            all_features: also return the features of the corner tokens.

        Returns:
            [batch, dim]; with `all_features` [batch, m + 1, dim], with that of [CLS] first.
        """
        text, corners = self.text_model, self.config.num_corner_tokens
        offset = text.config.pad_token_id + 1 if text.config.model_type in ("roberta", "xlm-roberta") else 0
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = text.embeddings(
            input_ids=input_ids,
            token_type_ids=torch.zeros_like(input_ids),
            position_ids=(position + offset)[None].expand_as(input_ids),
        )
        is_corner = (position >= 1) & (position <= corners)
        rule = ~is_corner[None, :] & ~(is_corner[:, None] & (position == 0)) | (position[:, None] == position)
        kept = input_ids != text.config.pad_token_id  # even one that is written in a text
        if attention_mask is not None:
            kept = kept & attention_mask.bool()
        allowed = rule & kept[:, None, :]
        mask = torch.where(allowed, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)[:, None]
        special = text.encoder(hidden, attention_mask=mask)[0][:, : corners + 1]
        if self.config.pooler == "cls_pooler":
            special = torch.tanh(text.pooler.dense(special))
        features = self.text_projection(special)
        return features if all_features else features[:, 0]

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns features [batch, dim] of images [batch, 3, H, W] from the processor in this folder."""
        pixel_values = pixel_values.to(self.logit_scale.dtype)
        if self.config.vision_config:
            tower = self.vision_model.vision_model
            hidden = tower.post_layernorm(tower(pixel_values=pixel_values).last_hidden_state)
            pooled = hidden[:, 0] if self.config.vision_pool == "tok" else hidden[:, 1:].mean(dim=1)
            return self.vision_model.visual_projection(pooled)
        return self.visual_projection(self.vision_model(pixel_values))

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> CLIPOutput:
        """Returns normalised features and ``logits_per_image`` [images, texts]."""
        text = nn.functional.normalize(self.get_text_features(input_ids, attention_mask), dim=-1)
        image = nn.functional.normalize(self.get_image_features(pixel_values), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        return CLIPOutput(logits_per_image=logits, text_embeds=text, image_embeds=image)
