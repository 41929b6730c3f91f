"""Captions: those of a sample, their lines and sentences, and refusals of models.

One rule for members of a tar file, rows of tables and lines of JSON: a caption is a text. A list of texts holds
alternatives, each a caption of its own, also if it is written as a text, as in a CSV. A list of turns, as in the
``conversations`` of ShareGPT and LLaVA, holds the model's answers.
"""

import ast
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import regex
import yaml

from training.readers.faults import BadSample

CAPTION_LISTS = ("alternatives", "sentences")
_MODELS = ("gpt", "assistant", "model", "chatgpt", "bot")
_OTHERS = ("human", "user", "system", "tool")


def read_record(files: Mapping[str, bytes]) -> dict:
    """Returns the entries of a sample's ``json`` file, and the content of its ``txt`` file under ``txt``.

    Args:
        files: suffix -> content. A byte order mark, and white space around a ``txt``, are no part of the content.

    Raises:
        BadSample: a file is not UTF-8, or the JSON is broken or not an object.
    """
    try:
        texts = {suffix: files[suffix].decode("utf-8-sig") for suffix in ("json", "txt") if suffix in files}
        record = json.loads(texts["json"]) if "json" in texts else {}
    except UnicodeDecodeError as error:
        raise BadSample("text not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("broken JSON") from error
    if not isinstance(record, dict):
        raise BadSample("JSON not an object")
    return {"txt": texts["txt"].strip()} | record if "txt" in texts else record


def caption_texts(value: object, where: str = "", lists: str = "alternatives", lines: bool = False) -> list[str]:
    """Returns the captions in a value, unchanged; empty ones are left out.

    Args:
        value: a text, UTF-8 bytes, a list of these, a conversation, or None.
        where: what the message of an error begins with.
        lists: ``alternatives``: each text of a list is a caption; ``sentences``: a list is one caption.
        lines: each line of a text is a caption, whatever `lists` says.

    Raises:
        ValueError: the value is something else.
    """
    texts = [text for text in _texts(value, where) if text.strip()]
    if lines:
        return [line.strip() for text in texts for line in split_lines(text) if line.strip()]
    return [join_sentences([text.strip() for text in texts])] if lists == "sentences" and len(texts) > 1 else texts


def is_unicode(text: str) -> bool:
    """Returns whether a text can be encoded: JSON may contain half a surrogate pair, which tokenizers don't accept."""
    return re.search("[\ud800-\udfff]", text) is None


def _texts(value: object, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return _written_list(value) or [value.removeprefix("\ufeff")]
    if isinstance(value, bytes):
        try:
            return [value.decode("utf-8-sig")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: bytes that are not UTF-8, expected a text") from error
    turns = _turns(value)
    if turns:
        return [text for turn in turns for text in _answer(*turn, where)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, where)]
    shown = str(value)[:60]
    raise ValueError(f"{where}: {type(value).__name__} {shown}, expected a text or a list of texts")


def _written_list(text: str) -> list[str]:
    """Returns the texts of a list in a text, as JSON or as pandas writes it to a CSV; nothing for any other text."""
    if text[:2] not in ('["', "['") or text[-2:] not in ('"]', "']"):
        return []
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = read(text)
            # Python reads "['a' 'b']", an array of NumPy, as one text.
            if all(isinstance(t, str) for t in found) and (read is json.loads or repr(found) == text):
                return found
    return []


def _turns(value: object) -> list[tuple[object, object]]:
    """Returns (speaker, content) for each turn of a conversation; an empty list for anything else."""
    for speaker, content in (("from", "value"), ("role", "content")):
        if isinstance(value, dict) and isinstance(value.get(speaker), list) and isinstance(value.get(content), list):
            return list(zip(value[speaker], value[content]))  # the form of a `datasets` sequence
        if isinstance(value, list) and value and all(isinstance(turn, dict) and content in turn for turn in value):
            # Without speakers, questions and answers take turns.
            turns = zip(value, itertools.cycle(("human", "gpt")))
            return [(turn.get(speaker, usual), turn[content]) for turn, usual in turns]
    return []


def _answer(speaker: object, content: object, where: str) -> list[str]:
    if str(speaker).lower() in _OTHERS:
        return []
    if str(speaker).lower() not in _MODELS:
        raise ValueError(f"{where}: a turn of {str(speaker)[:40]!r}, expected one of {', '.join((*_OTHERS, *_MODELS))}")
    if isinstance(content, list):  # parts of several kinds
        content = [item.get("text") if isinstance(item, dict) else item for item in content]
    return _texts(content, where)


# --- The published split of the benchmarks -------------------------------------------------------------------------

# A decimal point splits too ("3.5 m" -> "3. 5 m"): the published numbers depend on it.
_PUBLISHED_END = re.compile(r"\n|</s>|\.")


def split_caption(text: str) -> list[str]:
    """Splits a caption at every newline, ``</s>`` and full stop; strips the parts and drops the empty ones.

    This is the published rule of the benchmarks. For any other purpose, use `split_sentences`.
    """
    return [part for part in (part.strip() for part in _PUBLISHED_END.split(text)) if part]


def normalise_caption(text: str) -> str:
    """Returns the caption as the benchmarks pass it to a tokenizer: its sentences joined by ``". "``.

    Source: the retrieval loaders of LoTLIP (arXiv 2410.05249), which treat DCI, IIW, ShareGPT4V and Urban1k alike.
    """
    return ". ".join(split_caption(text))


# --- Lines ---------------------------------------------------------------------------------------------------------


def split_lines(text: str) -> list[str]:
    """Splits a text at the line ends of files: LF, CR LF and CR.

    `str.splitlines` also splits at U+2028 and other characters that occur inside captions.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


# --- Sentences -----------------------------------------------------------------------------------------------------


# A mark of another script ends a sentence whatever follows: \u3002 in Chinese, \u0964 in Hindi, \u061f in Arabic, and
# others. A Latin mark ends it before white space, and a full stop also between a small and a capital letter; but
# not after the number of a list ("1. A dog") or an abbreviation like "e.g.".
def _end(terminal: str, other: str, closing: str, letter: str, lower: str, upper: str) -> str:
    no_list_or_abbreviation = rf"(?<!{letter}\.{letter}\.)(?<!\s\d\.)(?<!\s\d\d\.)(?<!^\d\.)(?<!^\d\d\.)"
    return (
        rf"[{terminal}\n\r<](?:(?P<break>(?<=[\n\r])|(?<=<)/s>)|(?<={other})[{terminal}]*[{closing}]*|"
        rf"(?:(?<=[!?])|(?<=\.){no_list_or_abbreviation})"
        rf"(?:[.!?]*[{closing}]*(?=\s|$|</s>)|(?<={lower}\.)(?={upper})))"
    )


_TERMINAL, _CLOSING = r"\p{Sentence_Terminal}", r"\"'\p{Pe}\p{Pf}"
_END = regex.compile("(?V1)" + _end(_TERMINAL, rf"[{_TERMINAL}--[.!?]]", _CLOSING, r"\p{L}", r"\p{Ll}", r"\p{Lu}"))
_ASCII_END = re.compile(_end(".!?", "(?!)", r"\"')}\]", "[A-Za-z]", "[a-z]", "[A-Z]"))  # in a third of the time
_TERMINATED = regex.compile(f"{_TERMINAL}[{_CLOSING}]*$")


def _ends(text: str) -> Iterator[re.Match]:
    return (_ASCII_END if text.isascii() else _END).finditer(text)


def sentence_ends(text: str) -> list[int]:
    """Returns the positions after the sentences that end in a mark: ``.``, ``!``, ``?`` or one of another script."""
    return [end.end() for end in _ends(text) if end["break"] is None]


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences, which end at a line break, ``</s>`` or a sentence mark of any script.

    Full stops at their ends are removed, other marks are kept; `join_split` is the reverse.
    """
    pieces, start = [], 0
    for end in _ends(text):
        pieces.append(text[start : end.end() if end["break"] is None else end.start()])
        start = end.end()
    pieces.append(text[start:])
    return [piece for piece in (piece.strip().rstrip(".").rstrip() for piece in pieces) if piece]


def join_split(sentences: Sequence[str]) -> str:
    """Joins what `split_sentences` returns: by ``". "``, or by a space after a sentence that kept its mark."""
    text = ""
    for sentence in sentences:
        if text:
            text += " " if is_terminated(text) else ". "
        text += sentence
    return text


def first_sentence(text: str) -> tuple[str, str]:
    """Returns (the first of `split_sentences`, the text after it)."""
    for end in _ends(text):
        first = split_sentences(text[: end.end()])
        if first:
            return first[0], text[end.end() :]
    return (*split_sentences(text), text.strip())[0], ""


def is_terminated(text: str) -> bool:
    """Returns whether a text ends in a sentence mark of any script, with or without closing quotes and brackets."""
    return _TERMINATED.search(text[-8:]) is not None


def join_sentences(sentences: Sequence[str]) -> str:
    """Joins sentences to one text; adds a full stop to sentences that don't end in a sentence mark of any script."""
    text = join_split(sentences)
    return text if is_terminated(text) else f"{text}."


# --- Refusals of models --------------------------------------------------------------------------------------------

_RULES = yaml.safe_load(Path(__file__).with_name("refusals.yaml").read_text(encoding="utf-8"))
_ANSWER, _APOLOGY, _OF_A_MODEL, _QUOTED = (
    "|".join(_RULES[name].splitlines()) for name in ("answers", "apologies", "of_a_model", "quoted")
)
_BEGINS = rf"\W*(?:(?P<answer>{_ANSWER})|(?:{_APOLOGY}))\b(?!\s+(?:state|sight|looking))"
_AS_AN_AI = re.compile(r"\b[Aa]s an? (?:AI|[Aa]rtificial [Ii]ntelligence)(?: language)? (?:model|assistant)\b")


def is_refusal(text: str) -> bool:
    """Returns whether a model refused to answer: a refusal at the beginning, or "as an AI model" anywhere.

    An apology that the image shows ("Sorry, we are closed, says a sign") is part of a description.
    """
    if (" AI " in text or "rtificial" in text) and _AS_AN_AI.search(text):
        return True
    beginning = text[:200]
    begins = re.match(_BEGINS, beginning, re.IGNORECASE)
    if begins is None or re.search(_QUOTED, beginning, re.IGNORECASE):
        return False
    rest = beginning[begins.end() :]
    return begins["answer"] is not None or re.search(_OF_A_MODEL, rest, re.IGNORECASE) is not None
