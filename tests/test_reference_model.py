"""Our models against recorded outputs of the published system: ids, masks, features, end-to-end recall."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from support import LAYOUTS, REFERENCE, layout_flags, read_results
from training.main import main
from training.model.assembly.factory import create_model, create_model_and_transforms, get_tokenizer
from training.model.tokenizers import CornerHFTokenizer
from training.model.towers.corner import prefix_attention

IDS = np.load(REFERENCE / "tokens.npz")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OUTPUTS = np.load(REFERENCE / "model_outputs.npz")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, minilm_folder):
    """Returns (name of the reference model's config, weights file, cache folder with its BERT)."""
    root = tmp_path_factory.mktemp("reference")
    bert = root / "cache" / "bert-base-uncased"
    shutil.copytree(minilm_folder, bert, ignore=shutil.ignore_patterns("*.safetensors", "1_Pooling"))
    shutil.copy(REFERENCE / "bert_config.json", bert / "config.json")
    (root / "model").mkdir()
    config = {"model_cfg": json.loads((REFERENCE / "model_config.json").read_text())}
    (root / "model" / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(seeded_weights(), root / "model" / "model.pt")
    return f"local-dir:{root / 'model'}", root / "model" / "model.pt", str(root / "cache")


def seeded_weights() -> dict[str, torch.Tensor]:
    """Draws the reference model's weights as described in weights_recipe.json."""
    recipe = json.loads((REFERENCE / "weights_recipe.json").read_text())
    generator = torch.Generator().manual_seed(recipe["seed"])
    state = {}
    for name, shape in recipe["parameters"]:
        if name == "logit_scale":
            state[name] = torch.tensor(2.3)
            continue
        r = torch.randn(shape, generator=generator)
        state[name] = 1 + 0.1 * r if "norm" in name.lower() and name.endswith("weight") else 0.12 * r
    return state


@pytest.fixture(scope="module")
def model(reference):
    return create_model(reference[0], cache_dir=reference[2]).eval()


@pytest.mark.parametrize("num_corners", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", ["raw", "norm"])
def test_token_ids_equal(num_corners, kind, minilm_folder):
    name = {"raw": "captions.json", "norm": "captions_normalised.json"}[kind]
    captions = json.loads((REFERENCE / name).read_text())
    before = list(captions)
    tokenizer = CornerHFTokenizer(minilm_folder, context_length=128, num_corners=num_corners)
    ids = tokenizer(captions)
    assert ids.dtype == torch.int64 and captions == before
    np.testing.assert_array_equal(ids.numpy(), IDS[f"bert_m{num_corners}_L128_{kind}"])
    unpadded = tokenizer(captions, padding=False)
    assert [row + [0] * (128 - len(row)) for row in unpadded] == ids.tolist()


def test_masks_equal():
    saved = np.load(REFERENCE / "mask.npz")
    expected = np.unpackbits(saved["may_attend"], axis=-1)[..., :128].astype(bool)
    np.testing.assert_array_equal(prefix_attention(torch.from_numpy(saved["ids"]) != 0, 2).numpy(), expected)


@torch.no_grad()
def test_features_equal(model):
    ids = torch.from_numpy(IDS["bert_m2_L128_norm"])
    close = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(model.encode_text(ids), OUTPUTS["text_cls"], **close)
    np.testing.assert_allclose(model.encode_text(ids, normalize=True), OUTPUTS["text_cls_norm"], **close)
    np.testing.assert_allclose(model.text.all_features(ids), OUTPUTS["all_features"], **close)
    pixels = torch.from_numpy(np.random.RandomState(OUTPUTS["image_seed"]).randn(6, 3, 160, 160).astype("float32"))
    np.testing.assert_allclose(model.encode_image(pixels), OUTPUTS["image"], **close)
    np.testing.assert_allclose(model.encode_image(pixels, normalize=True), OUTPUTS["image_norm"], **close)
    several = torch.stack([torch.stack([ids[r + i] for r in OUTPUTS["multi_rows"][0]]) for i in range(6)])
    np.testing.assert_allclose(model.encode_text(several), OUTPUTS["multi_features"], **close)
    image, text, scale = model(pixels, several)
    np.testing.assert_allclose(image, OUTPUTS["fwd_image"], **close)
    np.testing.assert_allclose(text, OUTPUTS["fwd_text"], **close)
    assert float(scale) == pytest.approx(float(OUTPUTS["fwd_logit_scale"]), rel=1e-6)


def test_every_checkpoint_layout_gives_the_same_weights(reference, model, tmp_path):
    state = torch.load(reference[1], weights_only=True)
    with_prefix = {f"module.{k}": v for k, v in state.items()}
    old = state | {"text.transformer.embeddings.position_ids": torch.arange(512)[None]}
    checkpoint = {"epoch": 3, "name": "run", "state_dict": with_prefix, "optimizer": {"state": {}, "param_groups": []}}
    for name, content in {"bare": state, "prefix": with_prefix, "old": old, "checkpoint": checkpoint}.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(reference[1].parent / "open_clip_config.json", folder)
        torch.save(content, folder / "model.pt")
        loaded = create_model(f"local-dir:{folder}", cache_dir=reference[2]).state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_retrieval_from_flags_equals_the_model_by_hand(reference, model, tmp_path):
    expected = json.loads((LAYOUTS / "expected.json").read_text())
    _, _, transform = create_model_and_transforms(reference[0], cache_dir=reference[2])
    tokenizer = get_tokenizer(reference[0], cache_dir=reference[2])
    argv = ["--model", reference[0], "--cache-dir", reference[2], "--logs", str(tmp_path), "--name", "run"]
    assert main(layout_flags(LAYOUTS) + argv + ["--workers", "0", "--device", "cpu"]) == 0
    record = read_results(tmp_path, "run")
    for name in ("dci", "iiw", "urban1k"):
        with torch.no_grad():
            image = model.encode_image(
                torch.stack([transform(Image.open(LAYOUTS / r["image"])) for r in expected[name]])
            )
            text = model.encode_text(tokenizer([row["caption"] for row in expected[name]]))
        score = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
        right = torch.arange(len(score))
        assert record[f"{name}-retrieval-i2t-top1"] == pytest.approx(float((score.argmax(1) == right).float().mean()))
        assert record[f"{name}-retrieval-t2i-top1"] == pytest.approx(float((score.argmax(0) == right).float().mean()))


def test_the_full_model_has_every_published_key_and_shape():
    published = json.loads((REFERENCE / "lotlip_bert-ViT-B-16_state_dict.json").read_text())
    published = {k: tuple(v["shape"] if isinstance(v, dict) else v) for k, v in published.items()}
    own = create_model("lotlip_bert-ViT-B-16", pretrained_text=False).state_dict()
    assert {k: tuple(v.shape) for k, v in own.items()} == published


@pytest.mark.parametrize("name", ["vitb16", "lotlip"])
def test_preprocessing_equals_the_published_transforms(name):
    saved = np.load(REFERENCE / "preprocess" / "preprocess.npz")
    paths = sorted((REFERENCE / "preprocess" / "preprocess_images").iterdir())
    model = {"vitb16": "ViT-S-16-alt", "lotlip": "lotlip_minilm-ViT-S-16"}[name]
    _, _, transform = create_model_and_transforms(model, load_weights=False, pretrained_text=False)
    assert len(paths) == 4
    for path in paths:
        pixels = transform(Image.open(path))
        mean, std = {"vitb16": (CLIP_MEAN, CLIP_STD), "lotlip": ((0.5,) * 3, (0.5,) * 3)}[name]
        back = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        expected = saved[f"{path.stem}_{name}_u8"]
        expected = expected if expected.shape[0] == 3 else expected.transpose(2, 0, 1)
        np.testing.assert_allclose((back * 255).round().numpy(), expected, atol=0.5)
