"""The text rule that every long-caption benchmark shares. Pure strings, no files."""

import re

# A decimal point splits too ("3.5 m" -> "3. 5 m"): the published numbers depend on it.
_SENTENCE_END = re.compile(r"\n|</s>|\.")


def split_caption(text: str) -> list[str]:
    """Splits a caption at every newline, ``</s>`` and full stop; strips the parts and drops the empty ones."""
    return [part for part in (part.strip() for part in _SENTENCE_END.split(text)) if part]


def normalise_caption(text: str) -> str:
    """Returns the caption as the benchmarks pass it to a tokenizer: its sentences joined by ``". "``.

    Source: the retrieval loaders of LoTLIP (arXiv 2410.05249), which treat DCI, IIW, ShareGPT4V and Urban1k alike.
    """
    return ". ".join(split_caption(text))
