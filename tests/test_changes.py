"""Changes of captions and measures of sentences by hand, and the store of features by content."""

import pytest
import torch

from training.eval.caches import FeatureStore
from training.eval.changes import short_query, wrong_sentence
from training.eval.diagnostics import half_truths
from training.eval.encode import Encoding


def test_half_truths_by_hand():
    first = [(0.5, 0.3, False), (0.2, 0.3, False), (0.4, 0.4, False), (0.1, 0.1, True)]
    whole = [(0.9, 0.5, False)] * 4
    found = half_truths([*([a, b] for a, b in zip(first, whole)), []], torch.arange(5))
    one = found["after the first sentence"]
    assert one["score"] == pytest.approx(1 / 3) and one["margin"] == pytest.approx((0.2 - 0.1 + 0) / 3)
    assert (one["captions"], one["left_out"], one["tied"], one["tied_by_cut"]) == (3, 2, 2, 1)
    assert found["after the whole caption"]["score"] == 1 and found["after the whole caption"]["captions"] == 4


def test_a_wrong_sentence_is_of_another_image():
    captions = ["A cat sits. It is red", "A cat sits. It sleeps", "A dog. It runs", "It is red"]
    owner = [0, 0, 1, 2]
    drawn = {wrong_sentence(captions, owner, 0, seed) for seed in range(50)}
    assert drawn == {"A dog", "It runs"}  # not of its own image, and not one that the caption has, too
    assert wrong_sentence(captions[:2], owner[:2], 0, 0) is None


def test_a_short_query_is_a_run_of_words_of_one_sentence():
    sentences = ["one two three four five", "six seven"]
    drawn = {short_query(sentences, seed, 4)[0] for seed in range(30)}
    assert drawn == {"one two three four", "two three four five"}
    assert {short_query(sentences, seed, 2)[0] for seed in range(200)} >= {"one two", "six seven"}
    assert short_query(sentences, 0, 6) == sentences
    assert short_query(sentences, 3, 4) == short_query(sentences, 3, 4)


def test_the_store_encodes_each_content_once():
    encoded = []

    def encode(items):
        encoded.append(items)
        rows = torch.tensor([[float(ord(item[0]))] for item in items])
        return Encoding(rows, {n: "broken" for n, item in enumerate(items) if item == "z"}, rows[:, 0].long())

    store = FeatureStore(encode)
    first = store(["a", "b", "a"])
    assert first.features[:, 0].tolist() == [97, 98, 97] and first.lost_tokens.tolist() == [97, 98, 97]
    other = store.copy()
    whole = store(["c", "z"])
    assert whole.features[:, 0].tolist() == [99, 122] and whole.broken == {1: "broken"}
    again = store(["z", "b", "c"])
    assert again.features[:, 0].tolist() == [122, 98, 99] and again.broken == {0: "broken"}
    assert store(["x1", "x2"], ["same", "same"]).features[:, 0].tolist() == [120, 120]
    assert other(["b", "c"]).features[:, 0].tolist() == [98, 99]  # the copy has not seen what came later
    assert encoded == [["a", "b"], ["c", "z"], ["x1"], ["c"]] or encoded[2] == ["x2"]
    new = FeatureStore(encode)
    features = new(["p", "q"]).features
    assert features is new._parts[0].features and len(new([]).features) == 0  # one copy of a benchmark's features
