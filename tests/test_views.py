"""--text-views: lists of texts against plain implementations of the published sampling rules."""

import random
from collections import Counter
from itertools import permutations, product

import open_clip
import pytest
import torch

from training.data.captions import VIEWS, CaptionRule, Kind, choose_captions, parse_views, views_by_flags
from training.data.reader import front_fractions, pad_in_front
from training.flags.parser import parse_args
from training.model.assembly.factory import create_model
from training.model.towers.train_model import TrainModel

LONG = "A dog runs. It is brown. The park is wide. Trees stand there"
S1, S2, S3, S4 = "A dog runs", "It is brown", "The park is wide", "Trees stand there"
RECORD = {"txt": "a dog", "long_caption": LONG}
DRAWS = 6000


def choose(views: str, record: dict = RECORD, seed: int = 0) -> list[str]:
    return choose_captions(
        record, CaptionRule(text_views=views, long_caption_keys=("long_caption", "other")), random.Random(seed)
    )


def frequencies(views: str, record: dict = RECORD, text: int = 0) -> Counter:
    return Counter(choose(views, record, seed)[text] for seed in range(DRAWS))


def assert_distribution(found: Counter, expected: dict[str, float]) -> None:
    """Asserts that each text is drawn with its expected frequency, to five standard deviations, and no other text."""
    assert set(found) == set(expected)
    for text, p in expected.items():
        assert found[text] / DRAWS == pytest.approx(p, abs=5 * (p * (1 - p) / DRAWS) ** 0.5 + 1e-12), text


def joined(*sentences: str) -> str:
    return ". ".join(sentences) + "."


def flair(sentences: list[str]) -> dict[str, float]:
    """FLAIR: m of {1, 2, 3} evenly; m = 1: any sentence; else half m neighbours, half m of them in any order."""
    out: Counter = Counter()
    for m in (1, 2, 3):
        runs = [sentences[i : i + m] for i in range(len(sentences) - m + 1)]
        for run in runs:
            out[joined(*run)] += 1 / 3 / len(runs) / (1 if m == 1 else 2)
        if m > 1:
            orders = list(permutations(sentences, m))
            for order in orders:
                out[joined(*order)] += 1 / 3 / len(orders) / 2
    return dict(out)


def debias(sentences: list[str]) -> dict[str, float]:
    """DeBias-CLIP: without the first sentence; n of {1 .. all} evenly, n of the rest in any order."""
    rest = sentences[1:]
    out: Counter = Counter()
    for n in range(1, len(rest) + 1):
        orders = list(permutations(rest, n))
        for order in orders:
            out[joined(*order)] += 1 / len(rest) / len(orders)
    return dict(out)


def test_sentences_are_drawn_as_flair_and_debias_clip_draw_them():
    assert_distribution(frequencies("sentences(1..3)*8", text=5), flair(["a dog", S1, S2, S3, S4]))
    assert_distribution(frequencies("sentences(1..3, of=long)"), flair([S1, S2, S3, S4]))
    views = "long, sentences(of=long-without-first, any)"
    assert_distribution(frequencies(views, text=1), debias([S1, S2, S3, S4]))
    assert choose(views)[0] == LONG


def test_long_clip_takes_the_long_caption_and_the_part_before_its_first_full_stop_and_space():
    height = {"long_caption": "It is 3.5 m tall. And wide."}
    for record in (RECORD, height, {"long_caption": "No end"}):
        text = record["long_caption"]
        assert choose("long, first-sentence", record) == [text, text.split(". ")[0]]
    assert choose("long-without-first", height) == ["And wide."]
    assert choose("long-without-first", {"long_caption": "No end"}) == ["No end"]


def test_dreamlip_has_the_raw_caption_and_different_sentences():
    pool = ["a dog", S1, S2, S3, S4]
    seen = set()
    for seed in range(300):
        raw, *drawn = choose("raw, sentences(1, distinct)*3", seed=seed)
        assert raw == "a dog" and len(set(drawn)) == 3
        seen.add(tuple(drawn))
    assert seen == {tuple(joined(s) for s in order) for order in permutations(pool, 3)}
    pairs = {text for seed in range(99) for text in choose("sentences(2, ordered, distinct)*4", seed=seed)}
    assert pairs == {joined(a, b) for a, b in zip(pool, pool[1:])}
    assert len(choose("sentences(3, distinct)*9")) == 9  # fewer sentences than texts: with repetitions


def test_one_of_several_views_is_drawn_by_its_share():
    found = frequencies("raw(share=3)|long*2", text=1)
    assert_distribution(found, {"a dog": 0.75, LONG: 0.25})
    assert {tuple(choose("raw|long*2", seed=seed)) for seed in range(60)} == set(product(["a dog", LONG], repeat=2))


def test_each_kind_of_view_begins_with_the_first_long_caption():
    record = {"txt": "a dog", "long_caption": ["One runs. It is big", "Two sleeps. It is small"]}
    for seed in range(20):
        long, first, rest = choose("long, first-sentence, long-without-first", record, seed)
        assert first in long and rest.rstrip(".") in long
        long, first, second = choose("long, first-sentence*2", record, seed)
        assert first in long and second not in long


def test_of_two_raw_captions_each_is_drawn():
    assert set(frequencies("raw", {"txt": None, "caption": ["one", "two"]})) == {"one", "two"}


def test_an_entry_is_named_after_its_views():
    entries = parse_views("raw, short|long(share=2), short|long*2")
    assert [entry.name for entry in entries] == ["raw", "short-or-long-1", "short-or-long-2"]
    with pytest.raises(ValueError, match="'raw.share=0.|long.share=0.': expected a share above 0"):
        parse_views("raw(share=0)|long(share=0)")


def test_a_registered_view_is_drawn_like_the_others():
    VIEWS.register("last-words")(Kind("long", lambda text: text.split()[-1]))
    try:
        assert choose("short, last-words") == ["a dog", "there"]
        assert parse_views("last-words*2")[0].corners is False
        with pytest.raises(ValueError, match="caption view last-words: another one has this name"):
            VIEWS.register("last-words")(Kind("short"))
    finally:
        del VIEWS["last-words"]
    with pytest.raises(ValueError, match="expected one of raw, short, long, first-sentence, long-without-first, sent"):
        parse_views("last-words")


def test_views_of_the_same_kind_take_different_long_captions():
    record = RECORD | {"other": "B. C"}
    for seed in range(20):
        first, second, third = choose("long, raw, long", record, seed)
        assert {first, third} == {LONG, "B. C"} and second == "a dog"
        whole, rest = choose("long, long-without-first", record, seed)
        assert rest == whole.partition(". ")[2]  # parts of the same caption
    # Without long captions, the short one replaces them.
    assert choose("long*2, sentences(2, of=long), first-sentence", {"txt": "a dog"}) == ["a dog"] * 4
    two = {"txt": "A dog. A cat"}
    assert set(choose("sentences(1, distinct, of=long)*2", two)) == {"A dog.", "A cat."}
    three = RECORD | {"long_caption": ["A", "B", "C"], "other": []}
    rule = CaptionRule(text_views="long*3", long_caption_keys=("long_caption",), caption_lists="alternatives")
    assert {frozenset(choose_captions(three, rule, random.Random(s))) for s in range(9)} == {frozenset("ABC")}


@pytest.mark.parametrize(
    ("flags", "views"),
    [
        (("both", 3, 0), "short, long*3"),
        (("both", 2, 4), "short, sentences(4, ordered, of=long)*2"),
        (("raw", 3, 0), "short"),
        (("long", 1, 0), "long(corners=no)"),
        (("long", 2, 0), "long(corners=no), long"),
        (("long", 2, 3), "sentences(3, ordered, of=long, corners=no), sentences(3, ordered, of=long)"),
        (("long", 3, 0), "long(corners=no), long*2"),
    ],
)
def test_flags_are_equivalent_to_lists(flags, views):
    assert parse_views(views_by_flags(*flags)) == parse_views(views)
    captions, num_long, sentences = flags
    by_flags = CaptionRule(captions=captions, num_long_captions=num_long, sub_caption_sentences=sentences)
    assert [choose_captions(RECORD, by_flags, random.Random(s)) for s in range(30)] == [
        choose_captions(RECORD, CaptionRule(text_views=views), random.Random(s)) for s in range(30)
    ]


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ("rwa", "expected one of raw, short, long"),
        ("raw,", "expected one of raw"),
        ("long*0", "at least 1 after *"),
        ("long(of=raw)", "long(of=raw): not understood"),
        ("sentences(3..1)", "expected 1 <= first <= last"),
        ("sentences(0)", "expected 1 <= first"),
        ("sentences(1..3, distinct)*4", "needs one number of sentences"),
        ("raw(share=2)", "needs several views"),
        ("raw(weight=-1)", "not understood"),
        ("raw(corners=perhaps)", "not understood"),
    ],
)
def test_a_wrong_list_is_a_usage_error(views, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--train-data", "d.tar", "--text-views", views])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and said in message and "--text-views" in message


def test_options_of_views_are_parsed():
    entries = parse_views("raw, sentences(2..all, weight=0.1, pad=front, corners=no)*4, long")
    assert [(e.name, e.count, e.weight, e.corners, e.front) for e in entries] == [
        ("raw", 1, 1.0, False, False),
        ("sentences", 4, 0.1, False, True),
        ("long", 1, 1.0, True, False),
    ]
    assert (entries[1].views[0].least, entries[1].views[0].most) == (2, None)
    assert [entry.name for entry in parse_views("long, raw, long")] == ["long-1", "raw", "long-2"]


def test_padding_in_front_is_uniform_and_keeps_every_token():
    ids = open_clip.get_tokenizer("ViT-B-32", context_length=12)(
        ["a dog", "a large brown dog in the park", "", "x " * 30]
    )
    full = ids.ne(0).sum(1)
    seen = [Counter() for _ in ids]
    rule = CaptionRule(text_views="raw(pad=front)")
    keys = [f"k{i}" for i in range(len(ids))]
    for epoch in range(2000):
        shares = [front_fractions(f"0/{epoch}/{key}", rule)[0] for key in keys]
        for row, new, length, counter in zip(ids, pad_in_front(ids, shares), full, seen):
            front = int(new[1:].ne(0).int().argmax())
            expected = torch.zeros_like(row)
            expected[0] = row[0]
            expected[1 + front : front + length] = row[1:length]
            assert torch.equal(new, expected)
            counter[front] += 1
    for counter, length in zip(seen, full.tolist()):
        free = ids.shape[1] - length
        assert set(counter) == set(range(free + 1))
        assert all(n / 2000 == pytest.approx(1 / (free + 1), abs=0.05) for n in counter.values())
    assert front_fractions("0/0/k0", CaptionRule(text_views="raw, long(pad=front)"))[0] == 0


def test_corners_give_features_where_the_list_says_so():
    torch.manual_seed(0)
    model = create_model("lotlip_tiny").eval()
    images, ids = torch.randn(2, 64), torch.randint(5, 900, (2, 4, 16))
    ids[:, :, 0], ids[:, :, 15] = 101, 102
    each = [torch.nn.functional.normalize(model.text.all_features(ids[:, k]), dim=-1) for k in range(4)]
    for corners in ((False, True, True, True), (True, False, True, False), (False, False, False, False)):
        expected = torch.cat([text if own else text[:, :1] for text, own in zip(each, corners)], dim=1)
        output = TrainModel(model, corners=corners)(None, ids[:, 0], ids[:, 1:], image_features=images)
        torch.testing.assert_close(output["text_features"], expected)
