"""python -m training.export: each format gives the same features when loaded by the other software alone."""

import inspect
import json
import shutil
import subprocess
import sys

import huggingface_hub
import onnxruntime
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
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


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_sentence_transformers_encodes_texts_and_images(name, runs, tmp_path):
    from sentence_transformers import SentenceTransformer

    export(runs / name, "transformers", tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    images, texts = check_samples(6)
    expected = original(runs, name)
    for items, features, tolerance in ((images, expected[0], 0.02), (texts, expected[1], 1e-5)):  # another resize
        found = torch.from_numpy(model.encode(items, normalize_embeddings=True))
        torch.testing.assert_close(found, features, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_accelerate_places_it_and_the_old_name_of_dtype_works(name, runs, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    export(runs / name, "transformers", tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)(["A dog!", "two"], padding=True)
    options = {"device_map": "auto", "torch_dtype": torch.bfloat16, "trust_remote_code": True}
    model = AutoModel.from_pretrained(tmp_path / "out", **options).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = model.get_text_features(**{key: torch.tensor(value) for key, value in words.items()})
    assert getattr(found, "pooler_output", found).isfinite().all()


class StandIn:
    """What the hub's client does, with a folder in place of the hub: the names and arguments of its methods."""

    hub, user = None, "somebody"

    def whoami(self) -> dict:
        if self.user is None:
            raise LocalTokenNotFoundError("Token is required")
        return {"name": self.user}

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
        (self.hub / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (self.hub / f"{repo_id}.private").write_text(str(private))

    def upload_folder(self, *, repo_id: str, folder_path) -> str:
        shutil.copytree(folder_path, self.hub / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"


def test_an_export_is_pushed_to_the_hub_once_its_features_are_equal(runs, tmp_path, monkeypatch, capsys):
    for name in ("whoami", "create_repo", "upload_folder"):  # the stand-in takes nothing that the client does not
        known = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        assert set(inspect.signature(getattr(StandIn, name)).parameters) <= known.keys()
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    monkeypatch.setattr(StandIn, "hub", tmp_path / "hub")
    export(runs / "clip", "open_clip", tmp_path / "out", "--push-to-hub", "me/clip", "--private")
    assert "Uploaded: https://hub/me/clip" in capsys.readouterr().out
    assert (tmp_path / "hub" / "me" / "clip.private").read_text() == "True"
    model = training.create_model(f"local-dir:{tmp_path / 'hub' / 'me' / 'clip'}")
    expected = training.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())

    monkeypatch.setattr(StandIn, "user", None)
    for repo, said in (("me/clip", "Token is required"), ("me/my/clip", "Repo id must be")):
        with pytest.raises(SystemExit) as end:
            main([str(runs / "clip"), "--to", "open_clip", "--out", str(tmp_path / "none"), "--push-to-hub", repo])
        assert end.value.code == 2 and not (tmp_path / "none").exists()
        message = capsys.readouterr().err
        assert f"--push-to-hub {repo}: " in message and said in message and "hf auth login" in message


def test_a_tokenizer_with_more_ids_than_the_embedding_table_is_refused(runs, tmp_path, capsys):
    from transformers import AutoTokenizer

    export(runs / "clip", "transformers", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(tmp_path / "out")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--to", "open_clip", "--out", str(tmp_path / "again")])
    said = "its tokenizer has 49,410 token ids, the embedding table of its text tower 49,408 rows"
    assert said in capsys.readouterr().err


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
    if name == "clip":
        export(tmp_path / "out", "open_clip", tmp_path / "again")
        assert "\nUnknown: the model was not exported from a run.\n" in (tmp_path / "again" / "README.md").read_text()
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
