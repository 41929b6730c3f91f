"""Rules that split captions into sentences. Pure strings, no files."""

import re
from collections.abc import Sequence

import regex

# A decimal point splits too ("3.5 m" -> "3. 5 m"): the published numbers depend on it.
_SENTENCE_END = re.compile(r"\n|</s>|\.")
# Unicode's sentence terminals but those of Latin scripts, to which the published rule applies: 。！？ in Chinese and
# Japanese, । in Hindi, ؟ and ۔ in Arabic and Urdu, and others.
_OTHER_TERMINAL = r"[\p{Sentence_Terminal}--[.!?]]"
_ANY_END = regex.compile(rf"(?V1)\n|</s>|\.|(?<={_OTHER_TERMINAL})")
_FIRST_END = regex.compile(rf"(?V1)\. |(?<={_OTHER_TERMINAL})")
_TERMINAL = regex.compile(r"\p{Sentence_Terminal}")
_OTHER = regex.compile(rf"(?V1){_OTHER_TERMINAL}")


def split_caption(text: str) -> list[str]:
    """Splits a caption at every newline, ``</s>`` and full stop; strips the parts and drops the empty ones.

    This is the published rule of the benchmarks. For any other purpose, `split_sentences` knows other scripts, too.
    """
    return [part for part in (part.strip() for part in _SENTENCE_END.split(text)) if part]


def normalise_caption(text: str) -> str:
    """Returns the caption as the benchmarks pass it to a tokenizer: its sentences joined by ``". "``.

    Source: the retrieval loaders of LoTLIP (arXiv 2410.05249), which treat DCI, IIW, ShareGPT4V and Urban1k alike.
    """
    return ". ".join(split_caption(text))


def split_sentences(text: str) -> list[str]:
    """Splits a caption like `split_caption`, and also after the sentence marks of other scripts, which are kept."""
    if text.isascii():  # the same result at a tenth of the time
        return split_caption(text)
    return [part for part in (part.strip() for part in _ANY_END.split(text)) if part]


def join_split(sentences: Sequence[str]) -> str:
    """Joins what `split_sentences` returns: by ``". "``, or by a space after a sentence that kept its mark."""
    text = ""
    for sentence in sentences:
        if text:
            text += " " if _OTHER.match(text[-1]) else ". "
        text += sentence
    return text


def first_sentence(text: str) -> tuple[str, str]:
    """Returns (the first sentence, the rest). Sentences end at ``". "`` or after a sentence mark of another script."""
    first, *rest = _FIRST_END.split(text, maxsplit=1)
    return first, "".join(rest)


def is_terminated(text: str) -> bool:
    """Tells whether a text ends in a sentence mark: ``.``, ``!``, ``?`` or one of another script."""
    return _TERMINAL.match(text[-1:]) is not None
