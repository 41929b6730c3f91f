"""Loads the model to export, on the CPU in fp32: from a run, a weights file or a folder."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dataloaders.scene_drawing import draw_scene, make_scene
from training.eval.results import read_lines
from training.flags.model import model_arguments, tokenizer_arguments
from training.model.assembly.factory import check_vocabulary, create_model_and_transforms, get_tokenizer
from training.model.names.config import CONFIG_FILE, LOCAL_DIR
from training.model.names.transformers_clip import HF
from training.model.weights.weights_file import read_state_dict
from training.train.checkpoint import newest_checkpoint

NUM_CHECKED = 32
# Captions that other tokenizers and exports are known to get wrong; the special tokens of common tokenizers among them.
_HARD_TEXTS = (
    "",
    "!",
    "A red car!",
    "!!! #$%^&*()_+-=[]{};':\",./\\?|`~",
    "A line.\nAnother\tone.  Two blanks. 3.5 or 1,000?",
    "¡Hola! Привет, мир. 你好，世界。こんにちは 안녕 مرحبا שלום สวัสดี हिन्दी 😀🏽",
    "a [CLS] b [SEP] c [PAD] d [MASK] e [UNK] f [Corner0] g",
    "a <s> b </s> c <pad> d <unk> e <mask> f",
    "a <|startoftext|> b <|endoftext|> c <start_of_text> d <end_of_text> e",
    "word " * 600,
)


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        model: open_clip's or one of ours, in eval mode.
        preprocess: PIL image -> [3, H, W].
        tokenizer: texts -> ids [n, context_length].
        name: name of the run, file or folder.
        weights: the weights file; None for a folder.
        flags: flags of the run; empty without a run.
        results: results of the run's last evaluation; empty without one.
    """

    model: Any
    preprocess: Callable
    tokenizer: Any
    name: str
    weights: Path | None
    flags: dict[str, Any]
    results: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """``model_cfg`` and ``preprocess_cfg`` in open_clip's form."""
        return self.model.lotlip_config

    @property
    def image_size(self) -> int:
        """Height and width of images in pixels."""
        return self.model.visual.image_size[0]


def load_source(path: Path, args: argparse.Namespace) -> Source:
    """Loads the model to export.

    Args:
        path: a run's folder (its newest checkpoint is used), a checkpoint or other weights file, or a folder in
            open_clip's or transformers' format.
        args: ``model``, ``num_corner_tokens``, ``context_length`` and ``cache_dir``; None takes the run's flags.

    Raises:
        ValueError, FileNotFoundError: the message says what is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run, file or folder")
    if path.is_dir() and not (path / "params.json").is_file():
        if not any((path / name).is_file() for name in (CONFIG_FILE, "config.json")):
            raise ValueError(f"{path}: neither a run (params.json), nor a folder with {CONFIG_FILE} or config.json")
        name = f"{LOCAL_DIR if (path / CONFIG_FILE).is_file() else HF}{path}"
        return _load(name, None, path.name, {}, {}, args)
    run = path if path.is_dir() else path.parent.parent
    flags = json.loads((run / "params.json").read_text()) if (run / "params.json").is_file() else {}
    weights = newest_checkpoint(run / "checkpoints") if path.is_dir() else path
    if weights is None:
        raise FileNotFoundError(f"{run / 'checkpoints'}: no checkpoint in this folder")
    name = args.model or flags.get("model", "")
    if not name:
        raise ValueError(f"{path}: not in a run's folder (no params.json); give its architecture with --model")
    results = run / "checkpoints" / "results.jsonl"
    lines = read_lines(results) if results.is_file() else []
    return _load(name, weights, run.name if flags else path.stem, flags, lines[-1] if lines else {}, args)


def _load(name: str, weights: Path | None, title: str, flags: dict, results: dict, args: argparse.Namespace) -> Source:
    flags = flags | {key: value for key, value in vars(args).items() if value is not None}
    changes = model_arguments(flags)
    if weights and "logit_bias" in read_state_dict(weights):
        changes["init_logit_bias"] = 0.0  # builds a model that has a logit_bias
    pretrained = str(weights) if weights else None
    model, _, preprocess = create_model_and_transforms(name, pretrained, **changes)
    tokenizer = get_tokenizer(name, **tokenizer_arguments(flags))
    check_vocabulary(name, model, tokenizer)
    return Source(model.eval(), preprocess, tokenizer, title, weights, flags, results)


def check_samples(count: int = NUM_CHECKED) -> tuple[list[Image.Image], list[str]]:
    """Returns synthetic images and as many captions, always the same: long ones, then ten that are hard to export."""
    scenes = [make_scene(0, "test", number) for number in range(count)]
    texts = [" ".join(scene.long_caption(0)) for scene in scenes]
    return [draw_scene(scene) for scene in scenes], [*texts[: NUM_CHECKED - len(_HARD_TEXTS)], *_HARD_TEXTS][:count]


@torch.no_grad()
def own_features(source: Source) -> dict[str, torch.Tensor]:
    """Returns the normalised features of the samples, computed by the model itself, as ``image`` and ``text``."""
    images, texts = check_samples()
    pixels = torch.stack([source.preprocess(image) for image in images])
    image = source.model.encode_image(pixels, normalize=True)
    return {"image": image, "text": source.model.encode_text(source.tokenizer(texts), normalize=True)}
