"""Models with their preprocessing and tokenizer, by name: drop-in for open_clip's functions of the same names.

A model of ours is built in this order: config, open_clip's two-tower model with its image tower, our text tower in
place of the other, weights. Everything else open_clip builds by itself, bit for bit.
"""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision.transforms import Compose

from dataloaders.images import to_rgb
from training.model.clip_tower import CornerCLIPText
from training.model.config import (
    CONFIG_FILE,
    POOLING,
    ModelSpec,
    find_pretrained_folder,
    not_found,
    resolve_model_config,
)
from training.model.flair import TextConditionedPooling
from training.model.hf_encoders import encoder_config, load_pretrained_encoder
from training.model.packing import CaptionArranger
from training.model.resolve import WEIGHT_SUFFIXES, find_weights, resolve_weights
from training.model.text_tower import CORNER_ATTENTION, CornerHFText, LotlipCLIP
from training.model.tokenizer import create_tokenizer
from training.model.transformers_clip import HF, FolderTokenizer, adapt_transform
from training.model.weights import load_pretrained_image, load_pretrained_text, load_weights
from training.model.weights_file import is_torchscript, read_state_dict

# Stands in for the Hugging Face tower while open_clip builds the rest, so that nothing large is built twice.
_PLACEHOLDER = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
_ANY_NAME = "ViT-B-32"  # open_clip wants a name of its own; the whole config is ours
_CASTS = {"fp16": torch.float16, "pure_fp16": torch.float16, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16}


def create_model(
    model_name: str,
    pretrained: str | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
    *,
    num_corner_tokens: int | None = None,
    context_length: int | None = None,
    pretrained_image: bool | str = False,
    pretrained_text: bool = True,
    **kwargs,
) -> torch.nn.Module:
    """Builds a model; as `open_clip.create_model`, which it calls for every model that is not ours.

    Args:
        model_name: as `config.resolve_model_config`.
        pretrained: open_clip's tag or a weights file; see `weights_file.read_state_dict`.
        precision: fp32, bf16, fp16, pure_bf16, pure_fp16, amp, .. as open_clip.
        device: where the model goes.
        cache_dir: pretrained parts are looked up in its folders first; downloads are kept there.
        num_corner_tokens, context_length: instead of the config's. A longer context stretches pretrained positions.
        pretrained_image, pretrained_text: without `pretrained`, start the towers from the weights that their config
            names (``timm_model_name``, ``hf_model_name``); an image tower of timm's also from a file or folder.
        **kwargs: open_clip's other arguments (``force_image_size``, ``output_dict``, ..).

    Raises:
        ValueError: unknown model, weights that do not fit (with the likely reason), unsafe files.
        FileNotFoundError: a file, folder or download is not there.
    """
    spec = resolve_model_config(
        model_name, num_corner_tokens=num_corner_tokens, context_length=context_length, cache_dir=cache_dir
    )
    weights = resolve_weights(model_name, pretrained, cache_dir) if kwargs.pop("load_weights", True) else None
    if weights and not spec.model_cfg.get("quick_gelu") and _had_quick_gelu(spec, pretrained, weights):
        logging.warning(f"{pretrained} was trained with QuickGELU, which --model {spec.name} lacks: it is switched on")
        spec.model_cfg["quick_gelu"] = kwargs["force_quick_gelu"] = True
    if spec.is_ours:
        model = _create_two_towers(spec, precision, cache_dir, kwargs)
    else:
        stock = {"precision": precision, "cache_dir": cache_dir, "pretrained_text": pretrained_text, **kwargs}
        model = _create_stock(spec, pretrained, weights is not None, stock)
    if weights:
        load_weights(model, weights)
    else:
        if spec.is_ours and pretrained_text and spec.text_cfg.get("hf_model_name"):
            _start_text(model, spec, cache_dir)
        if pretrained_image:
            _start_image(model, spec, cache_dir, pretrained_image)
    # What `saving.save_pretrained` writes to open_clip_config.json.
    model.lotlip_config = {"model_cfg": spec.model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    return model.to(device)


def _create_stock(spec: ModelSpec, pretrained: str | None, loads_weights: bool, stock: dict) -> torch.nn.Module:
    """A model that is open_clip's alone, with random weights."""
    # A tag also says how pictures are preprocessed. With weights to come, nobody needs those of single towers.
    stock["pretrained_text"] &= not loads_weights
    if spec.is_built_in or (spec.folder and not spec.is_transformers):
        with _quiet():
            return open_clip.create_model(spec.base_name, pretrained=pretrained, load_weights=False, **stock)
    if "multimodal_cfg" in spec.model_cfg:
        raise ValueError(
            f"--model {spec.name}: a CoCa config goes into FOLDER/{CONFIG_FILE}, for --model local-dir:FOLDER"
        )
    custom = spec.model_cfg.get("custom_text", False) or "hf_model_name" in spec.text_cfg
    stock["force_custom_text"] = stock.get("force_custom_text", False) or custom
    config = {key: value for key, value in spec.model_cfg.items() if key != "custom_text"}
    stock["force_preprocess_cfg"] = spec.preprocess_cfg | (stock.get("force_preprocess_cfg") or {})
    with _quiet():
        return open_clip.create_model(_ANY_NAME, load_weights=False, **config, **stock)


def _had_quick_gelu(spec: ModelSpec, pretrained: str | None, weights: Path) -> bool:
    """Whether weights were trained with another activation than open_clip's default: OpenAI's, and tags that say so."""
    tag = open_clip.get_pretrained_cfg(spec.name.replace("/", "-"), pretrained) if pretrained else {}
    return tag.get("quick_gelu", False) if tag else is_torchscript(weights)


@contextmanager
def _quiet():
    """Without open_clip's warnings that no weights were loaded: they come next."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _create_two_towers(spec: ModelSpec, precision: str, cache_dir: str | None, kwargs: dict) -> LotlipCLIP:
    """The model with random weights, on the CPU: open_clip's image tower, our text tower."""
    text_cfg = dict(spec.text_cfg)
    num_corners = text_cfg.pop("num_corner_token")
    text_cfg.pop("hf_config", None)
    corner_attention = text_cfg.pop("corner_attention", CORNER_ATTENTION[0])
    is_hf = bool(text_cfg.get("hf_tokenizer_name"))
    tower_config = encoder_config(spec.text_cfg, cache_dir) if is_hf else None  # what may fail, before what is slow
    overrides = {
        **{key: value for key, value in spec.model_cfg.items() if key not in ("custom_text", POOLING)},
        "vision_cfg": _vision_cfg(spec, kwargs),
        "text_cfg": _PLACEHOLDER if is_hf else text_cfg,
        "force_preprocess_cfg": spec.preprocess_cfg | (kwargs.pop("force_preprocess_cfg", None) or {}),
    }
    with _quiet():
        model = open_clip.create_model(
            _ANY_NAME,
            precision=precision,
            load_weights=False,
            pretrained_text=False,
            force_custom_text=True,
            **overrides | kwargs,
        )
    if is_hf:
        text = CornerHFText(
            tower_config,
            spec.model_cfg["embed_dim"],
            num_corners,
            spec.context_length,
            text_cfg.get("hf_proj_type", "mlp"),
            text_cfg.get("hf_pooler_type"),
            corner_attention,
        ).to(_CASTS.get(precision, torch.float32))
    else:
        if corner_attention != CORNER_ATTENTION[0]:
            raise ValueError(
                f"--model {spec.name}: corner_attention {corner_attention} needs a Hugging Face text tower"
            )
        text = CornerCLIPText(model.text, num_corners)
    model = LotlipCLIP(model, text)
    if heads := spec.model_cfg.get(POOLING):
        pooling = TextConditionedPooling(spec.model_cfg["embed_dim"], heads).to(_CASTS.get(precision, torch.float32))
        model.visual_proj = pooling.requires_grad_(False)  # no loss of this project trains it
    return model


def _vision_cfg(spec: ModelSpec, kwargs: dict) -> dict:
    """The image tower's config with the overrides that open_clip would lose: a config given whole replaces its own."""
    vision_cfg = spec.model_cfg["vision_cfg"] | {}
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    for argument, key in (("force_image_size", "image_size"), ("force_patch_dropout", "patch_dropout")):
        if kwargs.get(argument) is not None:
            vision_cfg[key] = kwargs[argument]
    return vision_cfg


def _start_text(model: LotlipCLIP, spec: ModelSpec, cache_dir: str | None) -> None:
    name = spec.text_cfg["hf_model_name"]
    state = load_pretrained_encoder(name, model.text.pooler_type == "cls_pooler", cache_dir)
    load_pretrained_text(model.text, state, name)


def _start_image(model: torch.nn.Module, spec: ModelSpec, cache_dir: str | None, source: bool | str) -> None:
    """Loads the image tower's trunk from a file or folder, or, for True, from the weights that its config names."""
    name = spec.model_cfg["vision_cfg"].get("timm_model_name")
    if name is None:
        raise ValueError(f"--pretrained-image: the image tower of --model {spec.name} is not one of timm's")
    found = Path(source) if isinstance(source, str) else find_pretrained_folder(name, cache_dir)
    if found:
        file = find_weights(found) if found.is_dir() else found
        if not file:
            raise FileNotFoundError(f"{found}: no weights there ({', '.join(WEIGHT_SUFFIXES)})")
        load_pretrained_image(model.visual.trunk, read_state_dict(file), str(file))
        return
    import timm

    try:
        trunk = timm.create_model(name, pretrained=True, cache_dir=cache_dir)
    except Exception as error:  # urllib's, huggingface_hub's and timm's errors have no common base
        raise FileNotFoundError(f"pretrained image weights {name}: {not_found(cache_dir, error)}") from error
    load_pretrained_image(model.visual.trunk, trunk.state_dict(), name)


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, *args, aug_cfg: dict | None = None, **kwargs
) -> tuple[torch.nn.Module, Callable, Callable]:
    """Returns (model, training transform, evaluation transform); arguments as `create_model`, and ``aug_cfg``."""
    model = create_model(model_name, pretrained, *args, **kwargs)
    cfg = PreprocessCfg(**model.visual.preprocess_cfg)
    transforms = image_transform_v2(cfg, is_train=True, aug_cfg=aug_cfg), image_transform_v2(cfg, is_train=False)
    if model_name.startswith(HF) or (isinstance(model, LotlipCLIP) and isinstance(model.text, CornerHFText)):
        # LoTLIP's images and transformers' are RGB before they are resized, open_clip's afterwards: alpha channels
        # tell the difference.
        transforms = tuple(Compose([to_rgb, *transform.transforms]) for transform in transforms)
    if model_name.startswith(HF):
        transforms = tuple(adapt_transform(transform) for transform in transforms)
    return model, *transforms


def get_tokenizer(
    model_name: str,
    context_length: int | None = None,
    cache_dir: str | None = None,
    *,
    num_corner_tokens: int | None = None,
    **kwargs,
) -> Callable:
    """Returns the tokenizer of a model; as `open_clip.get_tokenizer`, which it calls for every model not ours."""
    spec = resolve_model_config(
        model_name, num_corner_tokens=num_corner_tokens, context_length=context_length, cache_dir=cache_dir
    )
    if spec.is_ours:
        return create_tokenizer(spec, cache_dir)
    if spec.is_transformers:
        return FolderTokenizer(spec.folder, context_length or spec.context_length)
    if not spec.is_built_in and not spec.folder:  # a config file: open_clip reads tokenizers by name or folder only
        name = spec.text_cfg.get("hf_tokenizer_name")
        length = context_length or spec.context_length
        kwargs = spec.text_cfg.get("tokenizer_kwargs", {}) | kwargs
        if name:
            return open_clip.tokenizer.HFTokenizer(name, context_length=length, cache_dir=cache_dir, **kwargs)
        return open_clip.SimpleTokenizer(context_length=length, **kwargs)
    return open_clip.get_tokenizer(model_name, context_length=context_length, cache_dir=cache_dir, **kwargs)


@dataclass(frozen=True)
class EncoderParts:
    """A model with what it reads through.

    Attributes:
        model: on its device.
        preprocess: PIL image -> [3, H, W], for evaluation.
        tokenizer: texts -> ids [n, seq_len].
        train_transform: PIL image -> [3, H, W], with random cropping.
        arrange: of a batch's captions, see `packing`; None leaves them padded.
    """

    model: torch.nn.Module
    preprocess: Callable
    tokenizer: Callable
    train_transform: Callable
    arrange: CaptionArranger | None = None
