"""Creates models, their preprocessing and tokenizers by name: drop-in replacements for open_clip's functions.

One of our models is built in this order: config, open_clip's two-tower model, our text tower in place of open_clip's,
weights. All other models are built by open_clip itself, bit for bit.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from timm.layers import to_2tuple
from torchvision.transforms import Compose

from training.model.names.config import (
    CONFIG_FILE,
    POOLING,
    TOWER,
    ModelSpec,
    find_pretrained_folder,
    not_found,
    resolve_model_config,
)
from training.model.names.resolve import WEIGHT_SUFFIXES, find_weights, resolve_weights
from training.model.names.transformers_clip import HF, adapt_transform
from training.model.packing.arranger import CaptionArranger
from training.model.tokenizers.folder_tokenizer import FolderTokenizer
from training.model.towers.clip_tower import CornerCLIPText
from training.model.towers.flair import TextConditionedPooling
from training.model.towers.hf_tower import CornerHFText
from training.model.towers.text_tower import TEXT_TOWERS, LotlipCLIP, TextTower
from training.model.weights.load import load_pretrained_image, load_weights
from training.model.weights.weights_file import is_torchscript, read_state_dict
from training.readers.images import to_rgb

# Config of a tiny text tower that stands in for a tower of ours while open_clip builds the rest.
_PLACEHOLDER = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
_OUR_TEXT_KEYS = (TOWER, "num_corner_token", "corner_attention")  # in a text_cfg
_ANY_NAME = "ViT-B-32"  # open_clip requires one of its own names; our overrides replace its whole config
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
    """Builds a model, like `open_clip.create_model`, which builds every model that is not one of ours.

    Args:
        model_name: see `config.resolve_model_config`.
        pretrained: open_clip's tag or a weights file; see `weights_file.read_state_dict`.
        precision: fp32, bf16, fp16, pure_bf16, pure_fp16, amp, ... as in open_clip.
        device: device of the model; to build it on ``meta``, without memory, also enter ``torch.device("meta")``.
        cache_dir: folder for downloads; pretrained parts are looked up there first.
        num_corner_tokens, context_length: override the config's values. A longer context stretches pretrained
            positions.
        pretrained_image, pretrained_text: without `pretrained`, initialise the towers with the weights that their
            config names (``timm_model_name``, ``hf_model_name``). `pretrained_image` may also be a file or folder with
            weights for a timm image tower.
        **kwargs: open_clip's other arguments (``force_image_size``, ``output_dict``, ...).

    Raises:
        ValueError: unknown model, an image size that the image tower does not accept, weights that do not fit (with the
            likely reason), or an unsafe file.
        FileNotFoundError: a file or folder does not exist, or a download failed.
    """
    spec = resolve_model_config(
        model_name, num_corner_tokens=num_corner_tokens, context_length=context_length, cache_dir=cache_dir
    )
    weights = resolve_weights(model_name, pretrained, cache_dir) if kwargs.pop("load_weights", True) else None
    if weights and not spec.model_cfg.get("quick_gelu") and _had_quick_gelu(spec, pretrained, weights):
        logging.warning(f"{pretrained} was trained with QuickGELU, --model {spec.name} has GELU: QuickGELU is used")
        spec.model_cfg["quick_gelu"] = kwargs["force_quick_gelu"] = True
    if torch.device(device).type == "meta":  # otherwise built on the CPU, where weights are loaded
        kwargs["device"] = "meta"
    if spec.is_ours:
        model = _create_two_towers(spec, precision, cache_dir, kwargs)
    else:
        stock = {"precision": precision, "cache_dir": cache_dir, "pretrained_text": pretrained_text, **kwargs}
        model = _create_stock(spec, pretrained, weights is not None, stock)
    _check_image_size(model, spec)
    if weights:
        load_weights(model, weights)
    else:
        if spec.is_ours and pretrained_text:
            model.text.load_pretrained(spec, cache_dir)
        if pretrained_image:
            _start_image(model, spec, cache_dir, pretrained_image)
    # Used by `saving.save_pretrained` to write open_clip_config.json.
    model.lotlip_config = {"model_cfg": spec.model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    return model.to(device)


def _create_stock(spec: ModelSpec, pretrained: str | None, loads_weights: bool, stock: dict) -> torch.nn.Module:
    """Builds a model that is not one of ours, with random weights."""
    # `pretrained` also selects the image preprocessing. If weights follow, pretrained single towers are not needed.
    stock["pretrained_text"] &= not loads_weights
    if spec.open_clip_name:
        return _without_weights(spec.open_clip_name, pretrained=pretrained, **stock)
    if "multimodal_cfg" in spec.model_cfg:
        raise ValueError(
            f"--model {spec.name}: put a CoCa config into FOLDER/{CONFIG_FILE} and give --model local-dir:FOLDER"
        )
    custom = spec.model_cfg.get("custom_text", False) or "hf_model_name" in spec.text_cfg
    stock["force_custom_text"] = stock.get("force_custom_text", False) or custom
    config = {key: value for key, value in spec.model_cfg.items() if key != "custom_text"}
    stock["force_preprocess_cfg"] = spec.preprocess_cfg | (stock.get("force_preprocess_cfg") or {})
    return _without_weights(_ANY_NAME, **config, **stock)


def _had_quick_gelu(spec: ModelSpec, pretrained: str | None, weights: Path) -> bool:
    """Whether the weights were trained with QuickGELU: OpenAI's TorchScript files, and tags that say so."""
    tag = open_clip.get_pretrained_cfg(spec.name.replace("/", "-"), pretrained) if pretrained else {}
    return tag.get("quick_gelu", False) if tag else is_torchscript(weights)


def _without_weights(name: str, **kwargs) -> torch.nn.Module:
    """Builds open_clip's model without its warnings that no weights were loaded: we load them afterwards."""
    logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(name, load_weights=False, **kwargs)
    finally:
        logging.disable(logging.NOTSET)


def _create_two_towers(spec: ModelSpec, precision: str, cache_dir: str | None, kwargs: dict) -> LotlipCLIP:
    """Builds one of our models with random weights on the CPU: open_clip's image tower and our text tower."""
    tower = _text_tower_class(spec)
    tower.check(spec, cache_dir)
    stock_text = {key: value for key, value in spec.text_cfg.items() if key not in _OUR_TEXT_KEYS}
    overrides = {
        **{key: value for key, value in spec.model_cfg.items() if key not in ("custom_text", POOLING)},
        "vision_cfg": _vision_cfg(spec, kwargs),
        "text_cfg": stock_text if tower.wraps_stock else _PLACEHOLDER,
        "force_preprocess_cfg": spec.preprocess_cfg | (kwargs.pop("force_preprocess_cfg", None) or {}),
    }
    fixed = {"precision": precision, "pretrained_text": False, "force_custom_text": True}
    model = _without_weights(_ANY_NAME, **fixed, **overrides | kwargs)
    text, dtype = tower.build(spec, model.text, cache_dir), _CASTS.get(precision, torch.float32)
    model = LotlipCLIP(model, text if tower.wraps_stock else text.to(dtype))
    if heads := spec.model_cfg.get(POOLING):
        pooling = TextConditionedPooling(spec.model_cfg["embed_dim"], heads).to(dtype)
        model.visual_proj = pooling.requires_grad_(False)  # none of our losses trains it
    return model


def _text_tower_class(spec: ModelSpec) -> type[TextTower]:
    """Returns the class of a model's text tower: the one that its config names, Hugging Face's, or CLIP's."""
    name = spec.text_cfg.get(TOWER)
    if name is None:
        return CornerHFText if spec.text_cfg.get("hf_tokenizer_name") else CornerCLIPText
    if name not in TEXT_TOWERS:
        raise ValueError(
            f"--model {spec.name}: no text tower has the name {name} (text_cfg.tower); known: "
            f"{', '.join(TEXT_TOWERS) or 'none'}; import the file that defines it first"
        )
    return TEXT_TOWERS[name]


def _vision_cfg(spec: ModelSpec, kwargs: dict) -> dict:
    """Returns the image tower's config with the overrides in `kwargs`, which open_clip ignores for a full config."""
    vision_cfg = spec.model_cfg["vision_cfg"] | {}
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    for argument, key in (("force_image_size", "image_size"), ("force_patch_dropout", "patch_dropout")):
        if kwargs.get(argument) is not None:
            vision_cfg[key] = kwargs[argument]
    return vision_cfg


def _check_image_size(model: torch.nn.Module, spec: ModelSpec) -> None:
    """Raises ValueError if a timm image tower does not accept images of the configured size.

    open_clip ignores the configured ``image_size`` when it builds a timm model, and most of timm's ViTs accept only the
    size that they were built for.
    """
    embed = getattr(getattr(model.visual, "trunk", None), "patch_embed", None)
    if getattr(embed, "img_size", None) is None or not hasattr(embed, "strict_img_size"):
        return
    size = to_2tuple(model.visual.preprocess_cfg["size"])
    if embed.strict_img_size:
        fits, expected = size == tuple(embed.img_size), _by(embed.img_size)
    else:
        fits = embed.dynamic_img_pad or not any(side % patch for side, patch in zip(size, embed.patch_size))
        expected = f"a multiple of {_by(embed.patch_size)}"
    if not fits:
        timm_name = spec.model_cfg["vision_cfg"].get("timm_model_name")
        raise ValueError(
            f"--model {spec.name}: image size {_by(size)}, but its timm image tower {timm_name} accepts {expected}; "
            "change image_size or timm_model_name in its vision_cfg"
        )


def _by(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"


def _start_image(model: torch.nn.Module, spec: ModelSpec, cache_dir: str | None, source: bool | str) -> None:
    """Loads the image tower's trunk from a file or folder, or, if `source` is True, from the weights in its config."""
    name = spec.model_cfg["vision_cfg"].get("timm_model_name")
    if name is None:
        raise ValueError(f"--pretrained-image: the image tower of --model {spec.name} is not a timm model")
    found = Path(source) if isinstance(source, str) else find_pretrained_folder(name, cache_dir)
    if found:
        file = find_weights(found) if found.is_dir() else found
        if not file:
            raise FileNotFoundError(f"{found}: no weights file in this folder ({', '.join(WEIGHT_SUFFIXES)})")
        load_pretrained_image(model.visual.trunk, read_state_dict(file), str(file))
        return
    try:
        trunk = timm.create_model(name, pretrained=True, cache_dir=cache_dir)
    except Exception as error:  # urllib's, huggingface_hub's and timm's errors have no common base
        raise FileNotFoundError(f"pretrained image weights {name}: {not_found(cache_dir, error)}") from error
    load_pretrained_image(model.visual.trunk, trunk.state_dict(), name)


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, *args, aug_cfg: dict | None = None, **kwargs
) -> tuple[torch.nn.Module, Callable, Callable]:
    """Returns (model, training transform, evaluation transform).

    Args:
        model_name, pretrained, *args, **kwargs: see `create_model`, which also documents what is raised.
        aug_cfg: open_clip's augmentation settings for the training transform.
    """
    model = create_model(model_name, pretrained, *args, **kwargs)
    cfg = PreprocessCfg(**model.visual.preprocess_cfg)
    transforms = image_transform_v2(cfg, is_train=True, aug_cfg=aug_cfg), image_transform_v2(cfg, is_train=False)
    if model_name.startswith(HF) or getattr(getattr(model, "text", None), "rgb_first", False):
        # LoTLIP and transformers convert images to RGB before resizing, open_clip afterwards. The results differ for
        # images with an alpha channel.
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
    """Returns a model's tokenizer, like `open_clip.get_tokenizer`, which is called for most models that are not ours.

    Args:
        model_name: see `config.resolve_model_config`.
        context_length, num_corner_tokens: override the config's values.
        cache_dir: folder for downloads.
        **kwargs: open_clip's other arguments.

    Raises:
        ValueError, FileNotFoundError: see `config.resolve_model_config` and `TextTower.tokenizer`.
    """
    spec = resolve_model_config(
        model_name, num_corner_tokens=num_corner_tokens, context_length=context_length, cache_dir=cache_dir
    )
    if spec.is_ours:
        return _text_tower_class(spec).tokenizer(spec, cache_dir)
    if spec.is_transformers:
        return FolderTokenizer(spec.folder, context_length or spec.context_length)
    if not spec.open_clip_name:  # a config file
        kwargs = {"context_length": spec.context_length, **spec.text_cfg.get("tokenizer_kwargs", {}), **kwargs}
        if name := spec.text_cfg.get("hf_tokenizer_name"):
            return open_clip.tokenizer.HFTokenizer(name, cache_dir=cache_dir, **kwargs)
        return open_clip.SimpleTokenizer(**kwargs)
    return open_clip.get_tokenizer(model_name, context_length=context_length, cache_dir=cache_dir, **kwargs)


@dataclass(frozen=True)
class EncoderParts:
    """A model with its transforms and tokenizer.

    Attributes:
        model: on its device.
        preprocess: PIL image -> [3, H, W], for evaluation.
        tokenizer: texts -> ids [n, seq_len].
        train_transform: PIL image -> [3, H, W], with random cropping.
        arrange: arranges a batch's captions, see `packing`; None leaves them padded.
    """

    model: torch.nn.Module
    preprocess: Callable
    tokenizer: Callable
    train_transform: Callable
    arrange: CaptionArranger | None = None
