"""Model configs by name (ours, open_clip's, a folder's or a hub repository's), with overrides from flags.

A config is one of ours if its ``text_cfg`` has the key ``num_corner_token`` (possibly 0, as for Long-CLIP) or
``tower``, or if the caller asks for corner tokens or another context length. All others are passed to open_clip
unchanged.
"""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

import open_clip
import timm
from open_clip.pretrained import download_pretrained_from_hf

from training.model.names.files import downloading, find_weights
from training.model.names.transformers_clip import CLIP_VOCABULARY, HF, find_folder, read_config
from training.readers.files import read_json_object

LOCAL_DIR, HF_HUB, CONFIG = "local-dir:", "hf-hub:", "config:"
CONFIG_FOLDER = Path(__file__).parents[1] / "model_configs"
CONFIG_FILE = "open_clip_config.json"
TOWER = "tower"  # key in a text_cfg: name of one of `text_tower.TEXT_TOWERS`
POOLING = "pooling_heads"  # key in a model's config: number of heads of FLAIR's text-conditioned pooling


def register_model_configs() -> None:
    """Adds our model names to `open_clip.list_models()`."""
    if "lotlip_tiny" not in open_clip.list_models():
        open_clip.add_model_config(CONFIG_FOLDER)


@dataclass(frozen=True)
class ModelSpec:
    """A resolved model config.

    Attributes:
        name: the name given by the caller.
        model_cfg: ``embed_dim``, ``vision_cfg``, ``text_cfg``, ..., with the overrides applied; keys as published.
        preprocess_cfg: image preprocessing that differs from open_clip's default (mean, std, ...).
        folder: folder with the config, and possibly weights and tokenizer; None for built-in names and config files.
        is_ours: whether the model gets one of our text towers.
    """

    name: str
    model_cfg: dict
    preprocess_cfg: dict
    folder: Path | None
    is_ours: bool

    @property
    def text_cfg(self) -> dict:
        return self.model_cfg["text_cfg"]

    @property
    def num_corners(self) -> int:
        """Number of corner tokens, m."""
        return self.text_cfg.get("num_corner_token") or 0

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of the text tower."""
        return self.text_cfg.get("context_length", 77)


def resolve_model_config(
    name: str,
    num_corner_tokens: int | None = None,
    context_length: int | None = None,
    force_context_length: int | None = None,
    cache_dir: str | None = None,
) -> ModelSpec:
    """Finds a model's config and applies overrides.

    Args:
        name: a name in `open_clip.list_models()`, ``local-dir:FOLDER``, ``hf-hub:ORG/REPO``, ``config:FILE.json``, or
            ``hf:FOLDER`` and ``hf:ORG/REPO`` for transformers' CLIP and SigLIP.
        num_corner_tokens, context_length: overrides; None keeps the config's value.
        force_context_length: override that makes none of open_clip's models one of ours.
        cache_dir: folder for downloads.

    Raises:
        ValueError: unknown name, broken config, or an override that the model does not support.
        FileNotFoundError: the folder has no config, or the download failed.
    """
    register_model_configs()
    folder = None
    if name.startswith(HF):
        folder = find_folder(name, cache_dir)
        model_cfg, preprocess_cfg = read_config(folder)
    elif name.startswith((LOCAL_DIR, HF_HUB, CONFIG)):
        file = Path(name.removeprefix(LOCAL_DIR), CONFIG_FILE)
        if name.startswith(HF_HUB):
            with downloading(f"{CONFIG_FILE} of --model {name}", cache_dir):
                file = Path(download_pretrained_from_hf(name.removeprefix(HF_HUB), CONFIG_FILE, cache_dir=cache_dir))
        if name.startswith(CONFIG):
            file = Path(name.removeprefix(CONFIG))
        else:
            folder = file.parent
        model_cfg, preprocess_cfg = read_config_file(file)
    else:
        model_cfg = open_clip.get_model_config(name.replace("/", "-"))
        if model_cfg is None:
            raise ValueError(_no_such_model(name))
        preprocess_cfg = model_cfg.pop("preprocess_cfg", {})
    text_cfg = model_cfg["text_cfg"]
    if context_length is not None and context_length != text_cfg.get("context_length", 77):
        text_cfg["context_length"] = context_length
        text_cfg.setdefault("num_corner_token", 0)
    if num_corner_tokens is not None:
        text_cfg["num_corner_token"] = num_corner_tokens
    if force_context_length:
        text_cfg["context_length"] = force_context_length
    is_ours = "num_corner_token" in text_cfg or TOWER in text_cfg
    timm_name = model_cfg["vision_cfg"].get("timm_model_name")
    if is_ours and not preprocess_cfg and timm_name:  # LoTLIP uses mean and std of its locked tower, not CLIP's
        if trained := timm.get_pretrained_cfg(timm_name, allow_unregistered=True):
            preprocess_cfg = {"mean": list(trained.mean), "std": list(trained.std)}
    if is_ours and name.startswith(HF) and text_cfg["vocab_size"] != CLIP_VOCABULARY:
        raise ValueError(f"--model {name}: corner tokens and other context lengths need CLIP's own vocabulary")
    if is_ours and "multimodal_cfg" in model_cfg:
        raise ValueError(f"--model {name}: CoCa models can't take corner tokens or another context length")
    if text_cfg.get("corner_attention", "published") != "published" and not text_cfg.get("hf_tokenizer_name"):
        raise ValueError(f"--model {name}: corner_attention in its text_cfg needs a Hugging Face text tower")
    return ModelSpec(name, model_cfg, preprocess_cfg, folder, is_ours)


def _no_such_model(name: str) -> str:
    known = open_clip.list_models()
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:4]
    return (
        f"--model {name}: no such model; the most similar of {len(known)} names: {', '.join(near)} "
        f"(all: python -c 'import open_clip; print(open_clip.list_models())'), or local-dir:FOLDER, hf-hub:ORG/REPO"
    )


def read_config_file(path: Path) -> tuple[dict, dict]:
    """Reads a config file: a folder's ``open_clip_config.json``, or a file in open_clip's model config format.

    Returns:
        model_cfg and preprocess_cfg.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is broken or has no model config.
    """
    if not path.is_file():
        flag = f"--model {LOCAL_DIR}{path.parent}" if path.name == CONFIG_FILE else f"--model-config {path}"
        raise FileNotFoundError(f"{flag}: no {path.name} in {path.parent}")
    content, needed = read_json_object(path), {"embed_dim", "vision_cfg", "text_cfg"}
    preprocess_cfg = content.pop("preprocess_cfg", {})
    model_cfg = content.get("model_cfg", content)
    if not isinstance(model_cfg, dict) or not needed <= set(model_cfg):
        raise ValueError(f"{path}: expected the key 'model_cfg' with {', '.join(sorted(needed))}")
    known = [field.name for field in fields(open_clip.CLIPVisionCfg)]
    if unknown := sorted(set(model_cfg["vision_cfg"]) - set(known)):
        raise ValueError(f"{path}: vision_cfg has the unknown key {unknown[0]}; expected keys: {', '.join(known)}")
    return model_cfg, preprocess_cfg


_FOLDERS = {  # a file in a folder that was given in place of a weights file: what the folder is
    "*.distcp": "a PyTorch distributed checkpoint; convert it to one file: python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt",
    "zero*": "a DeepSpeed checkpoint; convert it to one file: cd {folder} && python zero_to_fp32.py . weights.pt",
    CONFIG_FILE: f"a folder with its own model config; give it as --model {LOCAL_DIR}{{folder}}",
    "": "a folder; give the weights file in it",
}


def resolve_weights(name: str, pretrained: str | None, cache_dir: str | None = None) -> Path | None:
    """Finds a model's weights file, and downloads it if necessary.

    Args:
        name: see `config.resolve_model_config`.
        pretrained: open_clip's tag or a weights file; None for an untrained model.
        cache_dir: folder for downloads, searched first.

    Returns:
        The file, or None for an untrained model.

    Raises:
        ValueError: unknown model, or `pretrained` is neither one of its tags nor a file.
        FileNotFoundError: a folder, config or file does not exist, or the download failed.
    """
    folder = resolve_model_config(name, cache_dir=cache_dir).folder
    file = Path(pretrained) if pretrained else None
    if name.startswith(HF_HUB):
        with downloading(f"weights of --model {name}", cache_dir):
            return Path(download_pretrained_from_hf(name.removeprefix(HF_HUB), cache_dir=cache_dir))
    if folder and (file is None or (name.startswith(LOCAL_DIR) and not file.is_file())):
        return find_weights(folder)
    if file is None or file.is_file():
        return file
    if file.is_dir():
        about = next(about for pattern, about in _FOLDERS.items() if not pattern or any(file.glob(pattern)))
        raise ValueError(f"--pretrained {pretrained}: {about.format(folder=file)}")
    if ":" in name:
        raise ValueError(f"--pretrained {pretrained}: no such file, and --model {name} has no tags")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.pretrained.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"--pretrained {pretrained}: no such file, and no tag of --model {name} (its tags: {known})")
    with downloading(f"--pretrained {pretrained} of --model {name}", cache_dir):
        return Path(open_clip.download_pretrained(tag, cache_dir=cache_dir))
