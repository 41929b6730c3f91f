"""Captions in buckets against padded captions: the same features, gradients and trainings."""

import itertools

import pytest
import torch
from test_corner import tower
from test_train import SMALL, losses, read_metrics

from training.data.reader import trim_padding
from training.main import main
from training.model.assembly.from_flags import make_arranger
from training.model.packing import CaptionArranger, additive_mask, attention, bucket_bounds, caption_lengths
from training.model.tokenizers import CornerCLIPTokenizer
from training.model.towers.corner import prefix_attention
from training.model.towers.encoders import text_encoder
from training.model.towers.train_model import TrainModel

CPU = torch.device("cpu")
PAD_ID = 7  # not the number with which torch pads


def draw(text, num, length, shortest, seed):
    """Draws token ids [num, length] of captions with random lengths, padded."""
    stream = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (num, length), generator=stream)
    ids[:, 1 : 1 + text.num_corners] = torch.arange(50, 50 + text.num_corners)
    lengths = torch.randint(shortest, length + 1, (num,), generator=stream)
    return ids.masked_fill(torch.arange(length) >= lengths[:, None], text.pad_id)


def batch(text, num=6, num_long=3):
    return draw(text, num, 12, 5, seed=1), draw(text, num * num_long, 24, 7, seed=2).unflatten(0, (num, num_long))


def gradients(text, features):
    text.zero_grad()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    (features * weights).sum().backward()
    return {name: p.grad.clone() for name, p in text.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("pooler", [None, "mean_pooler", "max_pooler"])
def test_features_and_gradients_equal_the_padded_ones(family, pooler):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        text = tower(family, num_layers=3, pooler_type=pooler).to(dtype)
        short, long = batch(text)
        padded = torch.cat([text.all_features(short), text.all_features(long.flatten(0, 1))])
        expected = gradients(text, padded)
        features = text_encoder(text).packed_features(make_arranger(text, "buckets", CPU)(short, long))
        torch.testing.assert_close(features, padded, rtol=0, atol=tolerance)
        got = gradients(text, features)
        assert got.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_all_buckets_are_computed_together(family):
    """Also where padding's id occurs within a caption, as it does where a text names the token."""
    text = tower(family, num_layers=3).double()
    short, long = batch(text)
    long[0, 0, 4] = text.pad_id
    captions = make_arranger(text, "buckets", CPU)(short, long)
    apart = torch.cat([text.all_features(ids) for ids in captions.buckets])
    expected = gradients(text, apart)
    shapes = []
    for part in (text.transformer.embeddings, text.transformer.encoder.layer[1]):
        part.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[:2])))
    together = text.bucket_features(captions.buckets)
    assert len(captions.buckets) > 3 and shapes == [(1, captions.num_padded)] * 2
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    got = gradients(text, together)
    assert got.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-12 * largest, msg=name)


def test_attention_in_16_bits_is_that_of_fp64():
    query, key, value = (rows.requires_grad_() for rows in torch.randn(3, 4, 2, 9, 16).bfloat16())
    mask = additive_mask(prefix_attention(torch.arange(9) < torch.tensor([9, 5, 7, 4])[:, None], 2), torch.bfloat16)
    weights = torch.randn(4, 2, 9, 16)
    exact = [rows.detach().double().requires_grad_() for rows in (query, key, value)]
    scores = exact[0] @ exact[1].transpose(-1, -2) / 4 + mask.double()
    expected = scores.softmax(dim=-1) @ exact[2]
    got = attention(query, key, value, mask, dropout=0.0)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-2)
    for rows, true in zip((query, key, value), exact):
        torch.testing.assert_close(rows.grad.double(), true.grad, rtol=0, atol=3e-2 * float(true.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_dropout_removes_weights_and_scales_the_rest(dtype):
    query, key = torch.randn(2, 8, 4, 32, 16).to(dtype)
    value = torch.eye(32, dtype=dtype).expand(8, 4, 32, 32)  # the output is the weights themselves
    mask = torch.zeros(8, 1, 32, 32, dtype=dtype)
    weights, dropped = (attention(query, key, value, mask, dropout).double() for dropout in (0.0, 0.25))
    kept = dropped != 0
    assert 0.72 < float(kept.double().mean()) < 0.78
    torch.testing.assert_close(
        dropped[kept], weights[kept] / 0.75, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )


def test_buckets_are_the_cheapest_there_are():
    lengths = [5, 5, 6, 9, 9, 14, 20, 21]
    for cost in (0, 3, 10, 100):
        totals = {}
        for count in range(len(lengths)):
            for cuts in itertools.combinations(range(1, len(lengths)), count):
                ends = [*cuts, len(lengths)]
                starts = [0, *cuts]
                totals[tuple(ends)] = sum((e - s) * lengths[e - 1] + cost for s, e in zip(starts, ends))
        got = tuple(bucket_bounds(lengths, cost))
        assert totals[got] == min(totals.values()), cost


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("cost", [0, 20, 10_000])
def test_each_caption_is_in_a_bucket_padded_with_the_padding_id(multiple, cost):
    short, long = draw_lengths([1, 3, 9, 0], 9), draw_lengths([20, 11, 2, 17, 8, 8, 1, 9], 20).unflatten(0, (4, 2))
    captions = CaptionArranger(PAD_ID, cost, multiple)(short, long)
    rows = [row for bucket in captions.buckets for row in bucket]
    for caption, index in zip([*short, *long.flatten(0, 1)], captions.index.tolist()):
        words = caption[caption != PAD_ID]
        row = rows[index]
        assert row[: len(words)].equal(words) and (row[len(words) :] == PAD_ID).all()
        assert len(row) % multiple == 0 or len(row) == 20
    assert captions.num_padded == sum(map(len, rows))
    if not cost and multiple == 1:  # nothing is padded; an empty caption counts as one token
        assert captions.num_padded == 1 + 3 + 9 + 1 + 20 + 11 + 2 + 17 + 8 + 8 + 1 + 9


def draw_lengths(lengths, longest):
    ids = torch.arange(10, 10 + longest).expand(len(lengths), -1)
    return ids.masked_fill(torch.arange(longest) >= torch.tensor(lengths)[:, None], PAD_ID)


def test_captions_go_to_a_device_as_they_are():
    captions = CaptionArranger(PAD_ID)(draw_lengths([4, 2, 4], 6))
    sent = captions.to(torch.device("meta"))
    assert [ids.shape for ids in sent.buckets] == [ids.shape for ids in captions.buckets]
    assert {ids.device.type for ids in (*sent.buckets, sent.index)} == {"meta"}
    assert sent.index.shape == (3,) and sent.num_padded == captions.num_padded
    same = captions.to(CPU)
    assert all(map(torch.equal, same.buckets, captions.buckets)) and same.index.equal(captions.index)
    assert caption_lengths(sent.buckets[0], PAD_ID).device.type == "meta"


def reference_mix(num_images, num_long, seed):
    """Draws token ids with the lengths of the published data.

    Raw captions have about 18 tokens, long ones about 110 after truncation to 128."""
    stream = torch.Generator().manual_seed(seed)
    short = (18 + 5 * torch.randn(num_images, generator=stream)).clamp(6, 40).long()
    long = (121 + 40 * torch.randn(num_images * num_long, generator=stream)).clamp(20, 128).long()
    assert abs(float(long.float().mean()) - 110) < 3
    ids = [(torch.arange(128) < lengths[:, None]).long() for lengths in (short, long)]
    return ids[0], ids[1].unflatten(0, (num_images, num_long)), int(short.sum() + long.sum())


@pytest.mark.parametrize(("num_long", "fewer"), [(1, 1.7), (3, 1.3)])
def test_little_padding_is_computed_on_the_published_mix(num_long, fewer):
    for num_images in (64, 1024):
        for seed in range(3):
            short, long, num_tokens = reference_mix(num_images, num_long, seed)
            captions = CaptionArranger(pad_id=0)(short, long)
            assert 1 - num_tokens / captions.num_padded < 0.05, num_images
            assert (short.numel() + long.numel()) / captions.num_padded >= fewer, num_images


@pytest.mark.parametrize("num_long", [0, 2])
def test_the_training_model_puts_features_where_they_belong(num_long):
    import training

    torch.manual_seed(0)
    model = training.create_model("lotlip_tiny", pretrained_text=False).eval()
    short, long = batch(model.text, num_long=max(1, num_long))
    long = long[:, :num_long]
    images = torch.randn(6, 3, 64, 64)
    whole = TrainModel(model)
    expected = whole(images, short, long if num_long else None)
    got = whole(images, packed_text=make_arranger(model, "buckets", CPU)(short, long))
    assert got["text_features"].shape == expected["text_features"].shape
    torch.testing.assert_close(got["text_features"], expected["text_features"], rtol=0, atol=1e-5)


def test_trainings_are_equal_and_log_the_padding(scenes, tmp_path):
    curves, padding = {}, {}
    for name, flags in {
        "padded": ["--text-packing", "padded"],
        "auto": [],
        "checkpointed": ["--grad-checkpointing"],
        "accumulated": ["--accum-freq", "2", "--batch-size", "20"],
        "bf16": ["--precision", "amp_bf16"],
    }.items():
        argv = [*SMALL, "--train-data", str(scenes / "train"), "--batch-size", "40", "--epochs", "3", "--lr", "1e-4"]
        assert main([*argv, "--logs", str(tmp_path), "--name", name, *flags]) == 0
        lines = [line for line in read_metrics(tmp_path, name) if "train/loss" in line]
        curves[name], padding[name] = losses(lines), lines[0]["train/padding_share"]
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["padded"], rel=2e-2 if name == "bf16" else 1e-4), name
    assert padding["auto"] < 0.05 < padding["padded"]


def test_auto_takes_buckets_on_every_device():
    assert make_arranger(tower(), "auto", CPU).multiple == 1
    assert make_arranger(tower(), "auto", torch.device("cuda")).multiple == 8


def test_exclamation_marks_are_not_padding_for_clip():
    tokenizer = CornerCLIPTokenizer(77, num_corners=2)
    texts = ["wow ! ! ! ! ! !!!?!?!?! ?!?", "one !! \U0001f600!"]
    whole = tokenizer(texts)
    rows = tokenizer(texts, padding=False)
    ids, num_tokens = trim_padding(tokenizer, tokenizer(texts), multiple=1)
    assert num_tokens == sum(map(len, rows)) and ids.shape[1] == max(map(len, rows))
    assert torch.equal(ids, whole[:, : ids.shape[1]])


def test_captions_sorted_by_length_have_the_features_of_unsorted_ones():
    import training
    from training.eval.encode import ComputeOptions, Encoder
    from training.model.assembly.factory import EncoderParts
    from training.runtime.distributed import DistEnv

    torch.manual_seed(0)
    model = training.create_model("lotlip_tiny", pretrained_text=False).eval()
    tokenizer = training.get_tokenizer("lotlip_tiny")
    texts = [" ".join(["a red cube. on it", "two", "birds"] * (1 + 7 * i % 23)) + f" {i}" for i in range(30)]
    widths = {True: [], False: []}
    encoded = {}
    for is_sorted, seen in widths.items():
        hook = model.text.transformer.embeddings.register_forward_hook(lambda *call: seen.append(call[2].shape[:2]))
        options = ComputeOptions(batch_size=8, workers=0, sort_texts=is_sorted)
        encoder = Encoder(EncoderParts(model, None, tokenizer, None), DistEnv(0, 1, CPU), options)
        encoded[is_sorted] = encoder.texts(texts)
        hook.remove()
    torch.testing.assert_close(encoded[True].features, encoded[False].features, rtol=0, atol=1e-5)
    assert torch.equal(encoded[True].lost_tokens, encoded[False].lost_tokens)
    assert set(widths[False]) == {(1, 8 * 128), (1, 6 * 128)} and min(widths[True]) < (1, 8 * 64)
    # features are in the original order of the captions
    alone = torch.nn.functional.normalize(model.encode_text(tokenizer(texts[13])), dim=-1)
    torch.testing.assert_close(encoded[True].features[13:14], alone.detach(), rtol=0, atol=1e-5)
