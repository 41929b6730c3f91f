"""Changes of captions for diagnostics: which text, or which of its tokens, a model gets instead. Pure strings.

The changes of sentences are those of DeBias-CLIP (arXiv 2602.22419), with both interpretations of its "move"; a wrong
sentence is added as in CS-CLIP's half-truths (arXiv 2602.23906).
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from training.readers.sentences import join_split, split_sentences

NEUTRAL = "This is a photo"
QUERY_WORDS = (4, 8, 16)  # lengths of short queries
CARD_TOKENS, CARD_SENTENCES = (10, 20, 40, 77, 128, 248), (1, 2, 3, 4, 6, 8)
MAX_DRAWS = 100


@dataclass(frozen=True)
class Questions:
    """What to measure.

    Attributes:
        tokens: recall with captions truncated to these numbers of tokens.
        sentences: recall with these numbers of first sentences.
        sensitivity: recall with sentences shuffled, and with one dropped.
        diagnostics: all changes, and measures of single sentences.
    """

    tokens: tuple[int, ...] = ()
    sentences: tuple[int, ...] = ()
    sensitivity: bool = False
    diagnostics: bool = False

    def __bool__(self) -> bool:
        return bool(self.tokens or self.sentences or self.sensitivity or self.diagnostics)

    def checked(self, tokenizer: Callable) -> "Questions":
        """Returns the questions with the lengths to measure; `diagnostics` includes the card's curves.

        Raises:
            ValueError: a length has no room for a word, or the tokenizer can't truncate earlier.
        """
        tokens, sentences = self.tokens, self.sentences
        if self.diagnostics:
            sentences = sentences or CARD_SENTENCES
            if not tokens and getattr(tokenizer, "tokenizer_mode", None) != "clips":
                tokens = tuple(length for length in CARD_TOKENS if length >= _shortest(tokenizer))
        tokens = tuple(token_lengths(tokenizer, tokens)) if tokens else ()
        return replace(self, tokens=tokens, sentences=tuple(sorted(sentences)))


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


def list_changes(questions: Questions, tokenizer: Callable) -> list[Change]:
    """Returns the changes that the questions ask for, in the order of tables."""
    whole = getattr(tokenizer, "context_length", None)
    changes = [
        Change("tokens", str(length), tokenizer=None if length == whole else cut_tokenizer(tokenizer, length))
        for length in questions.tokens
    ]
    changes += [Change("sentences", str(n), lambda own, seed, n=n: own[:n]) for n in questions.sentences]
    changes += [Change("sentences", "all")] if questions.sentences else []
    if questions.sensitivity:
        changes.append(Change("sensitivity", "as it is"))
        names = {"sentences shuffled": "sentences shuffled", "one sentence dropped": "one sentence dropped at random"}
        changes += [Change("sensitivity", name, CHANGES[change]) for name, change in names.items()]
    if questions.diagnostics:
        changes += [Change("changes", name, change) for name, change in {"as it is": _same, **CHANGES}.items()]
    return changes


def _shortest(tokenizer: Callable) -> int:
    return getattr(tokenizer, "num_corners", 0) + 3


class CutTokenizer:
    """Truncates texts to fewer tokens than an open_clip tokenizer does, and pads them to the model's context length.

    Args:
        tokenizer: an open_clip tokenizer that ends each text, truncated or not, with its last special token, followed
            only by padding.
        length: number of tokens to keep, special tokens included.
    """

    def __init__(self, tokenizer: Callable, length: int):
        self.tokenizer, self.length = tokenizer, length
        self._fill = int(tokenizer([""])[0, -1])

    def __call__(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(texts, context_length=self.length)
        full = torch.full((len(texts), self.tokenizer.context_length), self._fill, dtype=ids.dtype)
        full[:, : ids.shape[1]] = ids
        return full


def cut_tokenizer(tokenizer: Callable, length: int) -> Callable:
    """Returns a tokenizer that keeps at most `length` tokens of each text."""
    if hasattr(tokenizer, "num_corners"):  # one of ours, whose towers accept any length
        tokenizer = copy.copy(tokenizer)
        tokenizer.context_length = length
        return tokenizer
    return CutTokenizer(tokenizer, length)


def token_lengths(tokenizer: Callable, asked: Sequence[int]) -> list[int]:
    """Returns the lengths to measure, ascending: those below the context length, and the context length itself.

    Raises:
        ValueError: a length has no room for a word, or the tokenizer can't truncate earlier.
    """
    if getattr(tokenizer, "tokenizer_mode", None) == "clips":
        raise ValueError("--retrieval-lengths: this model's tokenizer puts a token after the padding; omit the flag")
    if min(asked) < _shortest(tokenizer):
        found = f"--retrieval-lengths {min(asked)}"
        raise ValueError(f"{found}: expected at least {_shortest(tokenizer)}, special tokens included")
    return [*sorted(length for length in asked if length < tokenizer.context_length), tokenizer.context_length]


def shuffle_sentences(text: str, seed: int) -> str:
    """Returns a caption with its sentences shuffled; the order always changes if two sentences are distinct."""
    sentences = split_sentences(text)
    if len(set(sentences)) < 2:
        return text
    rng, shuffled = random.Random(f"{seed} {text}"), list(sentences)
    while shuffled == sentences:
        rng.shuffle(shuffled)
    return join_split(shuffled)


def drop_sentence(text: str, seed: int) -> str:
    """Returns a caption without one random sentence; a single sentence is returned unchanged."""
    sentences = split_sentences(text)
    if len(sentences) < 2:
        return text
    del sentences[random.Random(f"{seed} {text}").randrange(len(sentences))]
    return join_split(sentences)


def short_query(sentences: Sequence[str], number: int, seed: int) -> list[str]:
    """Returns a run of words at a random place of one sentence of a caption, as a user might type it.

    Args:
        sentences: the caption.
        number: number of words; a sentence is drawn from those that have at least as many, each run equally likely.
        seed: seed of the draw.

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
    rng, own = random.Random(f"{seed} {number} {captions[number]}"), set(split_sentences(captions[number]))
    for _ in range(MAX_DRAWS):
        other = rng.randrange(len(captions))
        different = [s for s in split_sentences(captions[other]) if s not in own]
        if owner[other] != owner[number] and different:
            return rng.choice(different)
    return None


def _same(own: list[str], seed: int) -> list[str]:
    return own


def _reordered(*order: int) -> Callable[[list[str], int], list[str]]:
    """Returns a change that reorders the first sentences; a caption with fewer sentences is not changed."""
    return lambda own, seed: own if len(own) < len(order) else [*(own[n] for n in order), *own[len(order) :]]


# A caption that is too short for a change is not changed, and is counted as unchanged.
CHANGES: dict[str, Callable[[list[str], int], list[str]]] = {
    "first sentence dropped": lambda own, seed: own[1:] if len(own) > 1 else own,
    "first moved to fourth place": _reordered(1, 2, 3, 0),
    "first and fourth swapped": _reordered(3, 1, 2, 0),
    "neutral sentence in front": lambda own, seed: [NEUTRAL, *own],
    "4 neutral sentences in front": lambda own, seed: [NEUTRAL] * 4 + own,
    "sentences shuffled": lambda own, seed: split_sentences(shuffle_sentences(join_split(own), seed)),
    "one sentence dropped at random": lambda own, seed: split_sentences(drop_sentence(join_split(own), seed)),
    **{f"query of {n} words": lambda own, seed, n=n: short_query(own, n, seed) for n in QUERY_WORDS},
}
