"""What open_clip's users expect of create_model and friends: its arguments, by name and position, and its numbers."""

import hashlib
import inspect
import io
import json
import shlex
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from test_open_clip_flags import LINES

import training
from eval_files import write_imagenet
from training.clip_benchmark import main as clip_benchmark
from training.data.shards import ShardSource
from training.data.sizes import expand_sources
from training.main import main

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


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        ("a.tar", 1),
        ("a_{000..000}.tar", 1),
        ("a_{000..009}.tar", 10),
        ("a_{000..009}_{000..009}.tar", 100),
        ("a.tar::b_{000..009}.tar", 11),
        ("a_{000..009}.tar::b_{000..009}.tar", 20),
    ],
)
def test_shards_in_braces_are_as_many(spec, number):
    url = "https://host/"  # names at URLs are not looked up
    found = expand_sources("::".join(url + name for name in spec.split("::")))
    assert sum(map(len, found)) == number and len(found) == spec.count("::") + 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    """Two shards of 10 and of 5 samples, whose captions name the shard."""
    folder = tmp_path_factory.mktemp("shards")
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    for number, count in enumerate((10, 5)):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for sample in range(count):
                for suffix, content in (("png", image.getvalue()), ("txt", f"{number:03d} {sample}".encode())):
                    member = tarfile.TarInfo(f"{sample}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [str(path) for path in sorted(folder.glob("*.tar"))]


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [1.0, 2.0]])
def test_samples_are_drawn_as_often(weights, shards):
    """Shards are drawn with the factors of their sources; with 1 and 2, samples of the second come twice as often."""
    sizes = [10, 5]
    source = ShardSource(shards, sizes, 0, window=10, lanes=2, factors=weights or [1.0, 1.0], num_drawn=3000)
    counts = Counter(raw.files["txt"].decode() for raw in source.read(0, 0, 3000))
    of_shard = [weight * size for weight, size in zip(weights or [1.0, 1.0], sizes)]
    for caption, count in counts.items():
        expected = 3000 * of_shard[int(caption[:3])] / sum(of_shard) / sizes[int(caption[:3])]
        assert count == pytest.approx(expected, rel=0.25), caption
    assert len(counts) == 15


@pytest.mark.parametrize("place", ["openaipublic/{}/RN50.pt", "mlfoundations/rn50-quickgelu-{:.8}.pt"])
def test_a_download_is_checked_by_its_hash_and_kept(place, stock, tmp_path, monkeypatch):
    name, weights = stock
    content = Path(weights).read_bytes()
    file = tmp_path / place.format(hashlib.sha256(content).hexdigest())
    file.parent.mkdir(parents=True)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"tag": {"url": f"file://{file}"}})
    cache = tmp_path / "cache"
    file.write_bytes(b"corrupted")
    with pytest.raises(FileNotFoundError, match="checksum does not"):
        training.create_model(name, "tag", cache_dir=str(cache))
    file.write_bytes(content)
    expected = open_clip.create_model(name, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the corrupted file is fetched again
        assert equal(training.create_model(name, "tag", cache_dir=str(cache)), expected)
    file.unlink()  # the next model is read from the cache
    assert equal(training.create_model(name, "tag", cache_dir=str(cache)), expected)


SMALL = {
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "vit": {"image_size": 32, "layers": 6, "width": 32, "head_width": 16, "patch_size": 16},
}


@pytest.mark.parametrize(
    "name",
    [
        "README: table",
        "README: one node",
        "README: resume",
        "README: ImageNet",
        "CLIPA-v2 H/14 fine-tuning at 224",
        "tests: ResNet",
        "tests: ViT",
    ],
)
def test_a_documented_launch_line_runs_with_small_sizes(name, shards, tmp_path):
    """Paths, model and sizes are replaced. On shards, --captions raw is added, as the documentation says."""
    rows = [f"{number}.png\ta red square {number}" for number in range(8)]
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath\ttitle", *rows]))
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    kind = "resnet" if "RN50" in LINES[name] else "vit"
    (tmp_path / "model.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": SMALL[kind], "text_cfg": text}))
    model = f"config:{tmp_path / 'model.json'}"
    torch.manual_seed(0)
    torch.save(training.create_model(model).state_dict(), tmp_path / "weights.pt")
    new = {
        "--model": model, "--pretrained": tmp_path / "weights.pt", "--logs": tmp_path / "logs", "--workers": 0,
        "--batch-size": 4, "--epochs": 1, "--warmup": 1, "--train-num-samples": 8, "--force-image-size": 48,
        "--precision": "fp32" if "amp" in LINES[name] else "amp_bf16", "--val-data": tmp_path / "pairs.csv",
        "--imagenet-val": write_imagenet(tmp_path / "imagenet", 1), "--report-to": "tensorboard",
    }  # fmt: skip
    words = [part for word in LINES[name] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    is_table = "--train-data" in words and words[words.index("--train-data") + 1].endswith(".csv")
    new["--train-data"] = tmp_path / "pairs.csv" if is_table else "::".join(shards)
    for flag, value in new.items():
        if flag in words:
            words[words.index(flag) + 1] = str(value)
    if "--resume" in words:
        words[words.index("--resume") + 1] = str(run_before(tmp_path, model))
    more = ["--device", "cpu", "--logs", tmp_path / "logs", "--model", model, "--batch-size", 4, "--workers", 0]
    more += ["--captions", "raw", "--epochs", 10 if "--resume" in words else 1] if "--train-data" in words else []
    if "--imagenet-val" in words:  # one text for each class instead of 80
        prompts = {"imagenet1k": {name: [name] for name in dict.fromkeys(open_clip.IMAGENET_CLASSNAMES)}}
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        more += ["--imagenet-prompts", tmp_path / "prompts.json"]
    words += ["--csv-separator", "\\t"] if str(tmp_path / "pairs.csv") in words else []
    assert main([*words, *map(str, more)]) == 0
    if "--train-data" in words or "--dataset-type" in words:
        (run,) = (path for path in (tmp_path / "logs").iterdir() if (path / "metrics.jsonl").exists())
        assert "train/loss" in (run / "metrics.jsonl").read_text()


def run_before(folder: Path, model: str) -> Path:
    """Trains nine of the ten epochs of a default run; returns the last checkpoint, which is resumed."""
    line = f"--train-data {folder / 'pairs.csv'} --csv-separator \\\\t --captions raw --model {model} --batch-size 4 "
    line += f"--workers 0 --device cpu --logs {folder} --name before --epochs 9 --save-frequency 0"
    assert main(shlex.split(line)) == 0
    return folder / "before" / "checkpoints" / "epoch_9.pt"


def test_clip_benchmark_runs_its_dummy_data(tmp_path, monkeypatch):
    vision = {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 56}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "model.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    name = f"config:{tmp_path / 'model.json'}"
    torch.save(training.create_model(name).state_dict(), tmp_path / "weights.pt")
    argv = f"eval --model {name} --pretrained {tmp_path / 'weights.pt'} --dataset dummy --task zeroshot_classification"
    argv += f" --num_workers 0 --batch_size 64 --output {tmp_path / 'result.json'}"
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *argv.split()])
    assert clip_benchmark() == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["metrics"]["acc1"] in (0, 1) and found["model"] == name  # one image of two classes
