"""python -m training.export: each format gives the same features when loaded by the other software alone."""

import json
import subprocess
import sys

import onnxruntime
import pytest
import torch
from PIL import Image
from test_transformers_clip import widen
from tokenizers import Tokenizer

import training
from training.export.__main__ import main
from training.export.source import check_samples
from training.main import main as train


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """Trains one epoch each: LoTLIP's BERT tower, CLIP with 77 and 248 tokens, CLIP with corners."""
    logs = tmp_path_factory.mktemp("runs")
    vision = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2}
    config = logs / "clip.json"
    config.write_text(json.dumps({"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    kinds = {
        "bert": ["--model", "lotlip_tiny"],
        "clip": ["--model-config", str(config), "--siglip"],
        "long": ["--model-config", str(config), "--context-length", "248"],
        "corners": ["--model-config", str(config), "--num-corner-tokens", "2"],
    }
    data = ["--train-data", str(scenes / "train"), "--batch-size", "20", "--epochs", "1", "--num-long-captions", "1"]
    for name, flags in kinds.items():
        assert train([*data, *flags, "--logs", str(logs), "--name", name, "--workers", "0", "--device", "cpu"]) == 0
        path = logs / name / "checkpoints" / "epoch_1.pt"
        content = torch.load(path, weights_only=True)
        model = torch.nn.Module()  # an untrained tower gives nearly the same features for all texts
        for key, value in content["state_dict"].items():
            model.register_parameter(key.replace(".", "/"), torch.nn.Parameter(value, value.is_floating_point()))
        widen(model)
        content["state_dict"] = {key.replace("/", "."): value.data for key, value in model.named_parameters()}
        torch.save(content, path)
    return logs


def export(source, to, out, *flags) -> dict:
    assert main([str(source), "--to", to, "--out", str(out), *flags]) == 0
    report = json.loads((out / "export.json").read_text())
    assert max(report["largest_difference"].values()) < 2e-5 and report["samples"] == 32
    return report


def original(runs, name: str, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes features of the samples with the model that the trainer saved, without the exporter."""
    flags = json.loads((runs / name / "params.json").read_text())
    overrides = {key: flags[key] for key in ("num_corner_tokens", "context_length")}
    checkpoint = str(runs / name / "checkpoints" / "epoch_1.pt")
    model, _, preprocess = training.create_model_and_transforms(flags["model"], checkpoint, **overrides)
    images, texts = check_samples(count)
    ids = training.get_tokenizer(flags["model"], **overrides)(texts)
    with torch.no_grad():
        pixels = torch.stack([preprocess(image) for image in images])
        return model.eval().encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)


def test_transformers_loads_lotlip_in_a_process_of_its_own(runs, tmp_path):
    export(runs / "bert", "transformers", tmp_path / "out")
    images, texts = check_samples(6)
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = """
import json, sys, torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
folder, here = sys.argv[1:]
assert "training" not in sys.modules
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(here + "/again"); tokenizer.save_pretrained(here + "/again")
again = AutoModel.from_pretrained(here + "/again", trust_remote_code=True, dtype=torch.bfloat16).eval()
words = tokenizer(json.load(open(here + "/texts.json")), padding=True, truncation=True, return_tensors="pt")
pixels = CLIPImageProcessorPil.from_pretrained(folder)(
    [Image.open(f"{here}/{n}.png") for n in range(6)], return_tensors="pt").pixel_values
with torch.no_grad():
    found = [model.get_image_features(pixel_values=pixels), model.get_text_features(**words)]
    low = [again.get_image_features(pixel_values=pixels), again.get_text_features(**words)]
    assert low[0].dtype == low[1].dtype == torch.bfloat16
    for a, b in zip(found, low):
        assert torch.nn.functional.cosine_similarity(a, b.float()).min() > 0.999
torch.save([torch.nn.functional.normalize(getattr(f, "pooler_output", f), dim=-1) for f in found], here + "/f.pt")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "out", tmp_path], check=True, cwd=tmp_path)
    for got, expected in zip(torch.load(tmp_path / "f.pt"), original(runs, "bert")):
        assert expected.std(dim=0).max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "long"])
def test_text_encoders_alone_load_it_as_diffusers_does(name, runs, tmp_path):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    export(runs / name, "transformers", tmp_path / "out")
    encoder = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out")
    rows = tokenizer(check_samples(6)[1], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        features = torch.nn.functional.normalize(encoder(**rows).text_embeds, dim=-1)
    torch.testing.assert_close(features, original(runs, name)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["long", "corners", "bert"])
def test_onnxruntime_and_tokenizers_alone_run_it(name, runs, tmp_path):
    export(runs / name, "onnx", tmp_path / "out")
    assert "onnxruntime" in (tmp_path / "out" / "README.md").read_text()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = onnxruntime.InferenceSession(str(tmp_path / "out" / "text.onnx"), providers=["CPUExecutionProvider"])
    expected = original(runs, name, count=32)  # the last ten are hard: punctuation, scripts, special tokens, ...
    flags = json.loads((runs / name / "params.json").read_text())
    tokenizer.enable_truncation(flags["context_length"] or (128 if name == "bert" else 77))
    tokenizer.no_padding()
    for caption, feature in zip(check_samples()[1], expected[1]):  # one at a time, without padding
        got = text.run(None, {"input_ids": [tokenizer.encode(caption).ids]})[0]
        torch.testing.assert_close(torch.from_numpy(got[0]), feature, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "corners", "bert"])
def test_open_clip_folders_and_their_card(name, runs, scenes, tmp_path):
    checkpoint = runs / name / "checkpoints" / "epoch_1.pt"
    export(checkpoint, "open_clip", tmp_path / "out", "--license", "mit")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "| epochs | 1 |" in card and "Not evaluated" in card
    model = training.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.no_grad():
        ids = training.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(check_samples(6)[1])
        torch.testing.assert_close(model.encode_text(ids, normalize=True), original(runs, name)[1], rtol=0, atol=1e-6)


def test_the_card_shows_the_runs_recipe_and_its_last_evaluation(runs, scenes, tmp_path):
    flags = json.loads((runs / "long" / "params.json").read_text())
    argv = ["--model", flags["model"], "--context-length", "248", "--urban1k-retrieval", str(scenes / "urban1k")]
    argv += ["--pretrained", str(runs / "long" / "checkpoints" / "epoch_1.pt"), "--workers", "0", "--device", "cpu"]
    assert train([*argv, "--logs", str(runs), "--name", "long"]) == 0
    record = json.loads((runs / "long" / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    export(runs / "long", "open_clip", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: unknown" in card and "| seed | 0 |" in card and f"| architecture | {flags['model']} |" in card
    row = "| urban1k-retrieval | urban1k/first-line (modified) |"
    shown = next(line for line in card.splitlines() if line.startswith(row))
    assert "25 of 1,000 pairs" in shown
    for direction in ("i2t", "t2i"):
        assert f" {100 * record[f'urban1k-retrieval-{direction}-top1']:.2f} (" in shown


@pytest.mark.parametrize(
    ("source", "to", "said"),
    [
        ("corners", "transformers", "use --to onnx"),
        ("nowhere", "onnx", "no such run"),
        ("clip.json", "onnx", "give its architecture with --model"),
        (".", "onnx", "neither a run"),
    ],
)
def test_models_that_cannot_be_exported_are_refused_with_the_reason(source, to, said, runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(runs / source), "--to", to, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_with_other_content_is_not_overwritten(runs, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    with pytest.raises(SystemExit):
        main([str(runs / "clip"), "--to", "onnx", "--out", str(tmp_path)])
    assert "not empty" in capsys.readouterr().err
