"""Saves a model as a folder that ``local-dir:`` loads and that can be pushed to the hub unchanged."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from training.model.names.config import CONFIG_FILE
from training.model.names.transformers_clip import CLIP_VOCABULARY, nearest_timm_name
from training.model.tokenizers import FolderTokenizer
from training.model.towers.text_tower import TextTower

WEIGHTS_FILE = "open_clip_model.safetensors"


def save_pretrained(model: nn.Module, folder: str | Path, tokenizer: Callable | None = None) -> Path:
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
