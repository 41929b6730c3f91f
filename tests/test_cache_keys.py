"""Keys of cached features: they hold everything that changes a feature, and caches out of order cost a warning."""

import io
import itertools
import os
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import training
from eval_files import write_image
from training.eval.caches import describe_image_tower, encode_images_once, open_caches
from training.eval.encode import CachedReader, ComputeOptions, Encoder, image_key
from training.model.assembly.factory import EncoderParts
from training.model.weights.fingerprint import fingerprint, probe_images, rounded
from training.readers.images import load_rgb
from training.runtime.distributed import DistEnv
from training.search.index import index_path

ENV = DistEnv(0, 1, torch.device("cpu"))
VISION = {"layers": 2, "width": 128, "head_width": 64, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
# Changes of a config that change no tensor: (quick_gelu, vision_cfg, text_cfg).
CONFIGS = {
    "plain": (False, {}, {}),
    "quick_gelu": (True, {}, {}),
    "head width": (False, {"head_width": 32}, {}),
    "average": (False, {"pool_type": "avg"}, {}),
    "last norm after the pooling": (False, {"final_ln_after_pool": True}, {}),
    "epsilon": (False, {"norm_kwargs": {"eps": 1e-2}}, {}),
    "tanh": (False, {"act_kwargs": {"approximate": "tanh"}}, {}),
    "text heads": (False, {}, {"heads": 4}),
    "text pooling": (False, {}, {"pool_type": "last"}),
    "not causal": (False, {}, {"no_causal_mask": True}),
}


def preprocess(**config) -> object:
    return image_transform_v2(PreprocessCfg(**{"size": 32} | config), is_train=False)


@pytest.fixture(scope="module")
def models() -> dict[str, open_clip.CLIP]:
    torch.manual_seed(0)
    made = {
        name: open_clip.CLIP(32, VISION | vision, TEXT | text, quick_gelu=quick).eval()
        for name, (quick, vision, text) in CONFIGS.items()
    }
    for model in made.values():
        model.load_state_dict(made["plain"].state_dict(), strict=False)  # a mask is a buffer that is not saved
    return made


def encoder(model: open_clip.CLIP, transform: object = None, **options: object) -> Encoder:
    transform = transform or preprocess()
    parts = EncoderParts(model, transform, open_clip.get_tokenizer("ViT-B-32"), transform)
    return Encoder(parts, ENV, ComputeOptions(2, 0, **options))


def test_no_two_configs_with_equal_tensors_share_a_key(models, tmp_path):
    folder = {"feature_cache": str(tmp_path)}
    keys = {name: [c.path for c in open_caches(encoder(model, **folder))] for name, model in models.items()}
    assert keys["plain"] == [c.path for c in open_caches(encoder(models["plain"], **folder))]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 32, 32, generator=generator)
    ids = open_clip.get_tokenizer("ViT-B-32")(["a dog", "two cats on a mat"])
    with torch.no_grad():
        features = {n: (m.encode_image(pixels, True), m.encode_text(ids, True)) for n, m in models.items()}
    for first, second in itertools.combinations(CONFIGS, 2):
        for tower in (0, 1):
            same = torch.equal(features[first][tower], features[second][tower])
            assert (keys[first][tower] == keys[second][tower]) <= same, (first, second, tower)
        assert keys[first] != keys[second]


def test_settings_of_timm_and_transformers_towers_are_part_of_the_key():
    model = training.create_model("lotlip_tiny").eval()
    seen = fingerprint(model)
    for name, part in model.named_modules():
        for setting in ("num_heads", "num_attention_heads", "eps", "pool_type", "global_pool"):
            if isinstance(value := getattr(part, setting, None), (int, float, str)):
                setattr(part, setting, "other" if isinstance(value, str) else value * 2)
                assert fingerprint(model) != seen, (name, setting)
                setattr(part, setting, value)
    assert fingerprint(model) == seen


def test_settings_that_change_no_feature_share_a_key(models):
    model = models["plain"]
    before = fingerprint(model)
    model.set_grad_checkpointing(True)
    model.lock_image_tower()
    assert fingerprint(model) == before
    model.set_grad_checkpointing(False)


def test_what_the_tower_makes_of_a_probe_is_part_of_the_key(models, monkeypatch):
    """Code that no setting shows, such as another version of a library."""
    model = models["plain"]
    before = describe_image_tower(encoder(model))
    embeds = type(model.visual)._embeds
    monkeypatch.setattr(type(model.visual), "_embeds", lambda self, x: embeds(self, x).flip(1))
    after = describe_image_tower(encoder(model))
    assert before["tower"] == after["tower"] and before["probe"] != after["probe"]
    features = torch.nn.functional.normalize(torch.randn(3, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert rounded(features) == rounded(features + 1e-8) != rounded(features.roll(1, 1))


def test_preprocessing_is_part_of_the_key(models, tmp_path, monkeypatch):
    model = models["plain"]
    ways = [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"mean": (0.1, 0.2, 0.3)}, {"size": 32}]
    keys = [index_path(tmp_path, tmp_path, encoder(model, preprocess(**way))) for way in ways]
    assert len(set(keys)) == 4 and keys[0] == keys[4]
    assert index_path(tmp_path, tmp_path, encoder(model, image_decoding="fast")) not in keys

    def turned(*args: object) -> Image.Image:
        return load_rgb(*args).transpose(Image.Transpose.ROTATE_270)

    folder = CachedReader(tmp_path, preprocess(), "exact").folder
    monkeypatch.setattr("training.readers.images.load_rgb", turned)
    assert index_path(tmp_path, tmp_path, encoder(model)) not in keys
    assert CachedReader(tmp_path, preprocess(), "exact").folder != folder
    assert Image.open(io.BytesIO(probe_images()[0])).getexif()[0x0112] == 6


def test_names_that_are_not_utf8_have_keys(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    write_image(tmp_path / "a.jpg", 0).rename(path)
    assert len(image_key(path)) == 32


def spoil(how: str, folder: Path) -> None:
    for path in [*folder.glob("*/*.safetensors"), *folder.glob("*/*/*.npz")]:
        if how == "broken":
            path.write_bytes(path.read_bytes()[:50])
        elif how == "foreign":
            from safetensors.torch import save_file

            save_file({"other": torch.zeros(3)}, path)
        else:  # a folder where the file should be: neither can be read nor replaced, even by root
            path.unlink()
            path.mkdir()
            (path / "occupied").touch()


@pytest.mark.parametrize("how", ["broken", "foreign", "not writable"])
def test_caches_that_cannot_be_used_cost_a_warning(how, models, tmp_path, caplog):
    paths = [write_image(tmp_path / f"{n}.jpg", n) for n in range(3)]

    def features(**cache: str) -> torch.Tensor:
        made = encoder(models["plain"], **cache)
        return encode_images_once(open_caches(made)[0], made, paths).features

    kept, pixels = {"feature_cache": str(tmp_path / "features")}, {"image_cache": str(tmp_path / "pixels")}
    expected = features(**kept)
    spoil(how, tmp_path / "features")
    assert torch.equal(features(**kept), expected) and "--feature-cache" in caplog.text
    assert torch.equal(features(**pixels), expected)
    spoil(how, tmp_path / "pixels")
    caplog.clear()
    assert torch.equal(features(**pixels), expected) and "--image-cache" in caplog.text
