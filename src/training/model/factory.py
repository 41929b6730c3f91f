"""Models with their preprocessing and tokenizer, by name. The models are open_clip's."""

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch

from training.model.source import HF_HUB, LOCAL_DIR


@dataclass(frozen=True)
class EncoderParts:
    """What encoding needs: the model in eval mode, PIL image -> [3, H, W], texts -> ids [n, seq_len]."""

    model: torch.nn.Module
    preprocess: Callable
    tokenizer: Callable


def create_encoder(
    name: str,
    pretrained: str | None = None,
    *,
    weights: Path | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
    seed: int = 0,
) -> EncoderParts:
    """Builds a model for evaluation.

    Args:
        name: open_clip's model name, ``local-dir:FOLDER`` or ``hf-hub:ORG/REPO``.
        pretrained: open_clip's tag or a weights file; None for an untrained model.
        weights: for a folder or a hub repository, its weights as `source.resolve_weights` found them.
        precision: as open_clip's factory takes it.
        device: where the model goes.
        cache_dir: where downloads are kept and looked up first.
        seed: of the weights of an untrained model; all ranks must build the same one.

    Raises:
        ValueError: the weights are not those of this model, or not plain tensors.
    """
    torch.manual_seed(seed)
    from_folder = name.startswith((LOCAL_DIR, HF_HUB))
    try:
        if from_folder:
            logging.disable(logging.WARNING)  # it would say that no weights were loaded
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                name,
                pretrained=pretrained,
                precision=precision,
                device=device,
                cache_dir=cache_dir,
                load_weights=not from_folder,
                pretrained_text=not from_folder,
            )
        finally:
            logging.disable(logging.NOTSET)
        if from_folder and weights:
            # open_clip overlooks .pt files in a folder and goes on with random weights.
            open_clip.load_checkpoint(model, str(weights))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{weights or pretrained}: not a file of plain tensors, and nothing else is loaded (it could run code); "
            f"convert it to safetensors where you trust it"
        ) from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise ValueError(f"{weights or pretrained} does not fit --model {name}: {_shorten(str(error))}") from error
    return EncoderParts(model.eval(), preprocess, open_clip.get_tokenizer(name, cache_dir=cache_dir))


def _shorten(message: str, num_lines: int = 6) -> str:
    lines = message.splitlines()
    shown = [line[:300] for line in lines[:num_lines]]
    return "\n".join(shown + ([f"  .. and {len(lines) - num_lines} lines more"] if len(lines) > num_lines else []))
