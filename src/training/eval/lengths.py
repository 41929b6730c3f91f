"""Measures how much of a caption a model uses: recall with truncated or shuffled captions, or without a sentence.

Every variant changes only the captions; images are encoded once. The recall of a model that uses the whole text keeps
growing with the number of tokens; that of a model that uses only the first twenty tokens stops growing after these.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.eval.encode import ComputeOptions, encode_texts
from training.eval.metrics import RankCounts, hit_probability
from training.eval.record import DIRECTIONS
from training.eval.retrieval import RankedSet, count_over_ranks
from training.eval.store import FeatureStore
from training.model.assembly.factory import EncoderParts
from training.readers.sentences import join_split, split_sentences
from training.runtime.distributed import DistEnv

EFFECTIVE_SHARE = 0.95
CARD_TOKENS, CARD_SENTENCES = (10, 20, 40, 77, 128, 248), (1, 2, 3, 4, 6, 8)
NUM_RESAMPLES = 1000
MIN_RIGHT = 10  # with fewer right answers, a curve is considered chance


@dataclass(frozen=True)
class LengthQuestions:
    """What to measure: recall at these numbers of ``tokens`` and ``sentences``, and ``sensitivity`` to their order."""

    tokens: tuple[int, ...] = ()
    sentences: tuple[int, ...] = ()
    sensitivity: bool = False

    def __bool__(self) -> bool:
        return bool(self.tokens or self.sentences or self.sensitivity)


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
    shortest = getattr(tokenizer, "num_corners", 0) + 3
    if min(asked) < shortest:
        raise ValueError(f"--retrieval-lengths {min(asked)}: expected at least {shortest}, special tokens included")
    return [*sorted(length for length in asked if length < tokenizer.context_length), tokenizer.context_length]


def default_questions(tokenizer: Callable) -> LengthQuestions:
    """Returns the curves of a long-text card; without those over tokens if the tokenizer can't truncate earlier."""
    if getattr(tokenizer, "tokenizer_mode", None) == "clips":
        return LengthQuestions(sentences=CARD_SENTENCES)
    shortest = getattr(tokenizer, "num_corners", 0) + 3
    return LengthQuestions(tuple(length for length in CARD_TOKENS if length >= shortest), CARD_SENTENCES)


def analyse_lengths(
    parts: EncoderParts,
    ranked: Sequence[RankedSet],
    questions: LengthQuestions,
    env: DistEnv,
    options: ComputeOptions,
    seed: int = 0,
) -> dict[str, object]:
    """Measures recall with changed captions.

    Args:
        parts: the model.
        ranked: benchmarks, with the features of the original captions.
        questions: what to measure.
        env: the ranks share the encoding.
        options: batch size, workers, precision.
        seed: seed of shuffling and dropping; a caption is changed in the same way in every run.

    Returns:
        ``context_length``. ``sets``: for each title, ``tokens``, ``sentences`` and ``sensitivity``, which map each
        number or change to ``i2t`` and ``t2i`` (R@1 as fractions); in ``sensitivity`` also to ``similarity``, the mean
        cosine with the feature of the original caption. ``effective_length``: tokens for each title, and for ``all``
        benchmarks together; None with fewer than `MIN_RIGHT` right answers. ``effective_length_ci95``: the intervals
        [low, high].

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    tokenizer = parts.tokenizer
    found: dict[str, dict[str, dict]] = {r.pairs.title: {} for r in ranked}
    hits: dict[str, list[np.ndarray]] = {r.pairs.title: [] for r in ranked}

    def note(kind: str, value: object, change: Callable | None, through: Callable = tokenizer) -> None:
        store = FeatureStore(lambda texts: encode_texts(parts.model, through, texts, env, options, count_lost=False))
        for r in ranked:
            changed = store(list(map(change, r.pairs.captions))).features if change else r.texts
            i2t, t2i = count_over_ranks(r.images, changed, r.owner, env)
            own: dict[str, float] = {d: float(hit_probability(c, 1).mean()) for d, c in zip(DIRECTIONS, (i2t, t2i))}
            own |= {"similarity": _similarity(r, changed)} if kind == "sensitivity" else {}
            found[r.pairs.title].setdefault(kind, {})[str(value)] = own
            if kind == "tokens":
                hits[r.pairs.title].append(_hits_by_image(r.owner, i2t, t2i))

    for length in token_lengths(tokenizer, questions.tokens) if questions.tokens else ():
        is_whole = length == tokenizer.context_length
        note("tokens", length, None if is_whole else str, cut_tokenizer(tokenizer, length))
    for number in sorted(questions.sentences):
        note("sentences", number, lambda text: join_split(split_sentences(text)[:number]))
    if questions.sentences:
        note("sentences", "all", None)
    if questions.sensitivity:
        note("sensitivity", "as it is", None)
        note("sensitivity", "sentences shuffled", lambda text: shuffle_sentences(text, seed))
        note("sensitivity", "one sentence dropped", lambda text: drop_sentence(text, seed))
    result = {"context_length": tokenizer.context_length, "sets": found}
    return result | (_effective_lengths(found, hits) if questions.tokens else {})


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


def _similarity(r: RankedSet, changed: torch.Tensor) -> float:
    """Returns the mean cosine between features before and after a change, over captions of two sentences or more."""
    several = torch.tensor([len(split_sentences(text)) > 1 for text in r.pairs.captions])
    return float((r.texts.double() * changed.double()).sum(dim=1)[several].mean()) if several.any() else 1.0


def effective_length(lengths: Sequence[float], recall: Sequence[float]) -> float | None:
    """Returns the number of tokens at which recall first reaches 95% of its best value.

    Recall is interpolated linearly between measured lengths.

    Args:
        lengths: numbers of tokens, ascending.
        recall: recall at each length.

    Returns:
        The number of tokens, at least the shortest length; None if recall is 0 everywhere.
    """
    target = EFFECTIVE_SHARE * max(recall)
    if target == 0:
        return None
    first = next(n for n, value in enumerate(recall) if value >= target)
    if first == 0:
        return float(lengths[0])
    return float(np.interp(target, recall[first - 1 : first + 1], lengths[first - 1 : first + 1]))


def _hits_by_image(owner: torch.Tensor, i2t: RankCounts, t2i: RankCounts) -> np.ndarray:
    """Returns for each image its own hit, the number of hits of its captions, and the number of its captions.

    Returns:
        [num_images, 3].
    """
    captions = np.bincount(owner, hit_probability(t2i, 1).numpy())
    return np.stack([hit_probability(i2t, 1).numpy(), captions, np.bincount(owner)], axis=1)


def _effective_lengths(found: dict[str, dict], hits: dict[str, list[np.ndarray]]) -> dict[str, dict[str, object]]:
    """Returns effective lengths and their 95% intervals for each set, and for the mean over the sets as ``all``.

    Recall is the mean of both directions. Sets near chance get None. Intervals resample the images of each set.

    Args:
        found: title -> ``tokens``, whose keys are the lengths.
        hits: title -> result of `_hits_by_image` at each length.
    """
    rng = np.random.default_rng(0)
    lengths, curves, result, intervals = [], [], {}, {}
    for title, by_length in hits.items():
        lengths = [int(length) for length in found[title]["tokens"]]
        num_images = len(by_length[0])
        weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=NUM_RESAMPLES)
        weights = np.concatenate([np.ones((1, num_images)), weights])  # the first row is the original set
        sums = np.stack([weights @ per_image for per_image in by_length], axis=1)  # [draws, lengths, 3]
        recall = (sums[..., 0] / num_images + sums[..., 1] / sums[..., 2]) / 2
        near_chance = recall[0].max() * by_length[0][:, 2].sum() < MIN_RIGHT
        result[title], intervals[title] = (None, None) if near_chance else _with_interval(lengths, recall)
        if not near_chance:
            curves.append(recall)
    result["all"], intervals["all"] = _with_interval(lengths, np.mean(curves, axis=0)) if curves else (None, None)
    return {"effective_length": result, "effective_length_ci95": intervals}


def _with_interval(lengths: list[int], recall: np.ndarray) -> tuple[float | None, list[float]]:
    """Returns the effective length of the first row of `recall` [1 + draws, lengths], and the others' 95% interval."""
    drawn = [length for curve in recall[1:] if (length := effective_length(lengths, curve.tolist())) is not None]
    return effective_length(lengths, recall[0].tolist()), [float(b) for b in np.percentile(drawn, [2.5, 97.5])]
