"""Weights: other formats, longer contexts, separate towers, saving, precision, and messages if they don't fit."""

import json
import shutil

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

import training
from support import read_results
from training.main import main
from training.model.weights.load import load_weights, stretch_positions

LONG_CLIP = ["--model", "ViT-S-32-alt", "--context-length", "248", "--lock-text"]  # the last --model has precedence
TEXT = ["A small red star is at the top left of the picture. Behind all of it there is only gray.", "a large blue ring"]


def tiny(**kwargs):
    torch.manual_seed(0)
    return training.create_model("lotlip_tiny", **kwargs).eval()


@pytest.fixture(scope="module")
def base_clip(tmp_path_factory):
    """Returns (folder name for --model, state dict) of a small plain CLIP with 77 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    model_cfg = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    torch.manual_seed(0)
    state = open_clip.CLIP(**model_cfg).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}", state, model_cfg


def test_one_call_adds_our_names_to_open_clips():
    training.register_model_configs()
    names = open_clip.list_models()
    for name in ("lotlip_bert-ViT-B-16", "lotlip_bert-ViT-B-32", "lotlip_bert-ViT-L-14", "lotlip_minilm-ViT-S-16"):
        assert name in names
    for name in ("lotlip_tiny", "lotlip_modernbert-ViT-B-16", "lotlip_clip-ViT-B-16", "long_clip-ViT-L-14"):
        assert name in names


def test_models_that_are_not_ours_are_open_clips_bit_for_bit(base_clip):
    name, state, _ = base_clip
    ours, theirs = training.create_model(name), open_clip.create_model(name)
    assert type(ours) is type(theirs)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    _, train, val = training.create_model_and_transforms(name)
    _, open_train, open_val = open_clip.create_model_and_transforms(name)
    assert repr((train, val)) == repr((open_train, open_val))
    assert torch.equal(training.get_tokenizer(name)(TEXT), open_clip.get_tokenizer(name)(TEXT))


def test_save_pretrained_loads_back_bit_for_bit(tmp_path):
    model, tokenizer = tiny(), training.get_tokenizer("lotlip_tiny")
    folder = training.save_pretrained(model, tmp_path / "saved", tokenizer)
    again, _, transform = training.create_model_and_transforms(f"local-dir:{folder}")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    ids = training.get_tokenizer(f"local-dir:{folder}")(TEXT)
    assert torch.equal(ids, tokenizer(TEXT))
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids), again.eval().encode_text(ids))
    assert "mean=[0.5, 0.5, 0.5]" in repr(transform)
    clip = training.create_model("ViT-S-32-alt", num_corner_tokens=1, context_length=90)
    folder = training.save_pretrained(clip, tmp_path / "clip")
    again = training.create_model(f"local-dir:{folder}")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in clip.state_dict().items())


def test_weights_that_are_not_drawn_are_all_loaded(tmp_path):
    drawn = open_clip.create_model("ViT-S-32-alt")
    torch.save(drawn.state_dict(), tmp_path / "weights.pt")
    loaded = training.create_model("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    found = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    for name, tensor in (*drawn.named_parameters(), *drawn.named_buffers()):  # also buffers that no file holds
        assert torch.equal(tensor, found[name]), name


def test_long_clip_files_merge_their_two_position_tables(base_clip, tmp_path):
    name, state, model_cfg = base_clip
    res, first = torch.randn(248, 64), torch.randn(248, 64)
    torch.save(state | {"positional_embedding": first, "positional_embedding_res": res}, tmp_path / "longclip.pt")
    model_cfg = json.loads(json.dumps(model_cfg))
    model_cfg["text_cfg"] |= {"context_length": 248, "num_corner_token": 0}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    model = training.create_model(f"local-dir:{tmp_path}").eval()
    assert torch.equal(model.text.positional_embedding, torch.cat([first[:20], res[20:]]))
    # An independent model: open_clip's own CLIP with the merged table.
    stock_cfg = json.loads(json.dumps(model_cfg))
    del stock_cfg["text_cfg"]["num_corner_token"]
    stock = open_clip.CLIP(**stock_cfg).eval()
    stock.load_state_dict(state | {"positional_embedding": torch.cat([first[:20], res[20:]])})
    ids = training.get_tokenizer(f"local-dir:{tmp_path}")([" ".join(["dog red"] * 100), "a cat"])
    assert ids.shape == (2, 248) and (ids[0] != 0).sum() == 202
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), stock.encode_text(ids), rtol=0, atol=1e-5)


def test_a_longer_context_stretches_positions(base_clip):
    name, state, _ = base_clip
    model = training.create_model(name, context_length=248)
    table, old = model.text.positional_embedding, state["positional_embedding"]
    assert table.shape == (248, 64)
    assert torch.equal(table[:20], old[:20])
    torch.testing.assert_close(table[20], old[20])
    torch.testing.assert_close(table[-1], old[-1])
    by_hand = stretch_positions(torch.arange(30.0)[:, None], 39)[:, 0]
    assert by_hand.tolist() == pytest.approx([*range(20), *(20 + k / 2 for k in range(19))])
    assert training.get_tokenizer(name, context_length=248)("a dog").shape == (1, 248)


def test_towers_start_from_separate_weights_in_the_cache(tmp_path, minilm_folder):
    cache = tmp_path / "cache"
    torch.manual_seed(3)
    trunk = timm.create_model("test_vit.r160_in1k", pretrained=False)
    (cache / "test_vit.r160_in1k").mkdir(parents=True)
    save_file(trunk.state_dict(), cache / "test_vit.r160_in1k" / "model.safetensors")
    shutil.copytree(minilm_folder, cache / "some-bert")
    vision = {"timm_model_name": "test_vit.r160_in1k", "timm_pool": "token", "timm_proj": "none", "image_size": 160}
    text = {"context_length": 600, "hf_model_name": "some-bert", "hf_tokenizer_name": "some-bert"}
    text |= {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler", "num_corner_token": 2}
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save({"x": torch.zeros(1)}, folder / "unused.txt")
    options = {"load_weights": False, "cache_dir": str(cache), "pretrained_image": True}
    model = training.create_model(f"local-dir:{folder}", **options)
    own = model.visual.trunk.state_dict()
    assert all(torch.equal(own[k], v) for k, v in trunk.state_dict().items() if not k.startswith(("head.", "fc_norm.")))
    from transformers import AutoModel

    bert = AutoModel.from_pretrained(minilm_folder).state_dict()
    embeddings = model.text.transformer.embeddings
    assert embeddings.word_embeddings.weight.shape == (30524, 384)
    assert torch.equal(embeddings.word_embeddings.weight[:30522], bert["embeddings.word_embeddings.weight"])
    assert embeddings.position_embeddings.weight.shape[0] == 600
    assert torch.equal(model.text.transformer.pooler.dense.weight, bert["pooler.dense.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"text.proj.weight": torch.zeros(5, 128)}, "wrong --model"),
        (lambda s: {k: v for k, v in s.items() if "visual" not in k}, "missing"),
        (lambda s: s | {"stranger": torch.zeros(1)}, "    stranger"),
        (lambda s: s | {"text.transformer.embeddings.word_embeddings.weight": torch.zeros(30523, 128)}, "--num-corner"),
        (lambda s: s | {"text.transformer.embeddings.position_embeddings.weight": torch.zeros(600, 128)}, "--context-"),
    ],
)
def test_a_mismatch_names_keys_and_the_likely_reason(change, said, tmp_path):
    model = tiny()
    torch.save(change(model.state_dict()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=said) as caught:
        load_weights(model, tmp_path / "w.pt")
    assert "w.pt does not fit the model" in str(caught.value)


def test_image_positions_are_interpolated_only_for_a_tower_that_has_some(tmp_path, caplog):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    model.visual = torch.nn.Identity()
    with pytest.raises(ValueError, match="visual"):
        load_weights(model, tmp_path / "w.pt")
    assert "interpolated" not in caplog.text


def test_files_that_are_not_weights(tmp_path):
    model = tiny()
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    torch.save({"model": model}, tmp_path / "pickle.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for name, said in (("cut.pt", "broken|plain"), ("cut.safetensors", "broken"), ("pickle.pt", "run code")):
        with pytest.raises(ValueError, match=said):
            load_weights(model, tmp_path / name)
    with pytest.raises(ValueError, match="no weights in it"):
        load_weights(model, tmp_path / "none.pt")


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "pure_fp16"])
def test_16_bit_features_are_within_two_percent(precision):
    ids = training.get_tokenizer("lotlip_tiny")(TEXT)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    full = tiny()
    low = training.create_model("lotlip_tiny", precision=precision).eval()
    low.load_state_dict(full.state_dict())
    with torch.no_grad():
        for expected, got in (
            (full.text.all_features(ids), low.text.all_features(ids)),
            (full.encode_image(pixels), low.encode_image(pixels.to(low.visual.conv1.weight.dtype))),
        ):
            assert float((got.float() - expected).norm() / expected.norm()) < 2e-2
        with torch.autocast("cpu", torch.bfloat16):
            got = full.text.all_features(ids)
        expected = full.text.all_features(ids)
    assert float((got.float() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize(
    "flags", [[], ["--num-corner-tokens", "3", "--context-length", "64", "--lock-image"], LONG_CLIP]
)
def test_evaluation_of_our_models_from_flags(flags, scenes, tmp_path):
    argv = [f"--urban1k-retrieval={scenes / 'urban1k'}", "--model", "lotlip_tiny", "--workers", "0", *flags]
    assert main(argv + ["--logs", str(tmp_path), "--name", "run", "--device", "cpu"]) == 0
    assert read_results(tmp_path, "run")["urban1k-retrieval-num-pairs"] == 25


def test_locked_towers():
    model = tiny()
    model.lock_image_tower()
    model.lock_text_tower(unlocked_layers=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("visual") for name in trained)
    assert any("layer.1." in name for name in trained) and "text.proj.weight" in trained
    assert not any("layer.0." in n and "LayerNorm" not in n or "word_embeddings" in n for n in trained)
    clip = training.create_model("ViT-S-32-alt", num_corner_tokens=1)
    clip.lock_text_tower()
    assert not any(p.requires_grad for p in clip.text.parameters())
