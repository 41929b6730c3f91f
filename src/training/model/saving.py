"""Saving a model of ours as a folder that ``local-dir:`` loads, and that may be pushed to the hub as it is."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from safetensors.torch import save_file

from training.model.config import CONFIG_FILE
from training.model.text_tower import CornerHFText, LotlipCLIP

WEIGHTS_FILE = "open_clip_model.safetensors"
_NOT_ARCHITECTURE = ("architectures", "transformers_version", "dtype", "torch_dtype", "model_type")


def save_pretrained(model: LotlipCLIP, folder: str | Path, tokenizer: Callable | None = None) -> Path:
    """Writes config, weights and tokenizer.

    Args:
        model: of `factory.create_model`.
        folder: made if need be.
        tokenizer: of `factory.get_tokenizer`; without it the folder's user needs the one that the config names.

    Returns:
        The folder. ``create_model("local-dir:FOLDER")`` gives the same model, bit for bit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(model.lotlip_config)
    if isinstance(model.text, CornerHFText):
        # Spelled out, so that nobody needs the hub to know the encoder's size.
        encoder = model.text.transformer.config
        fields = {k: v for k, v in encoder.to_diff_dict().items() if k not in _NOT_ARCHITECTURE}
        fields["vocab_size"] = encoder.vocab_size - model.text.num_corners
        config["model_cfg"]["text_cfg"]["hf_config"] = {"model_type": encoder.model_type, **fields}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
