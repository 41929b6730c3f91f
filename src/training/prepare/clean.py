"""Finds and repairs faults of captions.

Captions are written by models, which may refuse to answer, stop in the middle of a sentence or repeat themselves; and
files may have been decoded wrongly at some point.
"""

import re
from typing import NamedTuple

import ftfy

from training.readers.captions import is_refusal, is_terminated, sentence_ends

# Repair only what is wrong; tokenizers normalise quotes and character widths themselves.
_REPAIR = ftfy.TextFixerConfig(
    uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization=None
)
_CONTROL = "&\x00-\x08\x0b\x0c\x0e-\x1f\x7f"
# Wrongly decoded text has two characters beyond ASCII side by side, or others than letters and marks of Western Europe.
_LETTERS = "\u00c0\u00c1\u00c4-\u00c9\u00e0-\u00f6\u00f8-\u00ff\u2013\u2014\u2018\u2019\u201c\u201d\u2026"
_ASCII_FAULT = re.compile(f"[{_CONTROL}]")
_FAULT = re.compile(rf"[{_CONTROL}]|[^\x00-\x7f{_LETTERS}]|[^\x00-\x7f]{{2}}")
_SPACES = re.compile(r"[ \t\r\f\v\u00a0]{2,}|[\t\r\f\v\u00a0]")
_LONGEST_LOOP, _LOOPS = 12, 4  # words that a model repeats at the end of a text, and how often at least


class Cleaned(NamedTuple):
    """A caption after cleaning.

    Attributes:
        text: the caption; None if it is not usable.
        fault: ``empty`` or ``refused`` if it is not usable.
        repaired: whether its encoding was repaired.
        cut_off: whether its last sentence was incomplete; see `without_cut_sentence` for its removal.
    """

    text: str | None
    fault: str | None = None
    repaired: bool = False
    cut_off: bool = False


def clean_caption(text: str | None, generated: bool = True, long: bool = False, trim: bool = True) -> Cleaned:
    """Repairs a caption, or says why it is not usable.

    Args:
        text: the text in the table.
        generated: the caption was written by a model, which may have refused.
        long: the caption should consist of complete sentences, of which the last may be cut off.
        trim: remove a cut-off last sentence.
    """
    if not text:
        return Cleaned(None, "empty")
    if "</s>" in text:  # before the repair, which doesn't decode entities in text with tags
        text = text.replace("</s>", "\n")
    mended = repair_text(text)
    repaired = mended != text
    tidy = _tidy(mended)
    if not tidy or tidy.lower() in ("nan", "none", "null", "n/a") or not any(map(str.isalnum, tidy)):
        return Cleaned(None, "empty", repaired)
    if generated and is_refusal(tidy):
        return Cleaned(None, "refused", repaired)
    cut = long and tidy[-1] not in ".!?" and not is_terminated(tidy)
    return Cleaned(without_cut_sentence(tidy) if cut and trim else tidy, None, repaired, cut)


def repair_text(text: str) -> str:
    """Repairs wrongly decoded text, HTML entities and control characters with ftfy."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # nine of ten captions, in a hundredth of the time
    if not (_ASCII_FAULT if text.isascii() else _FAULT).search(text):
        return text
    return ftfy.fix_text(text, _REPAIR).encode("utf-8", "replace").decode("utf-8")


def _tidy(text: str) -> str:
    r"""Replaces newlines written as ``\n`` by real ones, and repeated spaces by single ones."""
    if "\\n" in text:
        text = text.replace("\\n", "\n")
    text = text.strip()
    if text.isprintable() and "  " not in text:  # neither line ends nor other spaces are printable
        return text
    return "\n".join(filter(None, map(str.strip, _SPACES.sub(" ", text).split("\n"))))


def without_cut_sentence(text: str) -> str:
    """Removes an incomplete last sentence if at least half of the text remains; otherwise the text is not prose."""
    ends = sentence_ends(text)
    return text[: ends[-1]] if ends and 2 * ends[-1] >= len(text) else text


def is_repetitive(text: str) -> bool:
    """Returns whether a text ends in up to `_LONGEST_LOOP` words repeated `_LOOPS` times, as by a model in a loop."""
    words = text.lower().split()
    for size in range(1, _LONGEST_LOOP + 1):
        if size * _LOOPS > len(words):
            return False
        for shift in range(size):  # the last repetition may be incomplete
            tail = words[len(words) - shift - size * _LOOPS : len(words) - shift]
            if len(tail) == size * _LOOPS and tail == tail[:size] * _LOOPS:
                return True
    return False
