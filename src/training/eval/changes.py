"""Changes of captions for diagnostics: which text, or which of its tokens, a model gets instead. Pure strings.

The changes of sentences are those of DeBias-CLIP (arXiv 2602.22419), with both interpretations of its "move"; a wrong
sentence is added as in CS-CLIP's half-truths (arXiv 2602.23906).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from training.readers.captions import join_split, split_sentences

NEUTRAL = "This is a photo"
QUERY_WORDS = (4, 8, 16)  # lengths of short queries
CARD_TOKENS, CARD_SENTENCES = (10, 20, 40, 77, 128, 248), (1, 2, 3, 4, 6, 8)
MAX_DRAWS = 100


@dataclass(frozen=True)
class Change:
    """One change of all captions.

    Attributes:
        kind: group of changes in results: ``tokens``, ``sentences``, ``sensitivity`` or ``changes``.
        name: name in results, unique within its kind.
        apply: (sentences, seed) -> sentences; None leaves the caption as it is.
        tokenizer: replaces the model's tokenizer.
    """

    kind: str
    name: str
    apply: Callable[[list[str], int], list[str]] | None = None
    tokenizer: Callable | None = None

    def __call__(self, caption: str, seed: int) -> str:
        """Returns the changed caption; the same in every run with this seed."""
        return join_split(self.apply(split_sentences(caption) or [""], seed)) if self.apply else caption


def list_changes(
    tokenizer: Callable,
    tokens: Sequence[int] = (),
    sentences: Sequence[int] = (),
    sensitivity: bool = False,
    diagnostics: bool = False,
) -> list[Change]:
    """Returns the changes that the flags ask for, in the order of tables.

    Args:
        tokenizer: the model's.
        tokens: truncate captions to these numbers of tokens; and to the context length, if there are any.
        sentences: keep these numbers of first sentences; and all, if there are any.
        sensitivity: shuffle sentences, and drop one.
        diagnostics: all changes, including the card's curves.

    Raises:
        ValueError: a length has no room for a word, or the tokenizer can't truncate earlier.
    """
    whole: Any = getattr(tokenizer, "context_length", None)
    shortest = getattr(tokenizer, "num_corners", 0) + 3
    can_cut = whole is not None and getattr(tokenizer, "tokenizer_mode", None) != "clips"
    if tokens and not can_cut:
        raise ValueError("--retrieval-lengths: this model's tokenizer puts a token after the padding; omit the flag")
    if tokens and min(tokens) < shortest:
        raise ValueError(f"--retrieval-lengths {min(tokens)}: expected at least {shortest}, special tokens included")
    if diagnostics:
        sentences = sentences or CARD_SENTENCES
        tokens = tokens or [length for length in CARD_TOKENS if can_cut and length >= shortest]
    lengths = [*sorted(length for length in tokens if length < whole), whole] if tokens else []
    changes = [Change("tokens", str(length), tokenizer=cut_tokenizer(tokenizer, length)) for length in lengths]
    changes += [Change("sentences", str(n), _first(n)) for n in sorted(sentences)]
    changes += [Change("sentences", "all")] if sentences else []
    if sensitivity:
        changes += [Change("sensitivity", "as it is"), Change("sensitivity", "sentences shuffled", shuffle_sentences)]
        changes.append(Change("sensitivity", "one sentence dropped", drop_sentence))
    if diagnostics:
        changes.append(Change("changes", "as it is", lambda sentences, seed: sentences))
        changes += [Change("changes", name, change) for name, change in CHANGES.items()]
    return changes


def cut_tokenizer(tokenizer: Callable, length: int) -> Callable:
    """Returns a tokenizer that keeps at most `length` tokens of each text, special tokens included.

    Args:
        tokenizer: one of ours, or an open_clip tokenizer that ends each text, truncated or not, with its last special
            token, followed only by padding.
        length: number of tokens to keep.
    """
    if hasattr(tokenizer, "num_corners"):  # one of ours, whose towers accept any length
        return partial(tokenizer, context_length=length)
    return partial(_cut_and_pad, tokenizer, length, int(tokenizer([""])[0, -1]))


def _cut_and_pad(tokenizer: Any, length: int, padding: int, texts: list[str]) -> torch.Tensor:
    ids = tokenizer(texts, context_length=length)
    return functional.pad(ids, (0, tokenizer.context_length - ids.shape[1]), value=padding)


def _first(number: int) -> Callable[[list[str], int], list[str]]:
    return lambda sentences, seed: sentences[:number]


def shuffle_sentences(sentences: list[str], seed: int) -> list[str]:
    """Returns the sentences in another order; in the same one if they are all equal."""
    rng, shuffled = random.Random(f"{seed} {join_split(sentences)}"), list(sentences)
    while shuffled == sentences and len(set(sentences)) > 1:
        rng.shuffle(shuffled)
    return shuffled


def drop_sentence(sentences: list[str], seed: int) -> list[str]:
    """Returns the sentences without a random one; a single sentence is returned unchanged."""
    dropped = random.Random(f"{seed} {join_split(sentences)}").randrange(len(sentences))
    return sentences[:dropped] + sentences[dropped + 1 :] if len(sentences) > 1 else sentences


def short_query(sentences: Sequence[str], seed: int, number: int) -> list[str]:
    """Returns a run of words at a random place of one sentence of a caption, as a user might type it.

    Args:
        sentences: the caption.
        seed: seed of the draw.
        number: number of words; a sentence is drawn from those that have at least as many, each run equally likely.

    Returns:
        The query; the caption itself if no sentence is long enough.
    """
    runs = [(words, k) for words in map(str.split, sentences) for k in range(len(words) - number + 1)]
    if not runs:
        return list(sentences)
    words, first = random.Random(f"{seed} {join_split(sentences)}").choice(runs)
    return [" ".join(words[first : first + number])]


def wrong_sentence(captions: Sequence[str], owner: Sequence[int], number: int, seed: int) -> str | None:
    """Draws a sentence of another image's caption.

    Args:
        captions: all captions of a benchmark.
        owner: image of each caption.
        number: the caption to which the sentence does not belong.
        seed: seed of the draw.

    Returns:
        The sentence, which is none of the caption's own; None if `MAX_DRAWS` captions have no such sentence.
    """
    rng, sentences = random.Random(f"{seed} {number} {captions[number]}"), set(split_sentences(captions[number]))
    for _ in range(MAX_DRAWS):
        other = rng.randrange(len(captions))
        different = [s for s in split_sentences(captions[other]) if s not in sentences]
        if owner[other] != owner[number] and different:
            return rng.choice(different)
    return None


def _reordered(*order: int) -> Callable[[list[str], int], list[str]]:
    """Returns a change that reorders the first sentences; a caption with fewer sentences is not changed."""
    return lambda s, seed: s if len(s) < len(order) else [*(s[n] for n in order), *s[len(order) :]]


# A caption that is too short for a change is not changed, and is counted as unchanged.
CHANGES: dict[str, Callable[[list[str], int], list[str]]] = {
    "first sentence dropped": lambda s, seed: s[1:] if len(s) > 1 else s,
    "first moved to fourth place": _reordered(1, 2, 3, 0),
    "first and fourth swapped": _reordered(3, 1, 2, 0),
    "neutral sentence in front": lambda s, seed: [NEUTRAL, *s],
    "4 neutral sentences in front": lambda s, seed: [NEUTRAL] * 4 + s,
    "sentences shuffled": shuffle_sentences,
    "one sentence dropped at random": drop_sentence,
    **{f"query of {n} words": partial(short_query, number=n) for n in QUERY_WORDS},
}
