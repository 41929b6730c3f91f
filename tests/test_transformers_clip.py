"""CLIP and SigLIP of transformers with --model hf:FOLDER: the same features, ids and pixels as in transformers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import training
from support import read_results
from training.main import main
from training.model.tokenizers import count_tokens

TEXTS = ["A small red star, at the top left.", "a large blue ring " * 60, "gray", "3.5 &amp; caf\u00e9"]
SMALL = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}


def widen(model: torch.nn.Module) -> None:
    """Sets random weights, biases and norms, so that a swapped or forgotten tensor changes the output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                norm = "norm" in name and name.endswith("weight")
                parameter.normal_(1.0 if norm else 0.0, 0.2)


def clip_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with CLIP's vocabulary, from open_clip's file."""
    from open_clip import SimpleTokenizer

    own = SimpleTokenizer()
    merges = [pair for pair, _ in sorted(own.bpe_ranks.items(), key=lambda item: item[1])]
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    CLIPTokenizer(vocab={ends.get(word, word): n for word, n in own.encoder.items()}, merges=merges).save_pretrained(
        folder
    )


def word_tokenizer(folder: Path, side: str) -> None:
    words = ["<pad>", "<unk>", "</s>", *"a small red star at the top left large blue ring gray".split()]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": side}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def save_clip(folder: Path, positions: int, act: str, sharded: bool = False, **text: object) -> CLIPModel:
    vision = SMALL | {"image_size": 32, "patch_size": 8, "hidden_act": act, "layer_norm_eps": 1e-4}
    text = SMALL | {"max_position_embeddings": positions, "hidden_act": act, "vocab_size": 49408} | text
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    widen(model)
    model.save_pretrained(folder, max_shard_size="2MB" if sharded else "1GB")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    clip_tokenizer(folder)
    return model


def save_siglip(folder: Path, act: str, side: str = "right", image_size: int = 32) -> SiglipModel:
    vision = SMALL | {"image_size": image_size, "patch_size": 8, "hidden_act": act}
    text = SMALL | {"max_position_embeddings": 16, "vocab_size": 20, "hidden_act": act}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    widen(model)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    word_tokenizer(folder, side)
    return model


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    # 32 x 35: transformers rounds the offset of the crop down, torchvision up.
    sizes = [(32, 35), (80, 33), (35, 32), (64, 64)]
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes] + [
        Image.fromarray(generator.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA")
    ]


CASES = {
    "clip, 77": lambda folder: save_clip(folder, 77, "quick_gelu"),
    "clip, 248 positions, gelu, eos 2, shards": lambda folder: save_clip(folder, 248, "gelu", True, eos_token_id=2),
    "clip, more words behind [EOT]": lambda folder: save_clip(folder, 77, "gelu", vocab_size=49500),
    "siglip": lambda folder: save_siglip(folder, "gelu_pytorch_tanh"),
    "siglip, exact gelu, padding in front": lambda folder: save_siglip(folder, "gelu", "left", 40),
}


@pytest.mark.parametrize("case", CASES)
def test_features_equal_those_of_transformers(case, tmp_path):
    theirs = CASES[case](tmp_path)
    name = f"hf:{tmp_path}"
    ours, _, transform = training.create_model_and_transforms(name)
    ours.eval()
    tokenizer = training.get_tokenizer(name)
    siglip = isinstance(theirs, SiglipModel)
    processor = (SiglipImageProcessorPil if siglip else CLIPImageProcessorPil).from_pretrained(tmp_path)
    their_tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(tmp_path) if siglip else CLIPTokenizer.from_pretrained(tmp_path)
    )
    length = theirs.config.text_config.max_position_embeddings
    rows = their_tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids = tokenizer(TEXTS)
    assert torch.equal(ids, rows.input_ids) and ids.shape == (len(TEXTS), length)
    assert min(count_tokens(tokenizer, TEXTS)) >= 2 and max(count_tokens(tokenizer, TEXTS)) > 240
    pixels = processor([image.convert("RGB") for image in images()], return_tensors="pt").pixel_values
    own_pixels = torch.stack([transform(image) for image in images()])
    torch.testing.assert_close(own_pixels, pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = theirs.get_image_features(pixel_values=pixels), theirs.get_text_features(input_ids=rows.input_ids)
        for got, output in zip((ours.encode_image(own_pixels), ours.encode_text(ids)), expected):
            reference = getattr(output, "pooler_output", output)
            assert reference.std() > 0.05
            torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.logit_scale.reshape([]), theirs.logit_scale.reshape([]))
        if siglip:
            torch.testing.assert_close(ours.logit_bias.reshape([]), theirs.logit_bias.reshape([]))


def test_a_folder_of_transformers_is_evaluated_trained_and_given_corners(scenes, tmp_path):
    save_clip(tmp_path / "clip", 77, "gelu")
    flags = ["--model", f"hf:{tmp_path / 'clip'}", "--logs", str(tmp_path), "--workers", "0", "--device", "cpu"]
    data = f"--urban1k-retrieval={scenes / 'urban1k'}"
    assert main([data, *flags, "--name", "e"]) == 0
    assert len(read_results(tmp_path, "e")["weights_sha256"]) == 64
    train = ["--train-data", str(scenes / "train"), "--batch-size", "20", "--epochs", "1", "--num-long-captions", "2"]
    corners = ["--num-corner-tokens", "2", "--context-length", "128"]
    assert main([*train, *corners, *flags, "--name", "t"]) == 0
    checkpoint = str(tmp_path / "t" / "checkpoints" / "epoch_1.pt")
    assert main([data, *corners, *flags, "--pretrained", checkpoint, "--name", "r"]) == 0
    weights = str(tmp_path / "clip" / "model.safetensors")  # also by hand, for an architecture with another name
    model = training.create_model(flags[1], weights)
    assert model.visual.conv1.weight.shape == (48, 3, 8, 8)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.json"),
        ({"model_type": "jina_clip", "auto_map": {"AutoModel": "x"}}, "never run.*--features"),
        ({"model_type": "siglip2"}, "fixed-resolution"),
        ({"model_type": "bert"}, "model_type bert is not supported"),
        (["clip"], "config.json: expected a JSON object, found list"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "different activations"),
    ],
)
def test_folders_that_cannot_be_converted_are_refused(config, said, scenes, tmp_path, capsys):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    argv = [f"--urban1k-retrieval={scenes / 'urban1k'}", "--model", f"hf:{tmp_path}", "--logs", str(tmp_path / "l")]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and re.search(said, err)
