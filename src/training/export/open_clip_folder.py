"""Exports a folder for open_clip's ``local-dir:`` and ``hf-hub:``, which this project loads, too."""

from pathlib import Path

import open_clip
import torch

from training.export.source import Source, check_samples
from training.model.assembly.factory import create_model_and_transforms, get_tokenizer
from training.model.assembly.saving import save_pretrained
from training.model.towers.text_tower import TextTower


def write_folder(source: Source, folder: Path) -> dict[str, torch.Tensor]:
    """Writes the folder.

    Returns:
        The normalised features of the samples, computed by loading the folder with open_clip, or with
        `training.create_model` for a model with one of our text towers, as ``image`` and ``text``.
    """
    save_pretrained(source.model, folder, source.tokenizer)
    name = f"local-dir:{folder}"
    if isinstance(getattr(source.model, "text", None), TextTower):
        model, _, preprocess = create_model_and_transforms(name)
        tokenizer = get_tokenizer(name)
    else:
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        tokenizer = open_clip.get_tokenizer(name)
    images, texts = check_samples()
    model.eval()
    with torch.no_grad():
        return {
            "image": model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True),
            "text": model.encode_text(tokenizer(texts), normalize=True),
        }
