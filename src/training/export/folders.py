"""Exports a folder for open_clip's ``local-dir:`` and ``hf-hub:``, or for transformers.

For transformers, CLIP's own towers become a `CLIPModel`; LoTLIP's BERT tower comes with a modelling file.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedModel

from training.export import modeling_lotlip
from training.export.modeling_lotlip import LotlipConfig, LotlipModel
from training.export.source import Source, check_samples, own_features
from training.export.tokenizer_files import write_tokenizer
from training.model.assembly import factory
from training.model.towers.clip_tower import CornerCLIPText
from training.model.towers.hf_tower import Bert, CornerHFText
from training.model.towers.text_tower import TextTower
from training.model.weights.transformers_names import from_open_clip

_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_END_ID = 49407
_NOT_EXPORTED = ("logit_bias",)  # CLIPModel has no such parameter, and it does not affect rankings


def write_open_clip(source: Source, folder: Path) -> dict[str, torch.Tensor]:
    """Writes a folder for open_clip, which this project loads, too.

    Returns:
        The normalised features of the samples, computed by loading the folder with open_clip, or with
        `training.create_model` for a model with one of our text towers, as ``image`` and ``text``.
    """
    factory.save_pretrained(source.model, folder, source.tokenizer)
    name = f"local-dir:{folder}"
    library: Any = factory if isinstance(getattr(source.model, "text", None), TextTower) else open_clip
    model, _, preprocess = library.create_model_and_transforms(name)
    return own_features(
        replace(source, model=model.eval(), preprocess=preprocess, tokenizer=library.get_tokenizer(name))
    )


def write_transformers(source: Source, folder: Path) -> dict[str, torch.Tensor]:
    """Writes a folder for transformers.

    Returns:
        The normalised features of the samples, computed with transformers' own loaders, as ``image`` and ``text``.

    Raises:
        ValueError: the towers have no counterpart in transformers.
    """
    text = getattr(source.model, "text", source.model)
    model: PreTrainedModel
    if isinstance(text, CornerHFText):
        model = _lotlip(source)
    elif getattr(text, "num_corners", 0):
        raise ValueError("corner tokens in CLIP's own text tower have no counterpart in transformers; use --to onnx")
    else:
        model = _clip(source)
    model.save_pretrained(folder)
    if isinstance(text, CornerHFText):
        shutil.copyfile(modeling_lotlip.__file__, folder / "modeling_lotlip.py")
    processor = _processor(source)
    processor.save_pretrained(folder)
    CLIPProcessor(processor, write_tokenizer(source, folder)).save_pretrained(folder)  # for sentence-transformers
    return _exported_features(folder)


def _act(cfg: dict, model_cfg: dict) -> str:
    if model_cfg.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_pytorch_tanh" if (cfg.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def _vision_fields(source: Source) -> dict:
    visual, model_cfg = source.model.visual, source.config["model_cfg"]
    if not isinstance(visual, VisionTransformer):
        raise ValueError(f"the image tower, a {type(visual).__name__}, has no counterpart in transformers' CLIPModel")
    cfg, width = model_cfg["vision_cfg"], visual.conv1.out_channels
    return {
        "image_size": source.image_size,
        "patch_size": visual.patch_size[0],
        "hidden_size": width,
        "num_hidden_layers": cfg.get("layers", 12),
        "num_attention_heads": width // cfg.get("head_width", 64),
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "hidden_act": _act(cfg, model_cfg),
        "layer_norm_eps": visual.ln_post.eps,
        "projection_dim": model_cfg["embed_dim"],
    }


def _clip(source: Source) -> CLIPModel:
    model_cfg = source.config["model_cfg"]
    tower = getattr(source.model, "text", source.model)
    cfg = model_cfg["text_cfg"]
    if not (isinstance(tower, CornerCLIPText) or getattr(tower, "text_pool_type", None) or hasattr(tower, "pool_type")):
        raise ValueError(f"the text tower, a {type(tower).__name__}, has no counterpart in transformers' CLIPModel")
    if source.model.visual.pool_type != "tok":
        raise ValueError("the image tower averages its patches, but transformers' CLIPModel uses the class token")
    rows, width = tower.positional_embedding.shape
    fields = {
        "max_position_embeddings": rows,
        "vocab_size": tower.token_embedding.weight.shape[0],
        "hidden_size": width,
        "num_hidden_layers": cfg.get("layers", 12),
        "num_attention_heads": cfg.get("heads", 8),
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "hidden_act": _act(cfg, model_cfg),
        "layer_norm_eps": tower.ln_final.eps,
        "projection_dim": model_cfg["embed_dim"],
        "bos_token_id": _END_ID - 1,
        "eos_token_id": _END_ID,
        "pad_token_id": _END_ID,
    }
    config = CLIPConfig(text_config=fields, vision_config=_vision_fields(source), projection_dim=model_cfg["embed_dim"])
    model = CLIPModel(config)
    _load(model, from_open_clip({k: v for k, v in source.model.state_dict().items() if k not in _NOT_EXPORTED}))
    return model


def _load(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict({key: value.reshape(model.state_dict()[key].shape) for key, value in state.items()})
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"this architecture has no exact counterpart in transformers: {reason}") from error


def _lotlip(source: Source) -> LotlipModel:
    model, model_cfg = source.model, source.config["model_cfg"]
    text, visual = model.text, model.visual
    encoder = text.transformer.config
    if not isinstance(text, Bert) or text.pooler_type in ("mean_pooler", "max_pooler"):
        raise ValueError(
            f"text tower {encoder.model_type} with {text.pooler_type}: only BERT-like encoders that pool [CLS] can be "
            "exported"
        )
    skipped = ("transformers_version", "architectures", "dtype", "torch_dtype")
    fields = {key: value for key, value in encoder.to_diff_dict().items() if key not in skipped}
    has_projection = not isinstance(text.proj, nn.Identity)
    projection = model_cfg["text_cfg"].get("hf_proj_type", "mlp") if has_projection else None
    config = LotlipConfig(
        text_config=fields | {"model_type": encoder.model_type, "vocab_size": encoder.vocab_size},
        num_corner_tokens=text.num_corners,
        pooler=text.pooler_type,
        text_projection=projection,
        projection_dim=model_cfg["embed_dim"],
        auto_map={f"Auto{kind}": f"modeling_lotlip.Lotlip{kind}" for kind in ("Config", "Model")},
        image_size=source.image_size,
    )
    state = {f"text_model.{key}": value for key, value in text.transformer.state_dict().items()}
    state |= {f"text_projection.{key}": value for key, value in text.proj.state_dict().items()}
    if isinstance(visual, TimmModel):
        vision = model_cfg["vision_cfg"]
        config.timm_model_name, config.timm_pool = vision["timm_model_name"].split(".")[0], vision.get("timm_pool", "")
        config.vision_projection = "proj.weight" in visual.head.state_dict()
        state |= {f"vision_model.{key}": value for key, value in visual.trunk.state_dict().items()}
        state |= {f"visual_projection.{k.split('.')[-1]}": v for k, v in visual.head.state_dict().items()}
    else:
        config.vision_config, config.vision_pool = _vision_fields(source), visual.pool_type
        converted = from_open_clip({f"visual.{key}": value for key, value in visual.state_dict().items()})
        state |= {f"vision_model.{key}": value for key, value in converted.items()}
    result = LotlipModel(config)
    _load(result, state | {"logit_scale": model.logit_scale})
    return result


def _processor(source: Source) -> CLIPImageProcessor:
    cfg = source.config["preprocess_cfg"]
    size = source.image_size
    squash = cfg.get("resize_mode", "shortest") == "squash"
    return CLIPImageProcessor(
        size={"height": size, "width": size} if squash else {"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_center_crop=not squash,
        resample=_RESAMPLE.get(cfg.get("interpolation", "bicubic"), 3),
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )


@torch.no_grad()
def _exported_features(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the features of the samples, computed only with transformers' model, tokenizer and image processor."""
    from transformers import AutoModel, AutoTokenizer

    images, texts = check_samples()
    custom = "auto_map" in json.loads((folder / "config.json").read_text())
    model = AutoModel.from_pretrained(folder, trust_remote_code=custom).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=custom)
    words = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    # With Pillow's resize, like the original, so that the comparison shows differences of the towers only.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    features = {"image": model.get_image_features(pixel_values=pixels), "text": model.get_text_features(**words)}
    return {
        kind: nn.functional.normalize(getattr(value, "pooler_output", value), dim=-1)
        for kind, value in features.items()
    }
