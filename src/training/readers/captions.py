"""The captions of a sample: one rule for members of a tar file, rows of tables and lines of JSON.

A caption is a text. A list of texts holds alternatives, each a caption of its own. A list of turns, as in the
``conversations`` of ShareGPT and LLaVA, holds the model's answers.
"""

import itertools
import json
from collections.abc import Mapping

from training.readers.faults import BadSample
from training.readers.sentences import join_sentences, split_lines

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
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: object, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value.removeprefix("\ufeff")]
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
