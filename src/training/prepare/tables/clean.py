"""Finds and repairs faults of captions.

Captions are written by models, which may refuse to answer, stop in the middle of a sentence or repeat themselves; and
files may have been decoded wrongly at some point.
"""

import re
from typing import NamedTuple

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.readers.sentences import LATIN_TERMINATED, REFUSAL_BEGINS, is_refusal, is_terminated, sentence_ends

# Repair only what is wrong; tokenizers normalise quotes and character widths themselves.
_REPAIR = ftfy.TextFixerConfig(
    uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization=None
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SPACES = re.compile(r"[ \t\r\f\v\u00a0]+")
# Words of ASCII between single spaces and line ends, with isolated Western European characters: wrongly decoded text
# has two of these side by side, and ftfy leaves isolated ones unchanged. "&", "<" and "\\" may begin something that
# needs repair, so they are excluded.
_LETTER = "[\u00c0\u00c1\u00c4-\u00c8\u00c9\u00e0-\u00f6\u00f8-\u00ff\u2013\u2014\u2018\u2019\u201c\u201d\u2026]"
_ASCII = r"[!-%'-;=-\[\]-~]"
_WORD = f"(?:(?:{_LETTER}?{_ASCII})+{_LETTER}?|{_LETTER})"
_USUAL = rf"^{_WORD}(?:[ \n]{_WORD})*$"
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
    cut = long and not is_terminated(tidy)
    return Cleaned(without_cut_sentence(tidy) if cut and trim else tidy, None, repaired, cut)


class CleanedColumn(NamedTuple):
    """A column of captions after cleaning.

    Attributes:
        texts: the captions; null where a caption is not usable.
        refused, repaired, cut_off: bool [num_rows], see `Cleaned`.
    """

    texts: pa.ChunkedArray
    refused: np.ndarray
    repaired: np.ndarray
    cut_off: np.ndarray

    @property
    def is_text(self) -> np.ndarray:
        """Bool [num_rows], True where a caption is usable."""
        return np.asarray(self.texts.is_valid())

    def mark_repaired(self, rows: np.ndarray) -> "CleanedColumn":
        """Marks the captions of rows that were read in another encoding."""
        return self._replace(repaired=self.repaired | (rows & self.is_text))

    def counts(self) -> dict[str, int]:
        """Returns how many captions are kept, empty, refused, repaired and cut off."""
        kept, refused = int(self.is_text.sum()), int(self.refused.sum())
        marks = {"repaired": int(self.repaired.sum()), "cut_off": int(self.cut_off.sum())}
        return {"kept": kept, "empty": len(self.texts) - kept - refused, "refused": refused} | marks


def clean_captions(texts: pa.ChunkedArray, generated: bool, long: bool, trim: bool) -> CleanedColumn:
    """Applies `clean_caption` to a column; texts that certainly need no change are found fast, in Arrow."""
    usual = np.asarray(is_usual(texts, generated, long))
    places = np.flatnonzero(~usual)
    found = [clean_caption(text, generated, long, trim) for text in texts.filter(pa.array(~usual)).to_pylist()]
    marks = np.zeros((3, len(texts)), dtype=bool)
    for row, kind in enumerate(("refused", "repaired", "cut_off")):
        marks[row, places] = [c.fault == "refused" if kind == "refused" else getattr(c, kind) for c in found]
    cleaned = pc.replace_with_mask(texts, pa.array(~usual), pa.array([c.text for c in found], pa.string()))
    return CleanedColumn(cleaned, *marks)


def is_usual(texts: pa.ChunkedArray, generated: bool, long: bool) -> pa.ChunkedArray:
    """Returns which texts `clean_caption` certainly leaves unchanged; it may leave others unchanged as well."""
    usual = pc.and_(pc.match_substring_regex(texts, _USUAL), pc.match_substring_regex(texts, "[0-9A-Za-z]"))
    usual = pc.and_(usual, pc.greater(pc.binary_length(texts), 4))
    if generated:
        suspicious = pc.match_substring_regex(texts, f"{REFUSAL_BEGINS}| AI |rtificial")
        usual = pc.and_(usual, pc.invert(suspicious))
    if long:
        usual = pc.and_(usual, pc.match_substring_regex(pc.utf8_slice_codeunits(texts, -8), LATIN_TERMINATED))
    return pc.fill_null(usual, False)


def repair_text(text: str) -> str:
    """Repairs wrongly decoded text, HTML entities and control characters with ftfy; plain ASCII is left unchanged."""
    if text.isascii() and "&" not in text and (text.isprintable() or not _CONTROL.search(text)):
        return text  # nine of ten captions, in a hundredth of the time
    return ftfy.fix_text(text, _REPAIR).encode("utf-8", "replace").decode("utf-8")


def _tidy(text: str) -> str:
    r"""Replaces newlines written as ``\n`` by real ones, and repeated spaces by single ones."""
    if "\\n" in text:
        text = text.replace("\\n", "\n")
    text = text.strip()
    if "\n" in text:
        return "\n".join(line for line in (_SPACES.sub(" ", line).strip() for line in text.split("\n")) if line)
    return _SPACES.sub(" ", text) if "  " in text or "\t" in text or not text.isascii() else text


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
