"""What is wrong with a caption, and what can be repaired. Pure strings.

Captions come from models: they refuse, they stop in the middle of a sentence, they repeat themselves; and files have
been through wrong encodings on the way.
"""

import re
from typing import NamedTuple

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Only what makes text wrong; the tokenizers straighten quotes and widths themselves.
_REPAIR = ftfy.TextFixerConfig(
    uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization=None
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SPACES = re.compile(r"[ \t\r\f\v\u00a0]+")
_APOLOGY = r"(?:i['\u2019]?m|i am|we['\u2019]?re|we are)?\s*(?:very |so |really |truly |deeply )?sorry"
_CANNOT = (
    r"(?:can\s?not|can['\u2019]?t|could not|couldn['\u2019]?t|am unable to|['\u2019]m unable to|am not able to|"
    r"['\u2019]m not able to|do not have the ability|don['\u2019]?t have the ability|won['\u2019]?t be able to|"
    r"am afraid i can|['\u2019]m afraid i can|must decline|will not|am just an? |['\u2019]m just an? )"
)
_REFUSAL = re.compile(
    rf"\W*(?:{_APOLOGY}\b(?!\s+(?:state|sight|looking))|sorry\s*,|(?:i|we) apologi[sz]e|my apologies|apologies\s*,|"
    rf"unfortunately\s*,?\s*(?:i|we|as an ai|no image|there is no image)\b|"
    rf"(?:as|i am|i['\u2019]?m) an? (?:ai|artificial intelligence|language model|text-based)\b|"
    rf"i\s*{_CANNOT}|"
    rf"(?:there (?:is|was) )?no image (?:is |was |has been )?(?:provided|attached|given|shown|available|uploaded)|"
    rf"(?:please|could you(?: please)?|can you(?: please)?) (?:provide|upload|share|attach)\b.{{0,40}}\bimage)",
    re.IGNORECASE,
)
_AS_AN_AI = re.compile(r"\b[Aa]s an? (?:AI|[Aa]rtificial [Ii]ntelligence)(?: language)? (?:model|assistant)\b")
_END = re.compile("[.!?\u3002][\"'\u201d\u2019)\\]]*$")
_SENTENCE = re.compile(r"(?<!\w\.\w)[.!?][\"'\u201d\u2019)\]]*(?=\s)|\u3002")
# For RE2, in which words and spaces are ASCII: any text that _REFUSAL matches is matched by this, too.
_MAY_REFUSE = re.sub(r"\(\?!.*?\)\)|\\b", "", _REFUSAL.pattern).replace("\\u2019", "\u2019")
# Words of ASCII between single spaces and line ends, with characters of Western Europe that stand alone: text decoded
# wrongly has two such neighbours, and ftfy leaves a single one alone. "&", "<" and "\\" may begin something to repair.
_LETTER = "[\u00c0\u00c1\u00c4-\u00c8\u00c9\u00e0-\u00f6\u00f8-\u00ff\u2013\u2014\u2018\u2019\u201c\u201d\u2026]"
_ASCII = r"[!-%'-;=-\[\]-~]"
_WORD = f"(?:(?:{_LETTER}?{_ASCII})+{_LETTER}?|{_LETTER})"
_USUAL = rf"^{_WORD}(?:[ \n]{_WORD})*$"
_LIST_NUMBER = re.compile(r"(?:^|\s)\d{1,2}[.!?]$")


class Cleaned(NamedTuple):
    """A caption after cleaning.

    Attributes:
        text: the caption; None if nothing usable is left of it.
        fault: ``empty`` or ``refused`` then.
        repaired: whether its encoding was mended.
        cut_off: whether its last sentence is not complete; where others come before it, it has been taken off.
    """

    text: str | None
    fault: str | None = None
    repaired: bool = False
    cut_off: bool = False


def clean_caption(text: str | None, generated: bool = True, long: bool = False, trim: bool = True) -> Cleaned:
    """Repairs a caption, or says why it is none.

    Args:
        text: as the table has it.
        generated: written by a model, which may have refused.
        long: whole sentences are expected, of which the last may be cut off.
        trim: take a cut-off last sentence away.
    """
    if not text:
        return Cleaned(None, "empty")
    if "</s>" in text:  # before the repair, which takes text with tags for HTML and leaves its entities alone
        text = text.replace("</s>", "\n")
    mended = repair_text(text)
    repaired = mended != text
    tidy = _tidy(mended)
    if not tidy or tidy.lower() in ("nan", "none", "null", "n/a") or not any(map(str.isalnum, tidy)):
        return Cleaned(None, "empty", repaired)
    if generated and is_refusal(tidy):
        return Cleaned(None, "refused", repaired)
    cut = long and is_cut_off(tidy)
    return Cleaned(without_cut_sentence(tidy) if cut and trim else tidy, None, repaired, cut)


class CleanedColumn(NamedTuple):
    """A column of captions after cleaning.

    Attributes:
        texts: the captions; null where nothing usable is left.
        refused, repaired, cut_off: bool [num_rows], as in `Cleaned`.
    """

    texts: pa.ChunkedArray
    refused: np.ndarray
    repaired: np.ndarray
    cut_off: np.ndarray

    @property
    def is_text(self) -> np.ndarray:
        """bool [num_rows], where a caption is left."""
        return np.asarray(self.texts.is_valid())

    def mark_repaired(self, rows: np.ndarray) -> "CleanedColumn":
        """Marks the captions of rows that were read in another encoding."""
        return self._replace(repaired=self.repaired | (rows & self.is_text))

    def counts(self) -> dict[str, int]:
        """How many captions are kept, empty, refused, repaired and cut off."""
        kept, refused = int(self.is_text.sum()), int(self.refused.sum())
        marks = {"repaired": int(self.repaired.sum()), "cut_off": int(self.cut_off.sum())}
        return {"kept": kept, "empty": len(self.texts) - kept - refused, "refused": refused} | marks


def clean_captions(texts: pa.ChunkedArray, generated: bool, long: bool, trim: bool) -> CleanedColumn:
    """Cleans a column as `clean_caption` cleans each text; texts that certainly stay as they are cost little."""
    usual = np.asarray(is_usual(texts, generated, long))
    places = np.flatnonzero(~usual)
    found = [clean_caption(text, generated, long, trim) for text in texts.filter(pa.array(~usual)).to_pylist()]
    marks = np.zeros((3, len(texts)), dtype=bool)
    for row, kind in enumerate(("refused", "repaired", "cut_off")):
        marks[row, places] = [c.fault == "refused" if kind == "refused" else getattr(c, kind) for c in found]
    cleaned = pc.replace_with_mask(texts, pa.array(~usual), pa.array([c.text for c in found], pa.string()))
    return CleanedColumn(cleaned, *marks)


def is_usual(texts: pa.ChunkedArray, generated: bool, long: bool) -> pa.ChunkedArray:
    """Tells which texts `clean_caption` certainly leaves as they are. Most captions are; the others may be."""
    usual = pc.and_(pc.match_substring_regex(texts, _USUAL), pc.match_substring_regex(texts, "[0-9A-Za-z]"))
    usual = pc.and_(usual, pc.greater(pc.binary_length(texts), 4))
    if generated:
        suspicious = pc.match_substring_regex(texts, f"(?i)^(?:{_MAY_REFUSE})| AI |rtificial")
        usual = pc.and_(usual, pc.invert(suspicious))
    if long:
        usual = pc.and_(usual, pc.match_substring_regex(pc.utf8_slice_codeunits(texts, -8), _END.pattern))
    return pc.fill_null(usual, False)


def repair_text(text: str) -> str:
    """Mends wrongly decoded text, HTML entities and control characters, with ftfy; plain ASCII is left alone."""
    if text.isascii() and "&" not in text and (text.isprintable() or not _CONTROL.search(text)):
        return text  # nine of ten captions, at a hundredth of the time
    return ftfy.fix_text(text, _REPAIR).encode("utf-8", "replace").decode("utf-8")


def _tidy(text: str) -> str:
    """Without written-out newlines and double spaces."""
    if "\\n" in text:
        text = text.replace("\\n", "\n")
    text = text.strip()
    if "\n" in text:
        return "\n".join(line for line in (_SPACES.sub(" ", line).strip() for line in text.split("\n")) if line)
    return _SPACES.sub(" ", text) if "  " in text or "\t" in text or not text.isascii() else text


def is_refusal(text: str) -> bool:
    """Whether a model speaks of itself instead of the image; only how a caption begins counts, or "as an AI model"."""
    if _REFUSAL.match(text[:200]):
        return True
    return (" AI " in text or "rtificial" in text) and bool(_AS_AN_AI.search(text))


def is_cut_off(text: str) -> bool:
    """Whether a long caption ends without the end of a sentence."""
    return not _END.search(text[-8:])


def without_cut_sentence(text: str) -> str:
    """Takes an unfinished last sentence away, if that leaves at least half of the text: else it is no prose."""
    ends = [match.end() for match in _SENTENCE.finditer(text) if not _LIST_NUMBER.search(text[: match.end()][-4:])]
    return text[: ends[-1]] if ends and 2 * ends[-1] >= len(text) else text


def is_repetitive(text: str, longest: int = 12, times: int = 4) -> bool:
    """Whether a text ends in the same words over and over, as a model does that found no end.

    Args:
        text: any text.
        longest: most words of the part that repeats.
        times: how often it has to come in a row.
    """
    words = text.lower().split()
    for size in range(1, longest + 1):
        if size * times > len(words):
            return False
        for shift in range(size):  # the last time round may have been cut in the middle
            tail = words[len(words) - shift - size * times : len(words) - shift]
            if len(tail) == size * times and tail == tail[:size] * times:
                return True
    return False
