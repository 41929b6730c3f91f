"""The texts of a sample that a step trains on: a pure function of a record, a rule and a random stream.

--text-views lists them, such as "raw, long*3". Entries are separated by commas. An entry is a view, or several views
separated by |, of which one is drawn for each text; *COUNT after an entry gives that many texts. Views:

    raw, short, long        a caption, from --raw-caption-keys, --short-caption-keys, --long-caption-keys
    first-sentence          the first sentence of a long caption
    long-without-first      the rest of the long caption
    sentences(1..3)         1 to 3 sentences; without numbers, 1 to all

Options are in parentheses, separated by commas:

    of=POOL                 source of the sentences: raw, short, long, long-without-first or all
    ordered, any            consecutive sentences, or any sentences in any order; without either, one of both is drawn
    distinct                the texts of the entry begin at different sentences
    share=X                 how often a view is drawn, relative to the others separated by |
    weight=X                weight of the entry's loss
    corners=yes|no          whether its corner tokens have a loss
    pad=front               padding also in front of the text
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from training.readers.captions import caption_texts, first_sentence, join_sentences, split_sentences
from training.readers.faults import BadSample
from training.runtime.registry import Registry

RAW_KEYS = ("raw_caption", "caption", "txt", "title", "text")
LONG_KEYS = ("longIB_captions", "longSV_captions", "longLLA_captions", "long_caption", "conversations")
MAX_CHARACTERS = 100_000
Rng = random.Random | ModuleType
POOLS = ("raw", "short", "long", "long-without-first", "all")
_ENTRY_END = re.compile(r",(?![^()]*\))")
_VIEW = re.compile(r"([a-z-]+)\s*(?:\(([^()]*)\))?")
_NUMBER = r"(\d+\.?\d*(?:e-?\d+)?|\.\d+)"
_OPTIONS: dict[str, Callable[[re.Match], dict[str, object]]] = {
    rf"share={_NUMBER}": lambda m: {"share": float(m[1])},
    rf"weight={_NUMBER}": lambda m: {"weight": float(m[1])},
    "corners=(yes|no)": lambda m: {"corners": m[1] == "yes"},
    "pad=(front|behind)": lambda m: {"front": m[1] == "front"},
}
_OF_SENTENCES: dict[str, Callable[[re.Match], dict[str, object]]] = {
    r"(?:n=)?(\d+)(?:\.\.(\d+))?": lambda m: {"least": int(m[1]), "most": int(m[2] or m[1])},
    r"(?:n=)?(\d+)\.\.all": lambda m: {"least": int(m[1]), "most": None},
    "(ordered|any)": lambda m: {"order": m[1]},
    "distinct": lambda m: {"distinct": True},
    f"of=({'|'.join(POOLS)})": lambda m: {"pool": m[1]},
}


@dataclass(frozen=True)
class Kind:
    """A kind of view, by whose name in `VIEWS` an entry asks for it; an experiment's file may register further ones."""

    source: str  # the caption of which its text is a part: raw, short or long; empty for sentences
    part: Callable[[str], str] = str
    corners: bool = False  # whether its corner tokens have a loss if the entry does not say


VIEWS: Registry[Kind] = Registry("caption view")
VIEWS.register("raw")(Kind("raw"))
VIEWS.register("short")(Kind("short"))
VIEWS.register("long")(Kind("long", corners=True))
VIEWS.register("first-sentence")(Kind("long", lambda text: first_sentence(text)[0]))
VIEWS.register("long-without-first")(
    Kind("long", lambda text: first_sentence(text)[1].strip() or first_sentence(text)[0], corners=True)
)
VIEWS.register("sentences")(Kind("", corners=True))


@dataclass(frozen=True)
class View:
    """One text of a sample.

    Attributes:
        name: one of `VIEWS`.
        least, most: range of the number of sentences; None as `most` means all.
        pool: source of the sentences, one of `POOLS`.
        order: ``ordered``, ``any``, or ``either``, which draws one of both for each text.
        distinct: the texts of an entry begin at different sentences, as long as there are enough.
        share: weight of the view when one of an entry's views is drawn.
    """

    name: str
    least: int = 1
    most: int | None = None
    pool: str = "all"
    order: str = "either"
    distinct: bool = False
    share: float = 1.0

    @property
    def uses_long(self) -> bool:
        """Whether the view is made from a long caption."""
        kind = VIEWS.get(self.pool if self.name == "sentences" else self.name)
        return kind is not None and kind.source == "long"


@dataclass(frozen=True)
class Entry:
    """One entry of the list.

    Attributes:
        name: names of its views, with a number if an earlier entry has the same; used for its loss in the log.
        views: one of them is drawn for each text.
        count: number of texts.
        weight: weight of the loss of each of its text features, relative to other entries.
        corners: whether the loss uses the features of corner tokens as well as those of [CLS].
        front: also put padding in front of the texts.
    """

    name: str
    views: tuple[View, ...]
    count: int = 1
    weight: float = 1.0
    corners: bool = True
    front: bool = False


def parse_views(text: str) -> tuple[Entry, ...]:
    """Parses a list of views; the module's docstring describes the syntax.

    Raises:
        ValueError: the message names the entry, what was found and what is expected.
    """
    entries = tuple(_entry(part.strip()) for part in _ENTRY_END.split(text))
    names = [entry.name for entry in entries]
    numbered = [
        f"{name}-{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]
    return tuple(replace(entry, name=name) for entry, name in zip(entries, numbered))


def views_by_flags(captions: str, num_long: int, num_sentences: int) -> str:
    """Returns the list of views that is equivalent to these three flags.

    Args:
        captions, num_long, num_sentences: values of --captions, --num-long-captions and --sub-caption-sentences.
    """
    long = f"sentences({num_sentences}, ordered, of=long" if num_sentences else "long("
    if captions == "raw" or (captions == "both" and not num_long):
        return "short"
    if captions == "both":
        return f"short, {long})*{num_long}"
    first = f"{long}{', ' if num_sentences else ''}corners=no)"
    return first if num_long < 2 else f"{first}, {long})*{num_long - 1}"


def _entry(text: str) -> Entry:
    body, star, count = text.partition("*")
    if star and not (count.strip().isdecimal() and int(count)):
        raise ValueError(f"{text!r}: expected a number of texts of at least 1 after *")
    views, options = [], dict[str, Any]()
    for part in body.split("|"):
        match = _VIEW.fullmatch(part.strip())
        if not match or match[1] not in VIEWS:
            raise ValueError(f"{part.strip()!r}: expected one of {', '.join(VIEWS)}")
        view, more = _view(match[1], [word.strip() for word in (match[2] or "").split(",") if word.strip()])
        views.append(view)
        options |= more
    if len(views) == 1 and views[0].share != 1:
        raise ValueError(f"{text!r}: share= needs several views, separated by |")
    if not any(view.share for view in views):
        raise ValueError(f"{text!r}: expected a share above 0")
    corners = options.pop("corners", any(VIEWS[view.name].corners for view in views))
    name = "-or-".join(view.name for view in views)
    return Entry(name, tuple(views), int(count) if star else 1, corners=corners, **options)


def _view(name: str, words: list[str]) -> tuple[View, dict[str, Any]]:
    """Returns a view, and the options among its words that concern the entry."""
    options = _OPTIONS | _OF_SENTENCES if name == "sentences" else _OPTIONS
    fields: dict[str, Any] = {}
    for word in words:
        found = [make(match) for pattern, make in options.items() if (match := re.fullmatch(pattern, word))]
        if not found:
            raise ValueError(f"{name}({word}): not understood; see docs/training.md, caption views")
        fields |= found[0]
    of_entry: dict[str, Any] = {key: fields.pop(key) for key in ("weight", "corners", "front") if key in fields}
    view = View(name, **fields)
    if view.least < 1 or (view.most is not None and view.most < view.least):
        raise ValueError(f"{name}({view.least}..{view.most}): expected 1 <= first <= last")
    if view.distinct and view.least != view.most:
        raise ValueError(f"{name}(distinct): needs one number of sentences, such as sentences(1, distinct)*6")
    return view, of_entry


@dataclass(frozen=True)
class CaptionRule:
    """How to choose captions; the attributes are named as the flags.

    Attributes:
        raw_caption_keys: keys of the raw caption; the first that a sample has is used.
        short_caption_keys: keys of further short captions; a step's short caption is drawn from these and the raw one.
        long_caption_keys: keys of long captions; all that a sample has are used.
        num_long_captions: number of long captions per step, K.
        captions: ``both``: the short caption, then K long ones; ``raw``: the short one alone; ``long``: K long ones.
        sub_caption_sentences: take so many consecutive sentences of a long caption, drawn anew in each epoch; 0: all.
        text_views: the list of texts, see `training.data.captions`; replaces the three attributes before it.
        caption_lists, caption_lines: `lists` of `caption_texts`, and its `lines` for a ``txt``.

    From a sample with more than K long captions, K different ones are drawn anew in each epoch. If a sample has fewer,
    they are repeated in turn; if it has none, its short caption replaces them. Where the short caption is missing, the
    first sentence of the first long one replaces it. Of alternatives, one is drawn.
    """

    raw_caption_keys: tuple[str, ...] = RAW_KEYS
    short_caption_keys: tuple[str, ...] = ()
    long_caption_keys: tuple[str, ...] = LONG_KEYS
    num_long_captions: int = 3
    captions: str = "both"
    sub_caption_sentences: int = 0
    text_views: str = ""
    caption_lists: str = "alternatives"
    caption_lines: bool = False

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The parsed list of views."""
        return parse_views(
            self.text_views or views_by_flags(self.captions, self.num_long_captions, self.sub_caption_sentences)
        )

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
        found = [
            record[key]
            for key in (*rule.raw_caption_keys, *rule.short_caption_keys, *rule.long_caption_keys)
            if key in record
        ]
        pieces = [piece for value in found for piece in (value if isinstance(value, list) else [value])]
        no_text = "empty caption" if all(isinstance(piece, str) for piece in pieces) else "caption not text"
        raise BadSample(no_text if found else "no caption")
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
        if entry.views[0].distinct:  # begin at different sentences, as long as there are enough
            sentences = self._sentences(entry.views[0])
            number = min(entry.views[0].least, len(sentences))
            starts = range(len(sentences) - number + 1)
            draw = self.rng.sample if len(starts) >= entry.count else self.rng.choices
            return [join_sentences(sentences[start : start + number]) for start in draw(starts, k=entry.count)]
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

    def _sentences(self, view: View) -> list[str]:
        """Returns the sentences from which a view takes some."""
        if view.uses_long and not self.longs:
            texts = [self.captions["short"]]
        else:
            texts = self.everything if view.pool == "all" else [self._caption(view.pool, view)]
        return [sentence for text in texts for sentence in split_sentences(text)] or texts[:1]

    def _caption(self, name: str, view: View) -> str:
        """Returns the raw or short caption, or the next long one for this kind of view, or a part of it."""
        kind = VIEWS[name]
        if kind.source in self.captions:
            return kind.part(self.captions[kind.source])
        key = view.name, view.pool
        self.used[key] = self.used.get(key, -1) + 1
        return kind.part(self.longs[self.used[key] % len(self.longs)])


def find_captions(record: dict, rule: CaptionRule) -> tuple[list[str], list[str], list[str]]:
    """Returns (alternatives of the raw caption, these and the further short captions, long captions) of a sample."""

    def texts(key: str) -> list[str]:
        try:
            found = caption_texts(record.get(key), lists=rule.caption_lists, lines=rule.caption_lines and key == "txt")
        except ValueError:
            return []
        return [text.strip() for text in found]

    raws = next(filter(None, map(texts, rule.raw_caption_keys)), [])
    further = [text for key in rule.short_caption_keys for text in texts(key)]
    return raws, raws + further, [text for key in rule.long_caption_keys for text in texts(key)]
