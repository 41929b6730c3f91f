"""--lora: training touches adapters only, peft's forward pass equals the merged weights, a run resumes exactly."""

import json

import peft
import pytest
import torch

import training
from training.export.__main__ import main as export
from training.main import main
from training.model.weights.adapters import add_adapters

FLAGS = (
    "--lora 4 --batch-size 8 --workers 0 --device cpu --lr 1e-2 --warmup 1 --save-every-minutes 0 --log-every-n-steps 1"
)


def checkpoint(folder, name: str) -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module", params=["lotlip_tiny --no-pretrained-text", "tiny_clip --captions raw --lock-text"])
def run(request, scenes, tiny_clip, tmp_path_factory):
    """Trains two epochs; returns the folder of the runs and the command."""
    logs = tmp_path_factory.mktemp("lora")
    model = request.param.replace("tiny_clip", tiny_clip)
    argv = ["--train-data", str(scenes / "train"), "--logs", str(logs), *f"--model {model} {FLAGS}".split()]
    assert main([*argv, "--name", "run", "--epochs", "2", "--save-every-steps", "7"]) == 0
    return logs, argv


def test_only_adapters_and_small_tables_are_trained(run):
    logs, argv = run
    first, last = (checkpoint(logs / "run", name)["state_dict"] for name in ("epoch_1.pt", "epoch_2.pt"))
    changed = {name for name, value in last.items() if not torch.equal(value, first[name])}
    assert any("lora_A" in name for name in changed) and any("lora_B" in name for name in changed)
    rest = {name for name in changed if "lora_" not in name}
    assert rest <= {"logit_scale", "text.transformer.embeddings.position_embeddings.weight"} | {
        f"text.transformer.embeddings.{name}" for name in ("corner_embeddings.weight", "word_embeddings.weight")
    }
    assert not any("word_embeddings" in name for name in rest)
    if "--lock-text" in argv:
        assert all(name.startswith(("visual.", "logit_")) for name in changed)


def test_merged_weights_equal_pefts_own_forward(run, tmp_path):
    """peft adds its adapters to a new model, loads them from the checkpoint and computes."""
    logs, argv = run
    name, path = argv[argv.index("--model") + 1], logs / "run" / "checkpoints" / "epoch_2.pt"
    state = checkpoint(logs / "run", "epoch_2.pt")["state_dict"]
    targets = [key.removesuffix(".lora_A.default.weight") for key in state if key.endswith("lora_A.default.weight")]
    theirs = training.create_model(name, pretrained_text=False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets), theirs)
    theirs.load_state_dict(state)
    ours = training.create_model(name, str(path)).eval()
    size, generator = ours.visual.image_size[0], torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, size, size, generator=generator)
    ids = training.get_tokenizer(name)(["a dog", "a red car! It stands in the rain.", ""])
    with torch.no_grad():
        for tower, inputs in (("encode_image", images), ("encode_text", ids)):
            expected = getattr(theirs.eval(), tower)(inputs)
            torch.testing.assert_close(getattr(ours, tower)(inputs), expected, rtol=1e-4, atol=1e-5)
    assert export([str(logs / "run"), "--to", "open_clip", "--out", str(tmp_path / "out")]) == 0
    exported = training.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in ours.state_dict().items())


def test_a_resumed_run_equals_an_uninterrupted_one(run):
    logs, argv = run
    step = next((logs / "run" / "checkpoints").glob("step_*.pt"), logs / "run" / "checkpoints" / "epoch_1.pt")
    assert main([*argv, "--name", "again", "--epochs", "2", "--resume", str(step)]) == 0
    whole, again = (checkpoint(logs / name, "epoch_2.pt") for name in ("run", "again"))
    assert all(torch.equal(value, again["state_dict"][key]) for key, value in whole["state_dict"].items())
    rows = [(logs / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "again")]
    losses = [
        {row["step"]: row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row} for lines in rows
    ]
    assert losses[1] and all(losses[0][number] == loss for number, loss in losses[1].items())


def test_a_model_without_trained_linear_layers_is_refused(tiny_clip):
    model = training.create_model(tiny_clip).requires_grad_(False)
    with pytest.raises(ValueError, match="--lora 4: no linear layer is left to train"):
        add_adapters(model, 4)
