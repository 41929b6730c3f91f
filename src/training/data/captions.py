"""Which captions of a sample a step sees. Pure: a record, a rule and a random stream give the texts."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dataloaders.captions import split_caption

RAW_KEYS = ("raw_caption", "caption", "txt")
LONG_KEYS = ("longIB_captions", "longSV_captions", "longLLA_captions", "long_caption")


MAX_CHARACTERS = 100_000


class NoCaptionError(ValueError):
    """A sample without a usable caption under the keys asked for; the message is the kind of fault."""


@dataclass(frozen=True)
class CaptionRule:
    """How to pick captions.

    Attributes:
        raw_keys: where the raw caption is looked for; the first that is there counts.
        short_keys: further short captions; the short one of a step is drawn among these and the raw one.
        long_keys: where long captions are; each one found counts.
        num_long: long captions per step, K.
        captions: ``both``: the short one, then K long ones. ``raw``: the short one alone. ``long``: K long ones, of
            which the first takes the short one's place.
        num_sentences: take so many consecutive sentences of a long caption, afresh each epoch; 0 takes it whole.

    A sample with more than K long captions gives K different ones, drawn afresh each epoch; one with fewer repeats its
    own in turn; one without any gives its short caption in their place. One without short captions gives the first
    sentence of its first long caption as the short one.
    """

    raw_keys: tuple[str, ...] = RAW_KEYS
    short_keys: tuple[str, ...] = ()
    long_keys: tuple[str, ...] = LONG_KEYS
    num_long: int = 3
    captions: str = "both"
    num_sentences: int = 0

    @property
    def num_captions(self) -> int:
        """Texts per sample."""
        return {"both": 1 + self.num_long, "raw": 1, "long": max(1, self.num_long)}[self.captions]


def choose_captions(record: dict, rule: CaptionRule, rng: random.Random) -> list[str]:
    """Picks a sample's texts.

    Args:
        record: caption key -> text, or list of sentences; other keys and kinds of value are passed over.
        rule: what to pick.
        rng: the sample's own stream.

    Returns:
        `rule.num_captions` texts, the short one first.

    Raises:
        NoCaptionError: nothing under the keys, only empty text, or one that is no caption: endless, or no Unicode.
    """
    shorts, longs = _shorts(record, rule), _longs(record, rule)
    if not shorts and not longs:
        raise NoCaptionError(_why_none(record, rule))
    if any(len(text) > MAX_CHARACTERS for text in (*shorts, *itertools.chain(*longs))):
        raise NoCaptionError("caption too long")
    short = rng.choice(shorts) if shorts else _first_sentence(longs[0])
    if rule.num_captions == 1 and rule.captions != "long":
        return [short]
    wanted = rule.num_captions - (rule.captions == "both")
    if not longs:
        texts = [short] * wanted
    else:
        chosen = rng.sample(longs, wanted) if len(longs) >= wanted else [longs[i % len(longs)] for i in range(wanted)]
        texts = [_part(pieces, rule.num_sentences, rng) for pieces in chosen]
    return texts if rule.captions == "long" else [short, *texts]


def _why_none(record: dict, rule: CaptionRule) -> str:
    values = [record[key] for key in (*rule.raw_keys, *rule.short_keys, *rule.long_keys) if key in record]
    pieces = [piece for value in values for piece in (value if isinstance(value, list) else [value])]
    if not values:
        return "no caption"
    return "empty caption" if all(isinstance(piece, str) for piece in pieces) else "caption not text"


def captions_found(record: dict, rule: CaptionRule) -> tuple[bool, bool]:
    """Tells whether a sample has (a short caption, a long one) under the rule's keys."""
    return bool(_shorts(record, rule)), bool(_longs(record, rule))


def _shorts(record: dict, rule: CaptionRule) -> list[str]:
    """The raw caption, if any, and further short ones."""
    raws = [text for text in (_text(record.get(key)) for key in rule.raw_keys) if text]
    return raws[:1] + [text for text in (_text(record.get(key)) for key in rule.short_keys) if text]


def _longs(record: dict, rule: CaptionRule) -> list[list[str]]:
    """Each long caption as its pieces."""
    return [pieces for pieces in (_sentences(record.get(key)) for key in rule.long_keys) if pieces]


def _text(value: object) -> str | None:
    """A text, or a list of sentences joined; None for anything else and for blank text."""
    if isinstance(value, str):
        return value.strip() or None
    sentences = _sentences(value)
    return join_sentences(sentences) if sentences else None


def _sentences(value: object) -> list[str]:
    """A caption as pieces: a list as it is, a text as one piece; blank ones dropped."""
    pieces = value if isinstance(value, list) else [value]
    return [piece.strip() for piece in pieces if isinstance(piece, str) and piece.strip()]


def _part(pieces: Sequence[str], num_sentences: int, rng: random.Random) -> str:
    if not num_sentences:
        return pieces[0] if len(pieces) == 1 else join_sentences(pieces)
    sentences = [s for piece in pieces for s in split_caption(piece)]
    first = rng.randrange(max(1, len(sentences) - num_sentences + 1))
    return join_sentences(sentences[first : first + num_sentences]) if sentences else pieces[0]


def _first_sentence(pieces: Sequence[str]) -> str:
    return (split_caption(pieces[0]) or pieces)[0]


def join_sentences(sentences: Sequence[str]) -> str:
    """Makes one text of sentences; those without an end get a full stop."""
    return " ".join(s if s[-1] in ".!?" else s + "." for s in sentences)
