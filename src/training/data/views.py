"""--text-views: the list of texts that a training step sees of a sample, such as "raw, long*3".

Entries are separated by commas. An entry is a view, or several views separated by |, of which one is drawn for each
text; *COUNT after an entry gives that many texts. Views:

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

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

NAMES = ("raw", "short", "long", "first-sentence", "long-without-first", "sentences")
POOLS = ("raw", "short", "long", "long-without-first", "all")
_OF_LONG = {"long", "first-sentence", "long-without-first"}  # made from a long caption
_WITH_CORNERS = {"long", "long-without-first", "sentences"}  # whose corner tokens have a loss if not said otherwise
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
class View:
    """One text of a sample.

    Attributes:
        name: one of `NAMES`.
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
        return self.name in _OF_LONG or (self.name == "sentences" and self.pool in _OF_LONG)


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
        captions: value of ``--captions``.
        num_long: value of ``--num-long-captions``.
        num_sentences: value of ``--sub-caption-sentences``.
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
        if not match or match[1] not in NAMES:
            raise ValueError(f"{part.strip()!r}: expected one of {', '.join(NAMES)}")
        view, more = _view(match[1], [word.strip() for word in (match[2] or "").split(",") if word.strip()])
        views.append(view)
        options |= more
    if len(views) == 1 and views[0].share != 1:
        raise ValueError(f"{text!r}: share= needs several views, separated by |")
    if not any(view.share for view in views):
        raise ValueError(f"{text!r}: expected a share above 0")
    corners = options.pop("corners", any(view.name in _WITH_CORNERS for view in views))
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
