"""Which texts of a sample a step sees. Pure: a record, a rule and a random stream give the texts."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dataloaders.captions import split_caption
from training.data.views import Entry, View, parse_views, views_by_flags

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
        views: the texts as a list, see `views`; in place of the three attributes before.

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
    views: str = ""

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The list of views, parsed."""
        return parse_views(self.views or views_by_flags(self.captions, self.num_long, self.num_sentences))

    @cached_property
    def texts(self) -> tuple[Entry, ...]:
        """The entry that each text belongs to."""
        return tuple(entry for entry in self.entries for _ in range(entry.count))

    @property
    def num_captions(self) -> int:
        """Texts per sample."""
        return len(self.texts)

    @cached_property
    def num_long_used(self) -> int:
        """Different long captions that a sample can show."""
        counts: dict[View, int] = {}
        for entry in self.texts:
            for view in entry.views:
                key = View(view.name, pool=view.pool)
                counts[key] = counts.get(key, 0) + view.uses_long
        return max(counts.values())


def choose_captions(record: dict, rule: CaptionRule, rng: random.Random) -> list[str]:
    """Picks a sample's texts.

    Args:
        record: caption key -> text, or list of sentences; other keys and kinds of value are passed over.
        rule: what to pick.
        rng: the sample's own stream.

    Returns:
        `rule.num_captions` texts, in the order of the rule's entries.

    Raises:
        NoCaptionError: nothing under the keys, only empty text, or one that is no caption: endless, or no Unicode.
    """
    shorts, longs = _shorts(record, rule), _longs(record, rule)
    if not shorts and not longs:
        raise NoCaptionError(_why_none(record, rule))
    if any(len(text) > MAX_CHARACTERS for text in (*shorts, *itertools.chain(*longs))):
        raise NoCaptionError("caption too long")
    short = rng.choice(shorts) if shorts else _first_sentence(longs[0])
    everything = [[text] for text in shorts] + longs
    wanted = rule.num_long_used
    if longs and wanted:
        longs = rng.sample(longs, wanted) if len(longs) >= wanted else [longs[i % len(longs)] for i in range(wanted)]
    chooser = _Chooser(shorts[0] if shorts else short, short, longs, everything, rng)
    return [text for entry in rule.entries for text in chooser.texts(entry)]


class _Chooser:
    """Picks the texts of one sample; counts how many long captions each kind of view has used."""

    def __init__(self, raw: str, short: str, longs: list[list[str]], everything: list[list[str]], rng: random.Random):
        self.raw, self.short, self.longs, self.everything, self.rng = raw, short, longs, everything, rng
        self.used: dict[tuple[str, str], int] = {}

    def texts(self, entry: Entry) -> list[str]:
        if entry.views[0].distinct:
            return self._distinct(entry)
        views = entry.views
        if len(views) > 1:
            views = self.rng.choices(views, [view.share for view in views], k=entry.count)
        return [self._text(views[i % len(views)]) for i in range(entry.count)]

    def _text(self, view: View) -> str:
        if view.name == "raw":
            return self.raw
        if view.name == "short" or (view.uses_long and not self.longs):
            return self.short
        if view.name == "sentences":
            return self._sentences(view)
        pieces = self._long(view)
        if view.name == "long":
            return _whole(pieces)
        first, _, rest = _whole(pieces).partition(". ")
        return first if view.name == "first-sentence" else rest.strip() or first

    def _long(self, view: View) -> list[str]:
        """The next long caption of this kind of view, as its pieces."""
        key = view.name, view.pool
        self.used[key] = self.used.get(key, -1) + 1
        return self.longs[self.used[key] % len(self.longs)]

    def _pool(self, view: View) -> list[str]:
        """The texts whose sentences a view takes."""
        if view.pool == "all":
            return [piece for pieces in self.everything for piece in pieces]
        if view.pool in ("raw", "short"):
            return [self.raw if view.pool == "raw" else self.short]
        pieces = self._long(view)
        if view.pool == "long":
            return pieces
        first, _, rest = _whole(pieces).partition(". ")
        return [rest.strip() or first]

    def _sentences(self, view: View) -> str:
        pool = self._pool(view)
        sentences = [sentence for piece in pool for sentence in split_caption(piece)] or pool[:1]
        least, most = (min(n or len(sentences), len(sentences)) for n in (view.least, view.most))
        number = least if least == most else self.rng.randint(least, most)
        ordered = view.order == "ordered" or (view.order == "either" and (number == 1 or self.rng.random() < 0.5))
        if not ordered:
            return join_sentences(self.rng.sample(sentences, number))
        start = self.rng.randrange(len(sentences) - number + 1)
        return join_sentences(sentences[start : start + number])

    def _distinct(self, entry: Entry) -> list[str]:
        """Runs of sentences that begin at different ones."""
        view = entry.views[0]
        pool = [self.short] if view.uses_long and not self.longs else self._pool(view)
        sentences = [sentence for piece in pool for sentence in split_caption(piece)] or pool
        number = min(view.least, len(sentences))
        starts = range(len(sentences) - number + 1)
        draw = self.rng.sample if len(starts) >= entry.count else self.rng.choices
        return [join_sentences(sentences[start : start + number]) for start in draw(starts, k=entry.count)]


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


def _whole(pieces: Sequence[str]) -> str:
    return pieces[0] if len(pieces) == 1 else join_sentences(pieces)


def _first_sentence(pieces: Sequence[str]) -> str:
    return (split_caption(pieces[0]) or pieces)[0]


def join_sentences(sentences: Sequence[str]) -> str:
    """Makes one text of sentences; those without an end get a full stop."""
    return " ".join(s if s[-1] in ".!?" else s + "." for s in sentences)
