"""Exports a folder for open_clip's ``local-dir:`` and ``hf-hub:``, which this project loads, too."""

from dataclasses import replace
from pathlib import Path

import open_clip
import torch

from training.export.source import Source, own_features
from training.model.assembly import factory
from training.model.assembly.factory import save_pretrained
from training.model.towers.text_tower import TextTower


def write_folder(source: Source, folder: Path) -> dict[str, torch.Tensor]:
    """Writes the folder.

    Returns:
        The normalised features of the samples, computed by loading the folder with open_clip, or with
        `training.create_model` for a model with one of our text towers, as ``image`` and ``text``.
    """
    save_pretrained(source.model, folder, source.tokenizer)
    name = f"local-dir:{folder}"
    library = factory if isinstance(getattr(source.model, "text", None), TextTower) else open_clip
    model, _, preprocess = library.create_model_and_transforms(name)
    return own_features(
        replace(source, model=model.eval(), preprocess=preprocess, tokenizer=library.get_tokenizer(name))
    )
