"""Stock models without padding: features, gradients and trainings equal those of open_clip's forward pass."""

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from test_corner import clip_model, random_ids, tower
from test_packing import CPU
from test_train import losses, read_metrics
from transformers import AutoConfig

from training.eval.encode import ComputeOptions, Encoder
from training.main import main
from training.model.assembly.factory import EncoderParts
from training.model.assembly.from_flags import make_arranger
from training.model.towers.encoders import image_encoder, text_encoder
from training.model.towers.train_model import TrainModel
from training.runtime.distributed import DistEnv

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CAUSAL = {
    "CLIP": (open_clip.CLIP, {}),
    "custom text": (open_clip.CustomTextCLIP, {}),
    "end by id": (open_clip.CustomTextCLIP, {"pool_type": "eos", "eos_id": 49407, "proj_bias": True}),
}
TEXTS = ["a dog", "! ! !! a red cube, and ! beside it !", "birds " * 30, "x " * 100, ""]


def stock(kind, **more):
    torch.manual_seed(0)
    model_class, options = CAUSAL[kind] if kind in CAUSAL else (open_clip.CustomTextCLIP, {})
    model = model_class(16, VISION, TEXT | options | more).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "token" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def hugging_face(family, pooler):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(family, vocab_size=50, max_position_embeddings=90, **sizes)
    model = stock("CLIP")
    model.text = HFTextEncoder("", 16, config, pooler, "linear")
    model.encode_text = lambda ids: model.text(ids)
    return model.eval()


def check_equal(model, ids):
    """Compares packed captions with padded ones; gradients are compared relative to the largest."""
    results = []
    weights = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(1))
    captions = make_arranger(model, "auto", CPU)(ids)
    assert captions.num_padded < ids.numel() / 1.5
    for encode in (lambda: model.encode_text(ids), lambda: text_encoder(model).packed_features(captions)[:, 0]):
        model.zero_grad()
        features = encode()
        (features * weights).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((features.detach(), grads))
    (expected, grads), (got, got_grads) = results
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert got_grads.keys() == grads.keys() and grads
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=0, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_towers_give_the_same_without_padding(kind):
    check_equal(stock(kind), open_clip.SimpleTokenizer(context_length=77)(TEXTS))


@pytest.mark.parametrize(("family", "pooler"), [("bert", "cls_pooler"), ("roberta", "mean_pooler")])
def test_hugging_face_towers_give_the_same_without_padding(family, pooler):
    model = hugging_face(family, pooler)
    ids = torch.randint(4, 50, (6, 77), generator=torch.Generator().manual_seed(0))
    for row, length in zip(ids, (3, 77, 20, 21, 5, 9)):
        row[length:] = model.text.config.pad_token_id
    check_equal(model, ids)


def test_towers_that_read_padding_get_it():
    siglip = stock("siglip", no_causal_mask=True, pool_type="last", proj_bias=True)
    encoder = text_encoder(siglip)
    ids = open_clip.SimpleTokenizer(context_length=77)(TEXTS)
    assert encoder.pad_id is None and make_arranger(siglip, "auto", CPU) is None
    assert torch.equal(encoder(ids), siglip.encode_text(ids))
    with pytest.raises(ValueError, match="--text-packing buckets: this model's text tower attends to padding"):
        make_arranger(siglip, "buckets", CPU)
    for more in ({"pool_type": "eos", "eos_id": 0}, {"pool_type": "last"}, {"embed_cls": True}):
        assert text_encoder(stock("custom text", **more)).pad_id is None


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_padding_id_within_a_caption_changes_nothing(family):
    """A tokenizer reads "[PAD]" in a text as the padding token: in the middle, at the end, several times."""
    text = tower(family, num_layers=3)
    ids = random_ids(text, num_rows=5)
    for row, places in enumerate(([5], [10], [9, 10], [4, 6, 7])):
        ids[row, places] = text.pad_id
    padded = text.all_features(ids)
    packed = text_encoder(text).packed_features(make_arranger(text, "buckets", CPU)(ids))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_corners", [0, 2])
def test_clips_tower_with_corner_tokens_is_packed_too(num_corners):
    from training.model.tokenizers import CornerCLIPTokenizer

    model = clip_model(num_corners)
    ids = CornerCLIPTokenizer(20, num_corners)(TEXTS)
    arrange = make_arranger(model, "auto", CPU)
    captions = arrange(ids[:, None][:, 0], ids[:, None])
    both = text_encoder(model).packed_features(captions)
    expected = model.text.all_features(ids)
    for part in both.split(len(TEXTS)):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)
    output = TrainModel(model)(torch.randn(5, 3, 224, 224), packed_text=captions)
    assert output["text_features"].shape == (5, 2 + num_corners, 256)


def test_training_a_stock_model_computes_little_padding(scenes, tmp_path, tiny_clip):
    curves, padding = {}, {}
    for mode in ("padded", "auto"):
        argv = ["--model", tiny_clip, "--train-data", str(scenes / "train"), "--captions", "raw", "--workers", "0"]
        argv += ["--batch-size", "20", "--epochs", "1", "--lr", "1e-3", "--warmup", "0", "--log-every-n-steps", "1"]
        assert main([*argv, "--logs", str(tmp_path), "--name", mode, "--text-packing", mode]) == 0
        lines = [line for line in read_metrics(tmp_path, mode) if "train/loss" in line]
        curves[mode], padding[mode] = losses(lines), lines[0]["train/padding_share"]
    assert curves["auto"] == pytest.approx(curves["padded"], rel=1e-4)
    assert padding["auto"] < 0.15 < 0.6 < padding["padded"]


def test_evaluating_a_stock_model_computes_little_padding():
    model, tokenizer = stock("CLIP"), open_clip.SimpleTokenizer(context_length=77)
    widths = []
    hook = model.transformer.register_forward_hook(lambda *call: widths.append(call[2].shape[1]))
    options = ComputeOptions(batch_size=1, workers=0)
    encoder = Encoder(EncoderParts(model, None, tokenizer, None), DistEnv(0, 1, CPU), options)
    encoded = encoder.texts(TEXTS).features
    hook.remove()
    assert max(widths) == 77 and min(widths) == 2  # the start and end of an empty caption
    expected = torch.nn.functional.normalize(model.encode_text(tokenizer(TEXTS)), dim=-1)
    torch.testing.assert_close(encoded, expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "num_tokens"), [({}, 1), ({"pool_type": "avg"}, 5), ({"attentional_pool": True}, 5), ({"layers": 1}, 5)]
)
def test_an_image_is_encoded_as_open_clip_does_with_one_token_in_the_last_block(change, num_tokens):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 3, "ls_init_value": 0.5}
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision | change, text).eval()
    pixels, seen = torch.randn(11, 3, 32, 32), []
    with torch.no_grad():
        expected = model.encode_image(pixels)
        model.visual.transformer.resblocks[-1].mlp.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
        found = image_encoder(model)(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert set(seen) == {num_tokens}
