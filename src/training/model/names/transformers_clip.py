"""Converts transformers' CLIP and SigLIP to open_clip's form: config, tokenizer and preprocessing.

The conversion is exact, so training, corner tokens and export work as they do for open_clip's own models. Remote code
is never run.
"""

from functools import partial
from pathlib import Path
from typing import Any

import timm
from open_clip.constants import INCEPTION_MEAN, INCEPTION_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional

from training.model.names.files import downloading, find_weights
from training.readers.files import read_json_object

HF = "hf:"
FAMILIES = ("clip", "siglip")
CLIP_VOCABULARY = 49408
_TANH = ("gelu_pytorch_tanh", "gelu_new")  # GELU approximated with tanh
_REGISTERED = "hf_siglip_"


def find_folder(name: str, cache_dir: str | None = None) -> Path:
    """Returns the folder of ``hf:FOLDER`` or ``hf:ORG/REPO``, downloaded if necessary.

    Raises:
        FileNotFoundError: there is no such folder, and the download failed.
    """
    source = name.removeprefix(HF)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    with downloading(f"--model {name}: no such folder", cache_dir):
        folder = Path(snapshot_download(source, cache_dir=cache_dir, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if not find_weights(folder):
            snapshot_download(source, cache_dir=cache_dir, allow_patterns=["pytorch_model.bin"])
    return folder


def read_config(folder: Path) -> tuple[dict, dict]:
    """Reads a folder's ``config.json`` and ``preprocessor_config.json``.

    Returns:
        model_cfg and preprocess_cfg in open_clip's form.

    Raises:
        FileNotFoundError: the folder has no config.
        ValueError: the model has no exact counterpart in open_clip.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--model {HF}{folder}: no config.json in this folder")
    content = read_json_object(path)
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(_refusal(folder, kind, content))
    from transformers import CLIPConfig, SiglipConfig

    config: Any = (CLIPConfig if kind == "clip" else SiglipConfig).from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    quick = {text.hidden_act == "quick_gelu", vision.hidden_act == "quick_gelu"}
    if len(quick) > 1:
        raise ValueError(f"{path}: open_clip has no model whose towers have different activations")
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "heads": text.num_attention_heads,
        **_transformer_cfg(text, path),
    }
    vision_cfg = _transformer_cfg(vision, path)
    if kind == "clip":
        model_cfg: dict = {"embed_dim": config.projection_dim, "quick_gelu": quick == {True}, "text_cfg": text_cfg}
        head_width = vision.hidden_size // vision.num_attention_heads
        model_cfg["vision_cfg"] = vision_cfg | {"patch_size": vision.patch_size, "head_width": head_width}
        if text.eos_token_id not in (2, text.vocab_size - 1):  # 2 means OpenAI's rule: pool at the largest id
            text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    else:
        text_cfg |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        model_cfg = {"embed_dim": vision.hidden_size, "custom_text": True, "init_logit_bias": -10, "text_cfg": text_cfg}
        name = _register_siglip(vision, vision_cfg)
        model_cfg["vision_cfg"] = {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    model_cfg["vision_cfg"]["image_size"] = vision.image_size
    return model_cfg, _read_preprocessing(folder, kind, vision.image_size)


def _refusal(folder: Path, kind: str | None, content: dict) -> str:
    reason = f"--model {HF}{folder}: model_type {kind} is not supported, only {' and '.join(FAMILIES)}"
    if kind == "siglip2":
        return f"{reason}; use one of SigLIP 2's fixed-resolution checkpoints, whose model_type is siglip"
    if "auto_map" in content:
        return (
            f"{reason}, and code that comes with a model is never run; compute its features in its own software "
            "(docs/models.md shows how for FG-CLIP, jina-clip and LLM2CLIP), and give them with --features"
        )
    return f"{reason}; for a folder in open_clip's format use --model local-dir:"


def _ratio(config: Any) -> float:
    """Returns the mlp_ratio for which int(width x ratio) is exactly the MLP's hidden width."""
    ratio = config.intermediate_size / config.hidden_size
    exact = int(config.hidden_size * ratio) == config.intermediate_size
    return ratio if exact else (config.intermediate_size + 0.5) / config.hidden_size


def _transformer_cfg(tower: Any, path: Path) -> dict:
    """Returns the entries that open_clip's configs of image and text transformers have in common."""
    if tower.hidden_act not in (*_TANH, "gelu", "quick_gelu"):
        raise ValueError(f"{path}: hidden_act {tower.hidden_act} has no counterpart in open_clip")
    return {
        "width": tower.hidden_size,
        "layers": tower.num_hidden_layers,
        "mlp_ratio": _ratio(tower),
        "norm_kwargs": {"eps": tower.layer_norm_eps},
        "act_kwargs": {"approximate": "tanh"} if tower.hidden_act in _TANH else None,
    }


def _register_siglip(vision: Any, cfg: dict) -> str:
    """Registers an image tower with exactly this config in timm; returns its name."""
    settings: dict[str, Any] = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": cfg["mlp_ratio"],
    }
    norm, activation = partial(nn.LayerNorm, **cfg["norm_kwargs"]), partial(nn.GELU, **cfg["act_kwargs"] or {})
    name = "_".join(map(str, settings.values())) + f"_{vision.hidden_act}_{vision.layer_norm_eps:g}"
    name = _REGISTERED + name.replace("-", "m").replace(".", "p")

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        layers: dict[str, Any] = {"norm_layer": norm, "act_layer": activation, "class_token": False}
        known = {key: options[key] for key in ("global_pool", "num_classes") if key in options}
        trunk: Any = timm.models.VisionTransformer(**settings, **layers, **known)
        trunk.pretrained_cfg = trunk.default_cfg = {"input_size": (3, vision.image_size, vision.image_size)}
        return trunk

    if not timm.is_model(name):
        build.__name__ = name
        timm.models.register_model(build)
    return name


def nearest_timm_name(name: str) -> str:
    """Returns timm's own image tower with the same sizes as one registered here; other names are returned unchanged.

    Raises:
        ValueError: timm has no image tower with these sizes.
    """
    if not name.startswith(_REGISTERED):
        return name
    image_size, patch, width, depth = name.removeprefix(_REGISTERED).split("_")[:4]
    kinds = {("768", "12"): "base", ("1024", "24"): "large", ("1152", "27"): "so400m", ("1536", "40"): "giantopt"}
    nearest = f"vit_{kinds.get((width, depth))}_patch{patch}_siglip_{image_size}"
    if not timm.is_model(nearest):
        raise ValueError(f"timm has no SigLIP image tower of width {width}, {depth} layers and {image_size} pixels")
    return nearest


def _read_preprocessing(folder: Path, kind: str, image_size: int) -> dict:
    """Returns the preprocess_cfg of a folder; missing settings get the family's defaults."""
    clip = kind == "clip"
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = read_json_object(folder / name)
            found |= content.get("image_processor", content)
    crops = found.get("do_center_crop", clip)
    edge = _edge(found.get("size", image_size))
    crop = _edge(found.get("crop_size", edge)) if crops else edge
    if not edge == crop == image_size:
        raise ValueError(
            f"{folder}: images are resized to {edge} and cropped to {crop}, but the tower takes {image_size}; all "
            "three sizes must be equal"
        )
    return {
        "size": image_size,
        "mean": found.get("image_mean", list(OPENAI_DATASET_MEAN if clip else INCEPTION_MEAN)),
        "std": found.get("image_std", list(OPENAI_DATASET_STD if clip else INCEPTION_STD)),
        "interpolation": {2: "bilinear", 3: "bicubic"}.get(found.get("resample", 3), "bicubic"),
        "resize_mode": "shortest" if crops else "squash",
    }


def _edge(size: Any) -> Any:
    return size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size


class CenterCrop(transforms.CenterCrop):
    """transformers' center crop, which rounds its offset down; torchvision rounds to the nearest integer."""

    def forward(self, img: object) -> object:
        """Crops a PIL image, or a tensor [..., H, W]."""
        _, height, width = functional.get_dimensions(img)
        rows, columns = self.size
        return functional.crop(img, (height - rows) // 2, (width - columns) // 2, rows, columns)


def adapt_transform(transform: transforms.Compose) -> transforms.Compose:
    """Replaces the center crop in open_clip's preprocessing by transformers'."""
    steps = transform.transforms
    return transforms.Compose([CenterCrop(s.size) if type(s) is transforms.CenterCrop else s for s in steps])
