"""Creates models, their preprocessing and tokenizers by name: drop-in replacements for open_clip's functions.

One of our models is built in this order: config, open_clip's two-tower model, our text tower in place of open_clip's,
weights. All other models are built by open_clip itself, bit for bit.
"""

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_kwargs
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torchvision.transforms import Compose

from training.model.names.config import (
    CONFIG,
    CONFIG_FILE,
    LOCAL_DIR,
    POOLING,
    TOWER,
    ModelSpec,
    resolve_model_config,
    resolve_weights,
)
from training.model.names.files import WEIGHT_SUFFIXES, downloading, find_pretrained_folder, find_weights
from training.model.names.transformers_clip import CLIP_VOCABULARY, HF, adapt_transform, nearest_timm_name
from training.model.packing import CaptionArranger
from training.model.tokenizers import FolderTokenizer
from training.model.towers import clip_tower, hf_tower  # noqa: F401  which register their text towers
from training.model.towers.flair import TextConditionedPooling
from training.model.towers.text_tower import TEXT_TOWERS, TextTower
from training.model.weights.load import WithoutDraws, load_pretrained_image
from training.model.weights.load import load_weights as load_state
from training.model.weights.weights_file import TORCHSCRIPT, format_of, read_state_dict
from training.readers.images import to_rgb

# Config of a tiny text tower that stands in for a tower of ours while open_clip builds the rest.
_PLACEHOLDER = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}
# open_clip's arguments that change a config -> section of the config and key.
_FORCED = {
    "force_image_size": ("vision_cfg", "image_size"),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_quick_gelu": (None, "quick_gelu"),
    "force_custom_text": (None, "custom_text"),
}
_OUR_TEXT_KEYS = (TOWER, "num_corner_token", "corner_attention")  # in a text_cfg


def create_model(
    model_name: str,
    pretrained: str | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    jit: bool = False,
    *,
    cache_dir: str | None = None,
    num_corner_tokens: int | None = None,
    context_length: int | None = None,
    force_context_length: int | None = None,
    pretrained_image: bool | str = False,
    pretrained_text: bool = True,
    require_pretrained: bool = False,
    weights_only: bool = True,
    **kwargs,
) -> Any:
    """Builds a model, like `open_clip.create_model`, which builds every model that is not one of ours.

    Args:
        model_name: see `config.resolve_model_config`.
        pretrained: open_clip's tag or a weights file; see `weights_file.read_state_dict`. Needs `load_weights`.
        precision: fp32, bf16, fp16, pure_bf16, pure_fp16, amp, ... as in open_clip.
        device: device of the model; to build it on ``meta``, without memory, also enter ``torch.device("meta")``.
        jit, weights_only: as in open_clip; TorchScript and unpickling are refused.
        cache_dir: folder for downloads; pretrained parts are looked up there first.
        num_corner_tokens, context_length: override the config's values. A longer context stretches pretrained positions
            behind the first 20. With `force_context_length`, those of open_clip's models are stretched as there.
        pretrained_image, pretrained_text: without `pretrained`, initialise the towers with the weights that their
            config names. `pretrained_image` may also be a file or folder with weights for a timm image tower.
        **kwargs: open_clip's other arguments (``force_image_size``, ``output_dict``, ...).

    Raises:
        ValueError: unknown model, unsupported image size, unsafe file, or weights that do not fit (with the reason).
        FileNotFoundError: a file or folder does not exist, or a download failed.
        RuntimeError: no weights are named, and `require_pretrained` is set.
    """
    if jit or not weights_only:
        raise ValueError("jit=True and weights_only=False are not supported: no code of a weights file is executed")
    spec = resolve_model_config(model_name, num_corner_tokens, context_length, force_context_length, cache_dir)
    for key, (section, name) in _FORCED.items():  # in the config, too, because it is saved with the model
        if kwargs.get(key) is not None and kwargs[key] is not False:
            (spec.model_cfg[section] if section else spec.model_cfg)[name] = kwargs[key]
    weights = resolve_weights(model_name, pretrained, cache_dir) if load_weights else None
    if require_pretrained and not weights:
        raise RuntimeError(f"{model_name}: weights are required (require_pretrained), but none are named")
    kwargs |= {"precision": precision, "pretrained_text": pretrained_text and not weights and not spec.is_ours}
    if torch.device(device).type == "meta":  # otherwise built on the CPU, where weights are loaded
        kwargs["device"] = "meta"
    model = _build(spec, pretrained, weights, cache_dir, kwargs)
    if weights:
        load_state(model, weights, positions_as_open_clip=bool(force_context_length) and not spec.is_ours)
    elif spec.is_ours and pretrained_text:
        model.text.load_pretrained(spec, cache_dir)
    if pretrained_image and not weights:
        _start_image(model, spec, cache_dir, pretrained_image)
    return model.to(device)


def _build(spec: ModelSpec, pretrained: str | None, weights: Path | None, cache_dir: str | None, kwargs: dict) -> Any:
    """Builds a model with random weights as its config and the named weights need it.

    open_clip builds it, because it reads any config from a folder. One of our models then gets our text tower.

    Args:
        spec: the model's config.
        pretrained, weights: the name of the weights and their file, if any.
        cache_dir: folder for downloads.
        kwargs: arguments of `open_clip.create_model`.
    """
    tag = open_clip.get_pretrained_cfg(spec.name.replace("/", "-"), pretrained) if pretrained else {}
    if weights and not spec.model_cfg.get("quick_gelu"):
        if tag.get("quick_gelu", False) if tag else format_of(weights) == TORCHSCRIPT:  # OpenAI's weights
            logging.warning(f"{pretrained} was trained with QuickGELU, --model {spec.name} has GELU: QuickGELU is used")
            spec.model_cfg["quick_gelu"] = True
    tower = _text_tower_class(spec) if spec.is_ours else None
    model_cfg = {key: value for key, value in spec.model_cfg.items() if key != POOLING}
    if tower:
        text_cfg = {key: value for key, value in spec.text_cfg.items() if key not in _OUR_TEXT_KEYS}
        model_cfg["text_cfg"] = text_cfg if tower.wraps_stock else _PLACEHOLDER
        kwargs = kwargs | {"force_custom_text": True}
    logging.disable(logging.WARNING)  # that no weights were loaded: we load them afterwards
    try:
        with TemporaryDirectory() as folder:
            config = {"model_cfg": model_cfg, "preprocess_cfg": spec.preprocess_cfg | tag}
            Path(folder, CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
            with WithoutDraws() if weights else nullcontext():
                model = open_clip.create_model(f"{LOCAL_DIR}{folder}", load_weights=False, **kwargs)
    finally:
        logging.disable(logging.NOTSET)
    dtype = open_clip.get_input_dtype(kwargs["precision"])
    if tower:
        text = tower.build(spec, model.text, cache_dir)
        model.text = text if tower.wraps_stock else text.to(dtype)
        model.context_length, model.vocab_size = text.context_length, text.vocab_size
    if heads := spec.model_cfg.get(POOLING):
        pooling = TextConditionedPooling(spec.model_cfg["embed_dim"], heads).to(dtype)
        model.visual_proj = pooling.requires_grad_(False)  # only examples/flair.py trains it
    _check_image_size(model, spec)
    model.lotlip_config = {"model_cfg": spec.model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    return model


def _text_tower_class(spec: ModelSpec) -> type[TextTower]:
    """Returns the class of a model's text tower: the one that its config names, Hugging Face's, or CLIP's."""
    name = spec.text_cfg.get(TOWER) or ("hugging_face" if spec.text_cfg.get("hf_tokenizer_name") else "clip")
    return TEXT_TOWERS.find(name, f"--model {spec.name}")


def _check_image_size(model: Any, spec: ModelSpec) -> None:
    """Raises ValueError if a timm image tower does not accept images of the configured size.

    open_clip ignores the configured ``image_size`` when it builds a timm model, and most of timm's ViTs accept only the
    size that they were built for.
    """
    embed = getattr(getattr(model.visual, "trunk", None), "patch_embed", None)
    if embed is None:
        return
    height, width = to_2tuple(model.visual.preprocess_cfg["size"])
    try:
        with torch.no_grad():
            embed(next(embed.parameters()).new_zeros(1, 3, height, width))
    except AssertionError as error:
        timm_name = spec.model_cfg["vision_cfg"].get("timm_model_name")
        raise ValueError(
            f"--model {spec.name}: its timm image tower {timm_name} does not accept images of {height}x{width} pixels "
            f"({error}); change image_size or timm_model_name in its vision_cfg"
        ) from error


def _start_image(model: Any, spec: ModelSpec, cache_dir: str | None, source: bool | str) -> None:
    """Loads the image tower's trunk from a file or folder, or, if `source` is True, from the weights in its config."""
    name = spec.model_cfg["vision_cfg"].get("timm_model_name")
    if name is None:
        raise ValueError(f"--pretrained-image: the image tower of --model {spec.name} is not a timm model")
    found = Path(source) if isinstance(source, str) else find_pretrained_folder(name, cache_dir)
    if found is None:
        with downloading(f"pretrained image weights {name}", cache_dir):
            state = timm.create_model(name, pretrained=True, cache_dir=cache_dir).state_dict()
    else:
        file = find_weights(found) if found.is_dir() else found
        if not file:
            raise FileNotFoundError(f"{found}: no weights file in this folder ({', '.join(WEIGHT_SUFFIXES)})")
        state, name = read_state_dict(file), str(file)
    load_pretrained_image(model.visual.trunk, state, name)


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, *args, aug_cfg: dict | None = None, **kwargs
) -> tuple[Any, Callable, Callable]:
    """Returns (model, training transform, evaluation transform).

    Args:
        model_name, pretrained, *args, **kwargs: see `create_model`, which also documents what is raised. Among them,
            ``image_mean``, ``image_std``, ``image_interpolation`` and ``image_resize_mode`` override the model's
            preprocessing, as in open_clip.
        aug_cfg: open_clip's augmentation settings for the training transform.
    """
    settings = {name: kwargs.pop(f"image_{name}", None) for name in ("mean", "std", "interpolation", "resize_mode")}
    preprocess = merge_preprocess_kwargs({}, **settings)
    model = create_model(model_name, pretrained, *args, force_preprocess_cfg=preprocess, **kwargs)
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
    model_name: str = "",
    context_length: int | None = None,
    cache_dir: str | None = None,
    *,
    num_corner_tokens: int | None = None,
    force_context_length: int | None = None,
    **kwargs,
) -> Callable:
    """Returns a model's tokenizer, like `open_clip.get_tokenizer`, which is called for most models that are not ours.

    Args:
        model_name: see `config.resolve_model_config`; without a name, the tokenizer of CLIP.
        context_length, num_corner_tokens, force_context_length: override the config's values, see `create_model`.
        cache_dir: folder for downloads.
        **kwargs: open_clip's other arguments.

    Raises:
        ValueError, FileNotFoundError: see `config.resolve_model_config` and `TextTower.tokenizer`.
    """
    if not model_name:
        return open_clip.get_tokenizer(context_length=context_length, cache_dir=cache_dir, **kwargs)
    spec = resolve_model_config(model_name, num_corner_tokens, context_length, force_context_length, cache_dir)
    if spec.is_ours:
        return _text_tower_class(spec).tokenizer(spec, cache_dir)
    if model_name.startswith(HF):
        return FolderTokenizer(spec.folder or Path(), spec.context_length)
    if model_name.startswith(CONFIG):
        kwargs = {"context_length": spec.context_length, **spec.text_cfg.get("tokenizer_kwargs", {}), **kwargs}
        if name := spec.text_cfg.get("hf_tokenizer_name"):
            return open_clip.tokenizer.HFTokenizer(name, cache_dir=cache_dir, **kwargs)
        return open_clip.SimpleTokenizer(**kwargs)
    return open_clip.get_tokenizer(model_name, spec.context_length, cache_dir, **kwargs)


def check_vocabulary(name: str, model: Any, tokenizer: Callable) -> None:
    """Raises ValueError if a tokenizer has more token ids than the embedding table of its model has rows."""
    words, num_rows = getattr(tokenizer, "tokenizer", tokenizer), getattr(model, "text", model).vocab_size
    num_ids = 1 + max(words.get_vocab().values()) if hasattr(words, "get_vocab") else getattr(words, "vocab_size", 0)
    if num_ids > num_rows:
        raise ValueError(
            f"--model {name}: its tokenizer has {num_ids:,} token ids, the embedding table of its text tower "
            f"{num_rows:,} rows; use the tokenizer with which the model was trained"
        )


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

    model: Any
    preprocess: Callable
    tokenizer: Callable
    train_transform: Callable
    arrange: CaptionArranger | None = None


WEIGHTS_FILE = "open_clip_model.safetensors"


def save_pretrained(model: Any, folder: str | Path, tokenizer: Any = None) -> Path:
    """Writes config, weights and tokenizer.

    Args:
        model: from `factory.create_model`.
        folder: created if it does not exist.
        tokenizer: from `factory.get_tokenizer`; without it, loading the folder needs the tokenizer that the config
            names.

    Returns:
        The folder. ``create_model("local-dir:FOLDER")`` gives the same model, bit for bit. Exception: a SigLIP model
        loaded by ``hf:`` is saved with the nearest image tower in timm, whose activation differs slightly.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(model.lotlip_config)
    text_cfg = config["model_cfg"]["text_cfg"]
    if isinstance(getattr(model, "text", None), TextTower):
        text_cfg |= model.text.config_fields()
    if getattr(model, "logit_bias", None) is not None:  # without this entry, open_clip builds a model without a bias
        config["model_cfg"].setdefault("init_logit_bias", float(model.logit_bias.detach()))
    vision_cfg = config["model_cfg"]["vision_cfg"]
    if timm_name := vision_cfg.get("timm_model_name"):
        vision_cfg["timm_model_name"] = nearest_timm_name(timm_name)
    if isinstance(tokenizer, FolderTokenizer) and text_cfg.get("vocab_size") != CLIP_VOCABULARY:
        text_cfg["hf_tokenizer_name"] = "."  # open_clip reads the tokenizer from the model's folder
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    return folder
