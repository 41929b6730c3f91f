"""Long-CLIP's family: the four configs, and files with the published keys against a plain implementation."""

import json

import open_clip
import pytest
import torch
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

import training

WIDTH, HEADS, LENGTH = 32, 2, 248


@pytest.mark.parametrize("size", ["B-16", "B-32", "L-14", "L-14-336"])
def test_configs_are_openais_with_248_positions(size):
    training.register_model_configs()
    ours, theirs = (open_clip.get_model_config(f"{name}-{size}") for name in ("long_clip-ViT", "ViT"))
    assert ours.pop("quick_gelu") and ours["text_cfg"].pop("num_corner_token") == 0
    assert ours["text_cfg"].pop("context_length") == LENGTH and theirs["text_cfg"].pop("context_length") == 77
    ours["vision_cfg"].setdefault("head_width", 64)
    theirs["vision_cfg"].setdefault("head_width", 64)
    assert ours == theirs


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns a small model of the family as --model, and weights with Long-CLIP's keys."""
    vision = {"image_size": 16, "layers": 2, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 8}
    text = {"context_length": LENGTH, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": 2}
    text["num_corner_token"] = 0
    path = tmp_path_factory.mktemp("long_clip") / "small.json"
    path.write_text(json.dumps({"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    torch.manual_seed(0)
    names = training.create_model(f"config:{path}").state_dict()
    state = {key.removeprefix("text."): torch.randn_like(value) * 0.2 for key, value in names.items()}
    state |= {"logit_scale": torch.tensor(4.6), "positional_embedding_res": torch.randn(LENGTH, WIDTH)}
    return f"config:{path}", state


def blocks(state: dict, prefix: str, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """Computes CLIP's residual blocks on [n, length, width], using only the names in the file."""
    for number in range(2):
        own = {k.removeprefix(f"{prefix}{number}."): v for k, v in state.items() if k.startswith(f"{prefix}{number}.")}
        y = layer_norm(x, (WIDTH,), own["ln_1.weight"], own["ln_1.bias"])
        parts = linear(y, own["attn.in_proj_weight"], own["attn.in_proj_bias"]).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        y = scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        x = x + linear(y, own["attn.out_proj.weight"], own["attn.out_proj.bias"])
        y = layer_norm(x, (WIDTH,), own["ln_2.weight"], own["ln_2.bias"])
        y = linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x


def plain_text(state: dict, ids: torch.Tensor) -> torch.Tensor:
    """Encodes texts with rows 0 to 19 of the frozen table and 20 to 247 of the trained one.

    The end token is the one with the largest id.
    """
    first = (torch.arange(LENGTH) < 20)[:, None]
    positions = torch.where(first, state["positional_embedding"], state["positional_embedding_res"])
    x = blocks(state, "transformer.resblocks.", state["token_embedding.weight"][ids] + positions, causal=True)
    x = layer_norm(x, (WIDTH,), state["ln_final.weight"], state["ln_final.bias"])
    return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ state["text_projection"]


def plain_image(state: dict, pixels: torch.Tensor) -> torch.Tensor:
    own = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    x = torch.nn.functional.conv2d(pixels, own["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([own["class_embedding"].expand(len(x), 1, -1), x], dim=1) + own["positional_embedding"]
    x = layer_norm(x, (WIDTH,), own["ln_pre.weight"], own["ln_pre.bias"])
    x = blocks(own, "transformer.resblocks.", x, causal=False)[:, 0]
    return layer_norm(x, (WIDTH,), own["ln_post.weight"], own["ln_post.bias"]) @ own["proj"]


@pytest.mark.parametrize("layout", ["Long-CLIP", "HiMo-CLIP, a further head", "DeBias-CLIP, text tower apart"])
def test_features_equal_a_plain_implementation(layout, small, tmp_path, caplog):
    name, state = small
    content = dict(state)
    if "head" in layout:
        content |= {"mask_head.weight": torch.zeros(3, 3), "mask_head.bias": torch.zeros(3)}
    if "apart" in layout:
        content = {k if k.startswith(("visual.", "logit")) else f"text.{k}": v for k, v in content.items()}
        content = {"state_dict": {f"module.{k}": v for k, v in content.items()}, "optimizer": {}, "scaler": {}}
    torch.save(content, tmp_path / "w.pt")
    model = training.create_model(name, str(tmp_path / "w.pt")).eval()
    assert ("2 tensors outside the two towers are ignored: mask_head" in caplog.text) == ("head" in layout)
    ids = training.get_tokenizer(name)([" ".join(["dog red"] * 200), "a cat"])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), plain_text(state, ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.encode_image(pixels), plain_image(state, pixels), rtol=1e-5, atol=1e-5)


def test_a_file_of_another_size_is_refused_though_it_has_further_heads(small, tmp_path):
    name, state = small
    torch.save({k: v for k, v in state.items() if k != "visual.proj"} | {"head": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="visual.proj"):
        training.create_model(name, str(tmp_path / "w.pt"))
