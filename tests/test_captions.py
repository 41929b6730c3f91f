"""Which captions a training step sees: the documented rule, case by case."""

import json
import random
from collections import Counter

import pandas
import pytest

from training.data.captions import MAX_CHARACTERS, CaptionRule, choose_captions, find_captions
from training.prepare.clean import without_cut_sentence
from training.readers.captions import (
    _ASCII_END,
    _END,
    caption_texts,
    first_sentence,
    is_refusal,
    is_terminated,
    is_unicode,
    join_sentences,
    join_split,
    normalise_caption,
    read_record,
    sentence_ends,
    split_caption,
    split_lines,
    split_sentences,
)
from training.readers.faults import BadSample
from training.readers.tables import open_table

RECORD = {
    "raw_caption": " a dog ",
    "caption": "never looked at",
    "longIB_captions": "A dog runs. It is brown.",
    "longSV_captions": ["A brown dog", "It runs on grass.", "", "Is it fast?"],
    "longLLA_captions": "A park.",
    "width": 64,
}
IB, SV, LLA = "A dog runs. It is brown.", "A brown dog. It runs on grass. Is it fast?", "A park."


def choose(record: dict, seed: int = 0, **rule) -> list[str]:
    return choose_captions(record, CaptionRule(**{"caption_lists": "sentences"} | rule), random.Random(seed))


FIVE = [f"A dog, seen by person {n}" for n in range(5)]
TURNS = [("human", "<image> Describe it."), ("gpt", FIVE[0]), ("human", "Again."), ("gpt", FIVE[1])]
CONVERSATIONS = {
    "ShareGPT": [{"from": who, "value": text} for who, text in TURNS],
    "roles": [{"role": who.replace("gpt", "assistant").replace("human", "user"), "content": t} for who, t in TURNS],
    "parts": [{"role": "user", "content": "?"}]
    + [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in FIVE[:2]],
    "no speakers": [{"value": text} for _, text in TURNS],
    "columns": {"from": [who for who, _ in TURNS], "value": [text for _, text in TURNS]},
}


@pytest.mark.parametrize("key", ["caption", "title", "long_caption"])
def test_the_texts_of_a_list_are_alternatives(key):
    captions = "raw" if key != "long_caption" else "long"
    drawn = {
        choose({key: FIVE}, seed, caption_lists="alternatives", captions=captions, num_long_captions=1)[0]
        for seed in range(60)
    }
    assert drawn == set(FIVE)
    (glued,) = {choose({key: FIVE}, seed, captions=captions, num_long_captions=1)[0] for seed in range(9)}
    assert glued == ". ".join(FIVE) + "."


def test_lines_of_a_text_file_are_alternatives_if_asked():
    record = {"txt": "\ufeff" + "\r\n".join(FIVE)}
    assert {choose(record, seed, captions="raw", caption_lines=True)[0] for seed in range(60)} == set(FIVE)
    assert choose(record, captions="raw") == ["\r\n".join(FIVE)]


@pytest.mark.parametrize(
    "texts", [["one", "two, three"], ["it's", 'says "hi"'], ["it's", "x"], ["\u00e4\n", "b"], ["one"]]
)
def test_a_list_in_a_csv_holds_alternatives_too(texts, tmp_path):
    """As pandas writes it, and as JSON."""
    for written in (texts, json.dumps(texts)):
        pandas.DataFrame({"filepath": ["a.jpg"], "caption": [written]}).to_csv(tmp_path / "t.csv", index=False)
        (row,) = open_table(tmp_path / "t.csv").load(["filepath", "caption"])
        assert caption_texts(row["caption"]) == texts


@pytest.mark.parametrize(
    "text", ["['a' 'b']", "[]", "['a', 5]", '["a", 5]', "['a'", '["Sale" says a sign, and "Go"]', "['x'] + ['y']"]
)
def test_other_texts_in_brackets_are_captions(text):
    assert caption_texts(text) == [text]


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_hold_the_models_answers(turns):
    assert caption_texts(turns) == FIVE[:2]
    assert {
        choose({"conversations": turns}, s, caption_lists="alternatives", num_long_captions=1)[1] for s in range(30)
    } == set(FIVE[:2])


def test_turns_of_unknown_speakers_are_refused_by_name():
    with pytest.raises(ValueError, match="row 3: a turn of 'narrator', expected one of human"):
        caption_texts([{"from": "narrator", "value": "a"}], "row 3")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"json": b'\xef\xbb\xbf{"caption": "a"}', "txt": b"\xef\xbb\xbfb"}, {"caption": "a", "txt": "b"}),
        ({"json": b'{"txt": "a"}', "txt": b"b"}, {"txt": "a"}),
        ({"json": b"[1]"}, "JSON not an object"),
        ({"json": b"{"}, "broken JSON"),
        ({"json": b"[" * 100_000}, "broken JSON"),
        ({"txt": b"caf\xe9"}, "text not UTF-8"),
    ],
)
def test_records_of_caption_files(files, expected):
    if isinstance(expected, dict):
        assert read_record(files) == expected
        return
    with pytest.raises(BadSample, match=f"^{expected}$"):
        read_record(files)


def test_raw_caption_comes_first_then_every_long_one():
    texts = choose(RECORD)
    assert texts[0] == "a dog" and sorted(texts[1:]) == sorted([IB, SV, LLA])


def test_k_of_three_long_captions_are_drawn_uniformly():
    drawn = Counter(choose(RECORD, seed, num_long_captions=1)[1] for seed in range(600))
    assert set(drawn) == {IB, SV, LLA} and min(drawn.values()) > 150
    pairs = {tuple(choose(RECORD, seed, num_long_captions=2)[1:]) for seed in range(200)}
    assert len(pairs) == 6 and all(a != b for a, b in pairs)


def test_the_same_stream_gives_the_same_captions():
    rule = {"num_long_captions": 2, "sub_caption_sentences": 1}
    assert [choose(RECORD, s, **rule) for s in range(20)] == [choose(RECORD, s, **rule) for s in range(20)]


def test_too_few_long_captions_repeat_and_none_gives_the_short_one():
    few = {"txt": "a dog", "long_caption": "A long story."}
    assert choose(few) == ["a dog", "A long story.", "A long story.", "A long story."]
    assert choose({"txt": "a dog"}) == ["a dog"] * 4


def test_only_long_captions_give_their_first_sentence_as_the_short_one():
    assert choose({"long_caption": "A dog runs. It is brown."}, num_long_captions=1) == [
        "A dog runs",
        "A dog runs. It is brown.",
    ]


def test_only_raw_and_only_long():
    assert choose(RECORD, captions="raw") == ["a dog"]
    assert sorted(choose(RECORD, captions="long")) == sorted([IB, SV, LLA])
    assert choose(RECORD, captions="both", num_long_captions=0) == ["a dog"]


def test_sub_captions_are_consecutive_sentences():
    record = {"txt": "x", "long_caption": "One. Two. Three. Four"}
    seen = {choose(record, seed, num_long_captions=1, sub_caption_sentences=2)[1] for seed in range(100)}
    assert seen == {"One. Two.", "Two. Three.", "Three. Four."}
    assert choose(record, num_long_captions=1, sub_caption_sentences=9)[1] == "One. Two. Three. Four."


def test_short_captions_are_drawn_among_raw_and_short_keys():
    record = RECORD | {"shortIB_captions": "dog", "shortSV_captions": "hound"}
    seen = {choose(record, s, short_caption_keys=("shortIB_captions", "shortSV_captions"))[0] for s in range(100)}
    assert seen == {"a dog", "dog", "hound"}


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({}, "no caption"),
        ({"name": "a"}, "no caption"),
        ({"txt": "  "}, "empty caption"),
        ({"long_caption": []}, "empty caption"),
        ({"txt": None, "caption": 3}, "caption not text"),
        ({"long_caption": ["", None]}, "caption not text"),
    ],
)
def test_nothing_usable_is_an_error(record, kind):
    assert find_captions(record, CaptionRule()) == ([], [], [])
    with pytest.raises(BadSample, match=f"^{kind}$"):
        choose(record)


def test_an_endless_caption_is_an_error():
    for record in ({"txt": "a" * 1_000_000}, RECORD | {"long_caption": ["short.", "word " * 200_000]}):
        with pytest.raises(BadSample, match="^caption too long$"):
            choose(record)


def test_the_longest_caption_is_used():
    assert choose({"txt": "a" * MAX_CHARACTERS}, captions="raw") == ["a" * MAX_CHARACTERS]


def test_the_raw_caption_is_drawn_among_its_alternatives_apart_from_the_short_one():
    drawn = {
        tuple(choose({"caption": FIVE}, s, caption_lists="alternatives", text_views="raw, short")) for s in range(300)
    }
    assert drawn == {(raw, short) for raw in FIVE for short in FIVE}
    record = {"caption": FIVE[0], "short": FIVE[1]}
    found = [choose(record, s, text_views="raw, short", short_caption_keys=("short",)) for s in range(40)]
    assert {raw for raw, _ in found} == {FIVE[0]} and {short for _, short in found} == set(FIVE[:2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"caf\xe9", "row 3: bytes that are not UTF-8, expected a text"),
        ([["nested", 7]], "row 3: int 7, expected a text or a list of texts"),
        ({"a": "x" * 99}, "row 3: dict .{60}, expected a text or a list of texts"),
        ([{"from": "robot" * 20, "value": "x"}], f"row 3: a turn of '{'robot' * 8}', expected one of human, .*, "),
        ([{"from": "gpt", "value": [7]}], "row 3: int 7, expected"),
    ],
)
def test_a_value_that_is_no_caption_is_named(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        caption_texts(value, "row 3")


def test_values_of_all_forms_are_texts():
    assert caption_texts("caf\u00e9".encode("utf-8-sig")) == ["caf\u00e9"]
    assert (
        caption_texts("\ufeffa") == ["a"]
        and caption_texts(None) == []
        and caption_texts("two\nlines") == ["two\nlines"]
    )
    assert caption_texts(["one", "two"]) == ["one", "two"] == caption_texts("one\ntwo", lines=True)
    assert caption_texts(["one", "two."], lists="sentences") == ["one. two."]
    parts = [{"role": "assistant", "content": ["plain", {"type": "image"}, {"type": "text", "text": "part"}]}]
    assert caption_texts(parts) == ["plain", "part"]


@pytest.mark.parametrize("captions", ["both", "raw", "long"])
@pytest.mark.parametrize("num_long", [1, 2, 5])
def test_number_of_captions_is_what_the_rule_says(captions, num_long):
    rule = CaptionRule(captions=captions, num_long_captions=num_long)
    for record in (RECORD, {"txt": "a"}, {"long_caption": "A b. C d."}):
        assert len(choose_captions(record, rule, random.Random(0))) == rule.num_captions


SCRIPTS = {
    "Chinese": ["\u4e00\u53ea\u72d7\u3002", "\u4e24\u53ea\u732b\uff01", "\u662f\u5417\uff1f"],
    "Hindi": [
        "\u090f\u0915 \u0915\u0941\u0924\u094d\u0924\u093e\u0964",
        "\u0926\u094b\u0964",
        "\u0924\u0940\u0928\u0964",
    ],
    "Urdu": ["\u0627\u06cc\u06a9\u06d4", "\u062f\u0648\u061f", "\u062a\u06cc\u0646\u06d4"],
}


@pytest.mark.parametrize("sentences", SCRIPTS.values(), ids=SCRIPTS)
def test_sentences_of_other_scripts_are_told_apart_and_keep_their_marks(sentences):
    for between in ("", " "):
        text = between.join(sentences)
        assert split_sentences(text) == sentences
        assert [part.strip() for part in first_sentence(text)] == [sentences[0], between.join(sentences[1:])]
    assert join_split(sentences) == join_sentences(sentences) == " ".join(sentences)
    record = {"txt": "a", "long_caption": "".join(sentences)}
    drawn = {choose(record, seed, text_views="raw, sentences(1, of=long)")[1] for seed in range(50)}
    assert drawn == set(sentences)


def test_sentences_end_where_a_reader_would_end_them():
    text = 'A 3.5 m pole. Is it tall?  He said "stop." Yes!\ne.g. today. 1. A dog 2. A U.S. flag.</s>Wait... A rim.The'
    expected = ["A 3.5 m pole", "Is it tall?", 'He said "stop."', "Yes!", "e.g. today", "1. A dog 2. A U.S. flag"]
    assert split_sentences(text) == [*expected, "Wait", "A rim", "The"]
    assert split_caption("A 3.5 m pole. Tall? Yes!") == [
        "A 3",
        "5 m pole",
        "Tall? Yes!",
    ]  # the benchmarks' published rule
    assert split_sentences("A\u2028b. \u201cC.\u201d D") == ["A\u2028b", "\u201cC.\u201d", "D"]


def test_every_part_of_the_project_ends_sentences_at_the_same_places():
    """Training, diagnostics, statistics and preparation; one engine for ASCII text and one for all scripts."""
    rng = random.Random(0)
    words = ["A dog", " 3.5 m", ". ", ".", "! ", "? ", "\n", "</s>", " ", '" ', "\u3002", "\u0964 "]
    for length in [9] * 2000:
        text = "".join(rng.choices(words, k=length))
        if text.isascii():
            assert [m.span() for m in _ASCII_END.finditer(text)] == [m.span() for m in _END.finditer(text)]
        sentences = split_sentences(text)
        first, rest = first_sentence(text)
        assert [first, *split_sentences(rest)] == (sentences or [text.strip()])
        assert split_sentences(join_split(sentences)) == sentences
        whole = [end for end in sentence_ends(text) if text[:end].strip() and not text[end:].strip()]
        assert bool(whole) <= is_terminated(text.strip())
        assert without_cut_sentence(text + "cut") in {
            text + "cut",
            *(text[:end] for end in sentence_ends(text + "cut")),
        }


def test_normalised_captions_are_unchanged_by_splitting_and_joining():
    for text in ("A dog. It is brown. It runs", "A dog! It runs", "One", ""):
        assert join_split(split_sentences(normalise_caption(text))) == normalise_caption(text)


def test_lines_end_as_in_files():
    assert split_lines("a\u2028b\x0bc\x85d\r\ne\rf\n\n") == ["a\u2028b\x0bc\x85d", "e", "f", ""]
    assert split_lines("") == [] and split_lines("a") == split_lines("a\n") == ["a"]


def test_records_have_what_their_files_hold():
    assert read_record({}) == {} and read_record({"json": b'\xef\xbb\xbf{"a": 1}'}) == {"a": 1}
    assert read_record({"txt": b" one \n"}) == {"txt": "one"}
    assert read_record({"txt": b"one", "json": b'{"txt": "two"}'}) == {"txt": "two"}


def test_half_a_surrogate_pair_is_no_unicode():
    assert is_unicode("a \U0001f415") and not is_unicode("a \ud83d") and not is_unicode("\udc15")


def test_refusals_within_a_text_and_quotations_in_capitals():
    assert is_refusal("The image shows a dog. As an artificial intelligence model, I see no colours.")
    assert not is_refusal("I CANNOT BREATHE, IT SAYS on a poster")
    assert not is_refusal("A natural and an artificial lake")
