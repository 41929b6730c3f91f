"""What open_clip's users expect of create_model and friends: its arguments, by name and position, and its numbers."""

import inspect
import json
from pathlib import Path

import open_clip
import pytest
import torch

import training

FUNCTIONS = ["create_model", "create_model_and_transforms", "get_tokenizer"]


@pytest.fixture(scope="module")
def stock(tiny_clip, tmp_path_factory) -> tuple[str, str]:
    """Name and weights file of a small model that open_clip knows."""
    folder = Path(tiny_clip.removeprefix("local-dir:"))
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path_factory.mktemp("configs") / "tiny-expected.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path_factory.getbasetemp() / "configs0")
    return "tiny-expected", str(folder / "open_clip_model.pt")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_keyword_is_accepted_with_its_default(name, tiny_clip):
    """Called with all arguments of open_clip's function spelled out."""
    given = {
        key: parameter.default
        for key, parameter in inspect.signature(getattr(open_clip, name)).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    model = tiny_clip if name != "get_tokenizer" else "ViT-B-32"
    getattr(training, name)(**given | {"model_name": model})


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_positions_of_the_arguments_are_open_clips(stock):
    name, weights = stock
    given = (weights, True, "fp32", "cpu")
    assert equal(training.create_model(name, *given), open_clip.create_model(name, *given))
    ours, theirs = (m.create_model_and_transforms(name, *given) for m in (training, open_clip))
    assert equal(ours[0], theirs[0]) and str(ours[2]) == str(theirs[2])
    assert not equal(training.create_model(name, weights, False), ours[0])


@pytest.mark.parametrize("length", [100, 40])
def test_force_context_length_gives_open_clips_weights(length, stock):
    assert equal(*(m.create_model(*stock, force_context_length=length) for m in (training, open_clip)))
    ours = training.create_model(*stock, context_length=100)  # keeps the first 20 positions
    assert torch.equal(ours.text.positional_embedding[:20], training.create_model(*stock).positional_embedding[:20])


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)},
        {"image_interpolation": "bilinear", "image_resize_mode": "squash"},
        {"force_image_size": 48},
        {"force_quick_gelu": True},
        {"force_custom_text": True},
        {"force_patch_dropout": 0.25},
        {"output_dict": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_the_model_is_open_clips(change, stock):
    ours, theirs = (m.create_model_and_transforms(*stock, **change) for m in (training, open_clip))
    assert equal(ours[0], theirs[0])
    assert [str(t) for t in ours[1:]] == [str(t) for t in theirs[1:]]
    size = ours[0].visual.image_size[0]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = training.get_tokenizer()(["a dog", "a red car!"])
    with torch.no_grad():
        outputs = [model.eval()(images, ids) for model in (ours[0], theirs[0])]
    values = [list(output.values() if isinstance(output, dict) else output) for output in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*values)) and isinstance(outputs[0], dict) == ("output_dict" in change)


def test_what_is_refused(stock):
    with pytest.raises(ValueError, match="jit=True"):
        training.create_model(*stock, jit=True)
    with pytest.raises(RuntimeError, match="require_pretrained"):
        training.create_model(stock[0], require_pretrained=True)
