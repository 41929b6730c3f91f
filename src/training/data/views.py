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
from dataclasses import dataclass, replace
from typing import NamedTuple


class _Kind(NamedTuple):
    """A kind of view.

    Attributes:
        uses_long: it is made from a long caption.
        corners: its corner tokens have a loss, unless the entry says otherwise.
    """

    uses_long: bool
    corners: bool


KINDS = {
    "raw": _Kind(uses_long=False, corners=False),
    "short": _Kind(uses_long=False, corners=False),
    "long": _Kind(uses_long=True, corners=True),
    "first-sentence": _Kind(uses_long=True, corners=False),
    "long-without-first": _Kind(uses_long=True, corners=True),
    "sentences": _Kind(uses_long=False, corners=True),  # made from a long caption if its pool is one, see `View`
}
POOLS = ("raw", "short", "long", "long-without-first", "all")
_ENTRY_END = re.compile(r",(?![^()]*\))")
_VIEW = re.compile(r"([a-z-]+)\s*(?:\(([^()]*)\))?")
_NUMBERS = re.compile(r"(?:n=)?(\d+)(?:\.\.(\d+|all))?")


@dataclass(frozen=True)
class View:
    """One text of a sample.

    Attributes:
        name: one of `KINDS`.
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
        return KINDS[self.name].uses_long or (self.name == "sentences" and self.pool in ("long", "long-without-first"))


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
    views, options = [], {}
    for part in body.split("|"):
        match = _VIEW.fullmatch(part.strip())
        if not match or match[1] not in KINDS:
            raise ValueError(f"{part.strip()!r}: expected one of {', '.join(KINDS)}")
        view, more = _view(match[1], [word.strip() for word in (match[2] or "").split(",") if word.strip()])
        views.append(view)
        options |= more
    if len(views) == 1 and views[0].share != 1:
        raise ValueError(f"{text!r}: share= needs several views, separated by |")
    if not any(view.share for view in views):
        raise ValueError(f"{text!r}: expected a share above 0")
    corners = options.pop("corners", any(KINDS[view.name].corners for view in views))
    name = "-or-".join(view.name for view in views)
    return Entry(name, tuple(views), int(count) if star else 1, corners=corners, **options)


def _view(name: str, words: list[str]) -> tuple[View, dict[str, object]]:
    """Returns a view, and the options among its words that concern the entry."""
    view, options = View(name), {}
    for word in words:
        key, _, value = word.partition("=")
        numbers = _NUMBERS.fullmatch(word)
        if key in ("share", "weight") and (number := _number(value)) is not None:
            if key == "share":
                view = replace(view, share=number)
            else:
                options["weight"] = number
        elif key == "corners" and value in ("yes", "no"):
            options["corners"] = value == "yes"
        elif word in ("pad=front", "pad=behind"):
            options["front"] = value == "front"
        elif name == "sentences" and numbers:
            most = numbers[2] or numbers[1]
            view = replace(view, least=int(numbers[1]), most=None if most == "all" else int(most))
        elif name == "sentences" and word in ("ordered", "any"):
            view = replace(view, order=word)
        elif name == "sentences" and word == "distinct":
            view = replace(view, distinct=True)
        elif name == "sentences" and key == "of" and value in POOLS:
            view = replace(view, pool=value)
        else:
            raise ValueError(f"{name}({word}): not understood; see docs/training.md, caption views")
    if view.least < 1 or (view.most is not None and view.most < view.least):
        raise ValueError(f"{name}({view.least}..{view.most}): expected 1 <= first <= last")
    if view.distinct and view.least != view.most:
        raise ValueError(f"{name}(distinct): needs one number of sentences, such as sentences(1, distinct)*6")
    return view, options


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
