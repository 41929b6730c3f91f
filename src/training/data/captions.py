"""Chooses the texts of a sample that a step trains on: a pure function of a record, a rule and a random stream."""

import random
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

from training.data.views import Entry, View, parse_views, views_by_flags
from training.readers.captions import caption_texts, first_sentence, join_sentences, split_sentences
from training.readers.faults import BadSample

RAW_KEYS = ("raw_caption", "caption", "txt", "title", "text")
LONG_KEYS = ("longIB_captions", "longSV_captions", "longLLA_captions", "long_caption", "conversations")
MAX_CHARACTERS = 100_000
Rng = random.Random | ModuleType


@dataclass(frozen=True)
class CaptionRule:
    """How to choose captions.

    Attributes:
        raw_keys: keys of the raw caption; the first that a sample has is used, and one of its alternatives is drawn.
        short_keys: keys of further short captions; a step's short caption is drawn from these and the raw one.
        long_keys: keys of long captions; all that a sample has are used.
        num_long: number of long captions per step, K.
        captions: ``both``: the short caption, then K long ones. ``raw``: the short caption alone. ``long``: K long
            captions, of which the first is used as the short one.
        num_sentences: take this many consecutive sentences of a long caption, drawn anew in each epoch; 0 takes the
            whole caption.
        views: the list of texts, see `training.data.views`; replaces the three attributes before it.
        lists: ``alternatives``: each text of a list is a caption of its own; ``sentences``: a list is one caption.
        lines: each line of a ``txt`` is a caption of its own.

    From a sample with more than K long captions, K different ones are drawn anew in each epoch. If a sample has fewer,
    they are repeated in turn; if it has none, its short caption replaces them. If a sample has no short caption, the
    first sentence of its first long caption replaces it.
    """

    raw_keys: tuple[str, ...] = RAW_KEYS
    short_keys: tuple[str, ...] = ()
    long_keys: tuple[str, ...] = LONG_KEYS
    num_long: int = 3
    captions: str = "both"
    num_sentences: int = 0
    views: str = ""
    lists: str = "alternatives"
    lines: bool = False

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The parsed list of views."""
        return parse_views(self.views or views_by_flags(self.captions, self.num_long, self.num_sentences))

    @cached_property
    def texts(self) -> tuple[Entry, ...]:
        """For each text of a sample, the entry that it belongs to."""
        return tuple(entry for entry in self.entries for _ in range(entry.count))

    @property
    def num_captions(self) -> int:
        """Number of texts per sample."""
        return len(self.texts)

    @cached_property
    def num_long_used(self) -> int:
        """The largest number of different long captions of a sample that a step can use."""
        counts: dict[View, int] = {}
        for entry in self.texts:
            for view in entry.views:
                key = View(view.name, pool=view.pool)
                counts[key] = counts.get(key, 0) + view.uses_long
        return max(counts.values())


def choose_captions(record: dict, rule: CaptionRule, rng: Rng) -> list[str]:
    """Chooses the texts of a sample.

    Args:
        record: caption key -> value, see `caption_texts`; other keys and types of value are ignored.
        rule: what to choose.
        rng: the sample's own random stream, or the module `random`.

    Returns:
        `rule.num_captions` texts, in the order of the rule's entries.

    Raises:
        BadSample: there is nothing under the keys, only empty text, only values that are not text, or a text of
            more than `MAX_CHARACTERS`.
    """
    raws, shorts, longs = find_captions(record, rule)
    if not shorts and not longs:
        raise BadSample(_why_none(record, rule))
    if any(len(text) > MAX_CHARACTERS for text in (*shorts, *longs)):
        raise BadSample("caption too long")
    short = rng.choice(shorts) if shorts else first_sentence(longs[0])[0]
    everything, wanted = shorts + longs, rule.num_long_used
    if longs and wanted:
        longs = rng.sample(longs, wanted) if len(longs) >= wanted else [longs[i % len(longs)] for i in range(wanted)]
    raw = rng.choice(raws) if len(raws) > 1 else (shorts or [short])[0]
    chooser = _Chooser(raw, short, longs, everything, rng)
    return [text for entry in rule.entries for text in chooser.texts(entry)]


class _Chooser:
    """Chooses the texts of one sample; remembers how many long captions each kind of view has used."""

    def __init__(self, raw: str, short: str, longs: list[str], everything: list[str], rng: Rng):
        self.captions, self.longs, self.everything, self.rng = {"raw": raw, "short": short}, longs, everything, rng
        self.used: dict[tuple[str, str], int] = {}

    def texts(self, entry: Entry) -> list[str]:
        if entry.views[0].distinct:
            return self._distinct(entry.views[0], entry.count)
        views = [*entry.views] * entry.count
        if len(entry.views) > 1:
            views = self.rng.choices(entry.views, [view.share for view in entry.views], k=entry.count)
        return [self._text(view) for view in views]

    def _text(self, view: View) -> str:
        if view.uses_long and not self.longs:
            return self.captions["short"]
        if view.name != "sentences":
            return self._caption(view.name, view)
        sentences = self._sentences(view)
        least, most = (min(n or len(sentences), len(sentences)) for n in (view.least, view.most))
        number = least if least == most else self.rng.randint(least, most)
        ordered = view.order == "ordered" or (view.order == "either" and (number == 1 or self.rng.random() < 0.5))
        if not ordered:
            return join_sentences(self.rng.sample(sentences, number))
        start = self.rng.randrange(len(sentences) - number + 1)
        return join_sentences(sentences[start : start + number])

    def _distinct(self, view: View, count: int) -> list[str]:
        """Returns runs of consecutive sentences that begin at different sentences, as long as there are enough."""
        sentences = self._sentences(view)
        number = min(view.least, len(sentences))
        starts = range(len(sentences) - number + 1)
        draw = self.rng.sample if len(starts) >= count else self.rng.choices
        return [join_sentences(sentences[start : start + number]) for start in draw(starts, k=count)]

    def _sentences(self, view: View) -> list[str]:
        """Returns the sentences from which a view takes some."""
        if view.uses_long and not self.longs:
            texts = [self.captions["short"]]
        else:
            texts = self.everything if view.pool == "all" else [self._caption(view.pool, view)]
        return [sentence for text in texts for sentence in split_sentences(text)] or texts[:1]

    def _caption(self, kind: str, view: View) -> str:
        """Returns the raw or short caption, or the next long one for this kind of view, or a part of it."""
        if kind in self.captions:
            return self.captions[kind]
        key = view.name, view.pool
        self.used[key] = self.used.get(key, -1) + 1
        text = self.longs[self.used[key] % len(self.longs)]
        if kind == "long":
            return text
        first, rest = first_sentence(text)
        return first if kind == "first-sentence" else rest.strip() or first


def _why_none(record: dict, rule: CaptionRule) -> str:
    values = [record[key] for key in (*rule.raw_keys, *rule.short_keys, *rule.long_keys) if key in record]
    pieces = [piece for value in values for piece in (value if isinstance(value, list) else [value])]
    if not values:
        return "no caption"
    return "empty caption" if all(isinstance(piece, str) for piece in pieces) else "caption not text"


def find_captions(record: dict, rule: CaptionRule) -> tuple[list[str], list[str], list[str]]:
    """Returns (alternatives of the raw caption, these and the further short captions, long captions) of a sample."""

    def texts(key: str) -> list[str]:
        try:
            found = caption_texts(record.get(key), lists=rule.lists, lines=rule.lines and key == "txt")
        except ValueError:
            return []
        return [text.strip() for text in found]

    raws = next(filter(None, map(texts, rule.raw_keys)), [])
    shorts, longs = ([text for key in keys for text in texts(key)] for keys in (rule.short_keys, rule.long_keys))
    return raws, raws + shorts, longs
