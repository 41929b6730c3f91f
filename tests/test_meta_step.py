"""One training step with every tensor on the meta device, where reading a value, or mixing devices, raises.

On a GPU, a value that the host reads stops the step until everything before it has been computed.
"""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

from training.data.open import caption_rule
from training.data.reader import FIELD
from training.flags.parser import parse_args
from training.model.assembly.from_flags import build_from_flags
from training.runtime.distributed import DistEnv
from training.runtime.experiment import experiment_of
from training.train.build import make_stepper
from training.train.optim import parameter_groups

META = torch.device("meta")
RECIPES = sorted((Path(__file__).parents[1] / "scripts" / "recipes").glob("*.yaml"))
BATCH_SIZE = 48  # more than the components of the recipes


@pytest.fixture(scope="module")
def cache(tmp_path_factory, minilm_folder) -> Path:
    """Folders of tokenizers, with configs of two layers."""
    folder = tmp_path_factory.mktemp("cache")
    sizes = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 4}
    for name, family in (("bert-base-uncased", "bert"), ("answerdotai/ModernBERT-base", "modernbert")):
        shutil.copytree(minilm_folder, folder / name)
        (folder / name / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 30522, **sizes}))
    return folder


class Unfused(torch.optim.AdamW):
    """AdamW that the step takes for fused, which the meta device can not be; its own code is torch's, and not run."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups)
        self.defaults["fused"] = True

    def step(self, closure: None = None) -> None:
        assert self.found_inf.device == META


def take_step(flags: list[str], cache: Path, appended: int = 0, **fields: torch.Tensor) -> dict[str, torch.Tensor]:
    """Takes a step of the training that the flags describe, with random weights.

    Args:
        flags: flags of the model and the loss.
        cache: folder of tokenizers.
        appended: number of texts that an experiment appends.
        **fields: an experiment's fields of a sample.
    """
    args = parse_args(["--train-data", "d.tar", "--name", "x", "--cache-dir", str(cache), *flags])
    no_weights = {"pretrained": None, "pretrained_image": None, "pretrained_text": False, "batch_size": BATCH_SIZE}
    args = argparse.Namespace(**vars(args) | no_weights)
    with META:
        parts = build_from_flags(args, META)
        core = parts.model
        if args.grad_checkpointing:
            core.set_grad_checkpointing()
        groups = parameter_groups(core, args.lr, args.wd, args.image_lr, args.text_lr)
        optimizer = Unfused(groups)
        stepper = make_stepper(args, core, optimizer, None, DistEnv(0, 1, torch.device("cpu")), experiment_of(args))
    stepper.model.train()
    num_long = len(caption_rule(args).texts) - 1 + appended
    short = parts.tokenizer(["a dog on a bench"] * BATCH_SIZE)
    groups = [short]
    if num_long:
        groups.append(parts.tokenizer(["a dog. " * 20] * BATCH_SIZE * num_long).unflatten(0, (BATCH_SIZE, num_long)))
    captions = {"packed_text": parts.arrange(*groups)} if parts.arrange else dict(zip(("text", "long_text"), groups))
    size = core.visual.preprocess_cfg["size"]
    images = torch.zeros(BATCH_SIZE, 3, *(size if isinstance(size, (tuple, list)) else (size, size)), dtype=torch.uint8)
    inputs = {name: value.to(META) for name, value in {"image": images, **captions}.items()}
    inputs |= {FIELD + name: value.expand(BATCH_SIZE, *value.shape).to(META) for name, value in fields.items()}
    return stepper([inputs] * args.accum_freq)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_step_of_a_recipe_reads_from_the_device(recipe, cache):
    report = take_step(["--config", str(recipe)], cache)
    assert {value.device.type for value in report.values()} == {"meta"}


@pytest.mark.parametrize(
    "flags",
    [
        "lotlip_tiny --text-packing buckets",
        "lotlip_tiny --text-packing padded --siglip --accum-freq 2",
        "lotlip_tiny --lock-image --grad-checkpointing",
        "lotlip_tiny --lock-image --accum-freq 2 --text-views raw,long*3 --label-smoothing 0.1",
        "lotlip_minilm-ViT-S-16",
        "lotlip_modernbert-ViT-B-16",
        "lotlip_clip-ViT-B-16",
        "flair-ViT-B-16",
        "ViT-B-32",
        "RN50",
    ],
)
def test_no_step_of_a_text_tower_reads_from_the_device(flags, cache):
    report = take_step(["--model", *flags.split()], cache)
    assert {value.device.type for value in report.values()} == {"meta"}
    assert ("corner_cls_cosine" in report) == flags.startswith("lotlip")


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("flags", "appended", "fields"),
    [
        ("hn_clip.py --siglip", 0, {}),
        ("corner_diversity.py --lock-image", 0, {}),
        ("flair.py --model flair-ViT-B-16 --siglip --text-views sentences(1..3)*2", 0, {}),
        ("dreamlip.py --lock-image --accum-freq 2", 0, {}),
        ("hard_texts.py --siglip", 1, {"is_hard": torch.ones(1, dtype=torch.bool)}),
        ("distillation.py --teacher-key x", 0, {"teacher_features": torch.ones(128)}),
        ("regions.py", 4, {"boxes": torch.ones(4, 4), "is_box": torch.ones(4, dtype=torch.bool)}),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_no_step_of_an_example_reads_from_the_device(flags, appended, fields, cache):
    model = [] if "--model" in flags else ["--model", "lotlip_tiny"]
    argv = ["--experiment", str(EXAMPLES / flags.split()[0]), *model, *flags.split()[1:]]
    report = take_step(argv, cache, appended, **fields)
    assert {value.device.type for value in report.values()} == {"meta"}
