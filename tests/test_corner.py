"""Corner tokens by perturbation: which positions a change of one token affects, layer by layer, in both towers."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from training.model.assembly.factory import create_model
from training.model.packing import additive_mask
from training.model.towers.corner import (
    corner_indices,
    cosine_with_cls,
    features_of_captions,
    prefix_attention,
    suffix_attention,
)
from training.model.towers.hf_tower import CornerHFText

FAMILIES = {
    "bert": {"max_position_embeddings": 40, "pad_token_id": 0},
    "roberta": {"max_position_embeddings": 42, "pad_token_id": 1},
    "xlm-roberta": {"max_position_embeddings": 42, "pad_token_id": 1},
    "camembert": {"max_position_embeddings": 42, "pad_token_id": 1},
    "modernbert": {"max_position_embeddings": 64, "pad_token_id": 0, "local_attention": 8},
}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def tower(family="bert", num_corners=2, num_layers=1, context_length=24, **kwargs):
    torch.manual_seed(0)
    fields = SMALL | FAMILIES[family] | {"num_hidden_layers": num_layers}
    if family == "modernbert":
        fields |= {
            "reference_compile": False,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "num_hidden_layers": max(2, num_layers),  # transformers 5.4 to 5.12 refuse a config of one layer
        }
    config = AutoConfig.for_model(family, **fields)
    text = CornerHFText(config, 16, num_corners, context_length, "linear", **kwargs).eval()
    if family == "modernbert":
        text.transformer.layers = text.transformer.layers[:num_layers]
    for name, parameter in text.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return text


def random_ids(text, num_rows=4, length=16, num_padding=5):
    ids = torch.randint(4, 50, (num_rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, 1 : 1 + text.num_corners] = torch.arange(50, 50 + text.num_corners)
    ids[:, length - num_padding :] = text.pad_id
    return ids


def hidden_states(text, ids):
    with torch.no_grad():
        return text.run(ids, prefix_attention(ids != text.pad_id, text.num_corners))


def changed_positions(text, ids, position):
    """Returns the positions whose hidden states change when the token at `position` is replaced."""
    other = ids.clone()
    other[:, position] = torch.where(ids[:, position] == 7, 8, 7)
    before, after = hidden_states(text, ids), hidden_states(text, other)
    return set(((before - after).abs().amax(dim=(0, 2)) > 1e-6).nonzero().flatten().tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_corners", [0, 1, 3])
def test_one_layer_follows_the_attention_rule(family, num_corners):
    text = tower(family, num_corners)
    ids = random_ids(text)
    words = range(num_corners + 1, 11)
    everyone = set(range(11))
    for word in words:  # all tokens attend to every word; so does padding, whose output is not used
        assert changed_positions(text, ids, word) & everyone == everyone
    for corner in range(1, num_corners + 1):  # only the corner attends to itself
        assert changed_positions(text, ids, corner) == {corner}
    assert changed_positions(text, ids, 0) & everyone == {0, *words}  # [CLS] and the text attend to [CLS]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    text = tower(family, num_layers=4)
    ids = random_ids(text)
    with torch.no_grad():
        whole, trimmed = text.all_features(ids), text.all_features(ids[:, :11])
    torch.testing.assert_close(whole, trimmed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_corners_it_is_the_hugging_face_model(family):
    text = tower(family, num_corners=0, num_layers=4, pooler_type="cls_last_hidden_state_pooler")
    ids = random_ids(text)
    keep = ids != text.pad_id
    pair = tower(family, num_corners=0, num_layers=4, pooler_type="cls_last_hidden_state_pooler").transformer
    with torch.no_grad():
        expected = pair(input_ids=ids, attention_mask=keep.long()).last_hidden_state
    torch.testing.assert_close(hidden_states(text, ids)[keep], expected[keep], rtol=0, atol=1e-5)


def test_in_bf16_it_computes_what_the_hugging_face_model_computes():
    text = tower("bert", num_corners=0, num_layers=3, pooler_type="cls_last_hidden_state_pooler")
    config = text.transformer.config
    plain = AutoModel.from_config(deepcopy(config), attn_implementation="sdpa", add_pooling_layer=False).eval()
    plain.load_state_dict(text.transformer.state_dict())
    ids = random_ids(text, num_padding=0)
    with torch.autocast("cpu", torch.bfloat16):
        alone = hidden_states(text, ids)
        states = text.run(ids, prefix_attention(ids != text.pad_id, 0))
        expected = plain(input_ids=ids).last_hidden_state
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for model, output in ((text.transformer, states), (plain, expected)):
        (output.float() * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    torch.testing.assert_close(alone, expected, rtol=0, atol=0)
    torch.testing.assert_close(states, expected, rtol=0, atol=0.1)  # with gradients, another kernel than sdpa's
    torch.testing.assert_close(*gradients, rtol=0, atol=5e-2 * float(gradients[1].abs().max()))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9995


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_attention_makes_corners_tokens_like_any_other(family):
    fields = {"num_layers": 2, "pooler_type": "cls_last_hidden_state_pooler"}
    text = tower(family, 2, **fields, corner_attention="ordinary")
    ids = random_ids(text)
    with torch.no_grad():
        stock = text.transformer(input_ids=ids, attention_mask=(ids != text.pad_id).long()).last_hidden_state
        expected = text.proj(stock[:, :3])
        torch.testing.assert_close(text.all_features(ids), expected, rtol=1e-4, atol=1e-5)
        published = tower(family, 2, **fields).all_features(ids)
    assert (published[:, 0] - expected[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_corners", [0, 2])
def test_a_last_layer_for_the_first_positions_alone_changes_nothing(family, num_corners):
    """States and gradients equal those of a last layer over all positions."""
    text = tower(family, num_corners, num_layers=3).double()
    ids = random_ids(text)
    allowed = prefix_attention(ids != text.pad_id, num_corners)
    whole = text.run(ids, allowed)[:, : num_corners + 1]
    first = text.run_buckets([ids], [allowed], num_corners + 1)[0]
    torch.testing.assert_close(first, whole, rtol=0, atol=1e-12)
    gradients = []
    for states in (whole, first):
        text.zero_grad()
        states.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in text.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_it_agrees_with_eager_attention(family):
    text = tower(family, num_layers=4)
    ids, encoder = random_ids(text), text.transformer
    expected = hidden_states(text, ids)
    encoder.set_attn_implementation("eager")
    if family == "bert":
        mask = additive_mask(prefix_attention(ids != text.pad_id, text.num_corners), torch.float32)
        got = encoder.encoder(encoder.embeddings(ids), attention_mask=mask).last_hidden_state
    else:
        got = hidden_states(text, ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooler", ["mean_pooler", "max_pooler"])
def test_mean_and_max_leave_corners_and_padding_out(pooler):
    text = tower(pooler_type=pooler)
    ids = random_ids(text)
    hidden = hidden_states(text, ids)
    words = hidden[:, [0, *range(3, 11)]]
    expected = words.mean(1) if pooler == "mean_pooler" else words.amax(1)
    with torch.no_grad():
        features = text.all_features(ids)
        torch.testing.assert_close(features[:, 0], text.proj(expected), rtol=0, atol=1e-5)
        torch.testing.assert_close(features[:, 1:], text.proj(hidden[:, 1:3]), rtol=0, atol=1e-5)


def test_suffix_rule_equals_a_plain_loop():
    for num_corners in (0, 1, 3):
        end = torch.tensor([5, 11, 4])
        got = suffix_attention(end, 12, num_corners)
        for b in range(3):
            hidden_keys = set(range(int(end[b]) - num_corners, int(end[b]) + 1))
            for query in range(int(end[b]) + 1):
                for key in range(12):
                    expected = query == key or (key < query and key not in hidden_keys)
                    assert bool(got[b, query, key]) == expected, (b, query, key)


def clip_model(num_corners, **kwargs):
    torch.manual_seed(0)
    model = create_model("ViT-S-32-alt", num_corner_tokens=num_corners, context_length=20, **kwargs)
    return model.eval()


def clip_ids(num_corners, length=20):
    ids = torch.zeros(3, length, dtype=torch.int64)
    for row, end in zip(ids, (9, 14, 19)):
        row[:end] = torch.randint(300, 40000, (end,), generator=torch.Generator().manual_seed(end))
        row[0] = 49406
        row[end - num_corners : end] = torch.arange(49408, 49408 + num_corners)
        row[end] = 49407
    return ids


@torch.no_grad()
def test_clip_tower_with_corners():
    import open_clip

    plain = open_clip.create_model("ViT-S-32-alt", force_context_length=20).eval()
    zero, two = clip_model(0), clip_model(2)
    state = plain.state_dict()
    shared = {k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in state.items()}
    zero.load_state_dict(shared)
    two.load_state_dict(shared | {"text.corner_embedding.weight": two.text.corner_embedding.weight})
    ids = clip_ids(0)
    torch.testing.assert_close(zero.encode_text(ids), plain.encode_text(ids), rtol=0, atol=1e-5)

    ids = clip_ids(2)
    before = two.text.all_features(ids)
    assert before.shape == (3, 3, 256)
    two.text.corner_embedding.weight[0].mul_(-3.0)
    after = two.text.all_features(ids)
    moved = (before - after).abs().amax(dim=(0, 2)) > 1e-4
    assert moved.tolist() == [False, True, False]  # [EOT] and the other corner don't attend to the first corner
    ids[0, 12] = 777  # behind the end: no token attends to it
    torch.testing.assert_close(two.text.all_features(ids)[0], after[0], rtol=0, atol=1e-6)
    ids[:, 3] = 777
    assert ((two.text.all_features(ids) - after).abs().amax(dim=2) > 1e-4).all()


def test_features_of_several_captions_by_hand():
    features = torch.arange(2 * 3 * 4).reshape(6, 4, 1)  # 2 images, 3 captions, m = 3
    got = features_of_captions(features.unflatten(0, (2, 3)).unbind(1))[..., 0]
    assert got.tolist() == [[0, 4, 5, 6, 7, 8, 9, 10, 11], [12, 16, 17, 18, 19, 20, 21, 22, 23]]


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_several_captions_of_an_image_are_encoded_one_by_one(kind):
    text = clip_model(2).text if kind == "clip" else tower(kind)
    ids = clip_ids(2) if kind == "clip" else random_ids(text)
    several = ids[: len(ids) // 2 * 2].unflatten(0, (-1, 2))  # [batch, 2, seq_len]
    with torch.no_grad():
        expected = torch.cat([text.all_features(several[:, 0])[:, :1], text.all_features(several[:, 1])], dim=1)
        torch.testing.assert_close(text(several), expected, rtol=1e-5, atol=1e-6)
    assert text.train().training and not text.train(False).training


def test_cosine_of_corners_with_cls_by_a_plain_loop():
    """Four texts: without corners, with three, without, with three."""
    stream = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(5, 1 + 4 + 1 + 4, 7, generator=stream), dim=-1)
    wanted = [float(row[cls] @ row[cls + n]) for row in features for cls in (1, 6) for n in (1, 2, 3)]
    found = cosine_with_cls(features, corner_indices([False, True, False, True], 3))
    assert float(found) == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert corner_indices([True, True], 0) == ([], [])


@pytest.mark.parametrize("kind", ["bert", "modernbert", "clip"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    text = clip_model(2).text if kind == "clip" else tower(kind, num_layers=3)
    ids = clip_ids(2) if kind == "clip" else random_ids(text)
    # In train mode, so that checkpointing is active; without dropout, which would differ between the runs.
    for module in text.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    text.train()
    gradients = []
    for enable in (False, True):
        text.zero_grad()
        text.set_grad_checkpointing(enable)
        text.all_features(ids).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in text.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_compile_equals_eager(kind):
    text = clip_model(2).text if kind == "clip" else tower(kind, num_layers=2)
    ids = clip_ids(2) if kind == "clip" else random_ids(text)
    with torch.no_grad():
        expected = text.all_features(ids)
        got = torch.compile(text.all_features)(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def kept_bytes(run):
    """Returns the bytes that a forward pass keeps for the backward pass; each storage counts once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def test_the_mask_of_clips_tower_is_kept_once_for_all_heads_and_layers():
    kept = {}
    for m in (0, 2):
        model = create_model("ViT-S-32-alt", num_corner_tokens=m)
        ids = clip_ids(m, length=77)
        kept[m] = kept_bytes(lambda: model.text.all_features(ids))  # noqa: B023
    one_mask = ids.numel() * 77 * 4
    heads, layers = model.text.transformer.resblocks[0].attn.num_heads, len(model.text.layers())
    assert heads * layers > 20 and kept[2] - kept[0] < 3 * one_mask


def test_the_masks_of_modernbert_are_kept_once_for_all_layers_under_autocast():
    text = tower("modernbert", num_layers=8).train()
    ids = random_ids(text, num_rows=8, length=24)
    with torch.autocast("cpu", torch.bfloat16):
        ours = kept_bytes(lambda: text.all_features(ids))
        without = kept_bytes(lambda: text.proj(text.transformer(ids)[0][:, :3]))  # no token is padding's: no full mask
    assert ours - without < 2.5 * ids.numel() * 24 * 2
