"""The corner view: attention against the libraries' own, words against the caption, and the command."""

import json

import pytest
import torch
from PIL import Image
from test_corner import random_ids, tower

import training
from training.eval import corner_view
from training.model.packing import additive_mask
from training.model.towers.corner import prefix_attention
from training.model.towers.hf_tower import ATTENTION
from training.model.towers.text_tower import special_attention

CAPTION = "An unbelievably reddish car stands here. Two dogs play on the left side."


def make(name, **overrides):
    torch.manual_seed(0)
    model = training.create_model(name, pretrained_text=False, **overrides).eval()
    return model, training.get_tokenizer(name, **overrides)


def test_bert_attention_equals_transformers_eager_attention():
    model, tokenizer = make("lotlip_tiny")
    ids = tokenizer([CAPTION, "A dog."])
    encoder = model.text.transformer
    seen = []
    encoder.set_attn_implementation("eager")  # so that attention modules return their weights
    layer = encoder.encoder.layer[-1].attention.self
    handle = layer.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    encoder.encoder(encoder.embeddings(ids), attention_mask=additive_mask(prefix_attention(ids != 0, 2), torch.float32))
    handle.remove()
    expected = seen[0].mean(dim=1)[:, :3]
    encoder.set_attn_implementation(ATTENTION)
    got = special_attention(model.text, ids)
    assert got.shape == (2, 3, 128) and torch.allclose(got, expected, atol=1e-6)
    allowed = prefix_attention(ids != 0, 2)[:, :3]
    assert (got[~allowed] == 0).all() and torch.allclose(got.sum(-1), torch.ones(2, 3))
    assert not torch.allclose(special_attention(model.text, ids, 0), got, atol=1e-3)


def test_modernbert_attention_equals_transformers_eager_attention():
    text = tower("modernbert", num_layers=3)
    ids = random_ids(text)
    got = special_attention(text, ids)
    seen = []
    text.transformer.set_attn_implementation("eager")
    handle = text.layers()[-1].attn.register_forward_hook(lambda _, args, output: seen.append(output[1]))
    text.all_features(ids)
    handle.remove()
    torch.testing.assert_close(got, seen[0].mean(dim=1)[:, :3], rtol=0, atol=1e-6)


def test_clip_attention_sees_the_text_and_itself_alone():
    model, tokenizer = make("ViT-S-32-alt", num_corner_tokens=2)
    ids = tokenizer([CAPTION, "A dog."])
    got = special_attention(model.text, ids)
    assert got.shape[:2] == (2, 3) and torch.allclose(got.sum(-1), torch.ones(2, 3), atol=1e-5)
    end = (ids == tokenizer.tokenizer.eot_token_id).int().argmax(dim=1)
    for caption, position in enumerate(end.tolist()):
        for token, own in enumerate((position, position - 2, position - 1)):  # [EOT], then the corners before it
            seen = set(got[caption, token].nonzero().flatten().tolist())
            assert seen == {*range(position - 2), own}


def test_words_are_those_of_the_caption():
    expected = CAPTION.lower().replace(".", " .").split()
    _, tokenizer = make("lotlip_tiny")
    words = tokenizer.words(tokenizer([CAPTION])[0].tolist())
    # The full stop between sentences is a [SEP] token; the pieces of a rare word are joined to one word.
    assert [word for word, _ in words] == [w for n, w in enumerate(expected) if w != "." or n == len(expected) - 1]
    assert any(len(positions) > 1 for _, positions in words)
    _, tokenizer = make("ViT-S-32-alt", num_corner_tokens=2)
    ids = tokenizer([CAPTION])[0].tolist()
    words = tokenizer.words(ids)
    assert [word for word, _ in words] == expected
    positions = [p for _, own in words for p in own]
    assert positions == list(range(1, ids.index(tokenizer.tokenizer.eot_token_id) - 2))


def test_the_command_writes_a_figure_and_its_numbers(tmp_path, capsys):
    argv = [CAPTION + " It costs $5 or $6.", "--model", "lotlip_tiny", "--out", str(tmp_path / "c.png")]
    assert corner_view.main(argv) == 0
    assert "UNTRAINED" in capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["tokens"] == ["[CLS]", "corner 0", "corner 1"] and len(found["words"]) == len(found["attention"][0])
    for share, elsewhere in zip(found["attention"], found["elsewhere"]):
        assert sum(share) + elsewhere == pytest.approx(1)
    similarity = torch.tensor(found["similarity"])
    assert torch.allclose(similarity.diag(), torch.ones(3)) and torch.equal(similarity, similarity.T)
    assert Image.open(tmp_path / "c.png").width > 1000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "ViT-S-32-alt"], "--num-corner-tokens 2"),
        (["--model", "lotlip_tiny", "--layer", "9"], "--layer 9"),
        (["--model", "lotlip_tiny", "--out", "x.jpeg"], "expected .png"),
        (["--model", "lotlip_tinny"], "lotlip_tiny"),
    ],
)
def test_usage_errors_exit_2(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        corner_view.main(["A dog.", *flags])
    assert stop.value.code == 2 and said in capsys.readouterr().err
