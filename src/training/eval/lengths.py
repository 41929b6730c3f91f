"""How much of a caption a model makes use of: recall with captions cut, shuffled, or short of a sentence.

Every variant changes the captions alone; images are encoded once. A model that reads a text to its end gains with every
token; one that looks at the first twenty gains nothing after them.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dataloaders.captions import split_caption
from training.eval.encode import ComputeOptions, Encoding, encode_texts
from training.eval.metrics import hit_probability
from training.eval.record import DIRECTIONS
from training.eval.retrieval import RankedSet, RetrievalWork, rank_sets
from training.model.factory import EncoderParts
from training.runtime.distributed import DistEnv

EFFECTIVE_SHARE = 0.95
CARD_TOKENS, CARD_SENTENCES = (10, 20, 40, 77, 128, 248), (1, 2, 3, 4, 6, 8)
NUM_RESAMPLES = 1000
MIN_RIGHT = 10  # right answers below which a curve is mostly chance


@dataclass(frozen=True)
class LengthQuestions:
    """What to find out: recall at these numbers of ``tokens`` and ``sentences``, and ``sensitivity`` to their order."""

    tokens: tuple[int, ...] = ()
    sentences: tuple[int, ...] = ()
    sensitivity: bool = False

    def __bool__(self) -> bool:
        return bool(self.tokens or self.sentences or self.sensitivity)


class CutTokenizer:
    """A tokenizer of open_clip's that cuts texts earlier, and fills up to the length that its model wants.

    Args:
        tokenizer: whose last special token of a cut text stays, as always; after it comes padding alone.
        length: tokens to keep, special ones included.
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
    """Returns a tokenizer that keeps `length` tokens of each text."""
    if hasattr(tokenizer, "num_corners"):  # ours: its towers take rows of any length
        tokenizer = copy.copy(tokenizer)
        tokenizer.context_length = length
        return tokenizer
    return CutTokenizer(tokenizer, length)


def token_lengths(tokenizer: Callable, asked: Sequence[int]) -> list[int]:
    """Returns the lengths to measure, in order: those below the context length, and the context length itself.

    Raises:
        ValueError: a length without room for a word, or a tokenizer that can't be cut.
    """
    if getattr(tokenizer, "tokenizer_mode", None) == "clips":
        raise ValueError("--retrieval-lengths: this model's tokenizer puts a token after the padding; leave it out")
    shortest = getattr(tokenizer, "num_corners", 0) + 3
    if min(asked) < shortest:
        raise ValueError(f"--retrieval-lengths {min(asked)}: this model's tokens begin to hold words at {shortest}")
    return [*sorted(length for length in asked if length < tokenizer.context_length), tokenizer.context_length]


def default_questions(tokenizer: Callable) -> LengthQuestions:
    """Returns the curves of a long-text card, as far as a tokenizer can be cut."""
    if getattr(tokenizer, "tokenizer_mode", None) == "clips":
        return LengthQuestions(sentences=CARD_SENTENCES)
    shortest = getattr(tokenizer, "num_corners", 0) + 3
    return LengthQuestions(tuple(length for length in CARD_TOKENS if length >= shortest), CARD_SENTENCES)


def analyse_lengths(
    parts: EncoderParts,
    work: RetrievalWork,
    images: Encoding,
    texts: Encoding,
    questions: LengthQuestions,
    env: DistEnv,
    options: ComputeOptions,
    seed: int = 0,
) -> dict[str, object]:
    """Measures recall with changed captions.

    Args:
        parts: the model.
        work: benchmarks.
        images, texts: features of the images and of the whole captions.
        questions: what to measure.
        env: all ranks share the encoding.
        options: batch size, workers, precision.
        seed: of shuffling and dropping; a caption is changed alike in every run.

    Returns:
        ``context_length``; ``sets``: title -> ``tokens``, ``sentences``, ``sensitivity``, each number or change ->
        ``i2t``, ``t2i`` (R@1, fractions); ``effective_length``: title -> tokens, and under ``all`` that of the model;
        None with fewer than `MIN_RIGHT` right answers; ``effective_length_ci95``: the same -> [low, high].
        In ``sensitivity`` also ``similarity``: mean cosine with the feature of the whole caption.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    tokenizer = parts.tokenizer
    found: dict[str, dict[str, dict]] = {s.title: {} for s in work.sets}
    hits: dict[str, list[np.ndarray]] = {s.title: [] for s in work.sets}

    def note(kind: str, value: object, encoding: Encoding, with_similarity: bool = False) -> None:
        similarity = _similarity(work, texts.features, encoding.features) if with_similarity else {}
        for r in rank_sets(work, images, encoding, env):
            own = {d: r.result.recall(d).top1 for d in DIRECTIONS}
            own |= {"similarity": similarity[r.pairs.title]} if similarity else {}
            found[r.pairs.title].setdefault(kind, {})[str(value)] = own
            if kind == "tokens":
                hits[r.pairs.title].append(_hits_by_image(r))

    def encode(changed: Sequence[str], through: Callable = tokenizer) -> Encoding:
        return encode_texts(parts.model, through, changed, env, options, count_lost=False)

    for length in token_lengths(tokenizer, questions.tokens) if questions.tokens else ():
        is_whole = length == tokenizer.context_length
        note("tokens", length, texts if is_whole else encode(work.texts, cut_tokenizer(tokenizer, length)))
    for number in sorted(questions.sentences):
        note("sentences", number, encode([". ".join(split_caption(text)[:number]) for text in work.texts]))
    if questions.sentences:
        note("sentences", "all", texts)
    if questions.sensitivity:
        note("sensitivity", "as it is", texts, True)
        for name, change in (("sentences shuffled", shuffle_sentences), ("one sentence dropped", drop_sentence)):
            note("sensitivity", name, encode([change(text, seed) for text in work.texts]), True)
    result = {"context_length": tokenizer.context_length, "sets": found}
    return result | (_effective_lengths(found, hits) if questions.tokens else {})


def shuffle_sentences(text: str, seed: int) -> str:
    """Returns a caption with its sentences in an order of chance; another one than it has, if it has two or more."""
    sentences = split_caption(text)
    if len(set(sentences)) < 2:
        return text
    rng, shuffled = random.Random(f"{seed} {text}"), list(sentences)
    while shuffled == sentences:
        rng.shuffle(shuffled)
    return ". ".join(shuffled)


def drop_sentence(text: str, seed: int) -> str:
    """Returns a caption without one of its sentences; a single one stays."""
    sentences = split_caption(text)
    if len(sentences) < 2:
        return text
    del sentences[random.Random(f"{seed} {text}").randrange(len(sentences))]
    return ". ".join(sentences)


def _similarity(work: RetrievalWork, before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Per set the mean cosine of its captions of two sentences or more, before and after a change."""
    cosine = (before.double() * after.double()).sum(dim=1)
    several = torch.tensor([len(split_caption(text)) > 1 for text in work.texts])
    means = {}
    for s, rows in zip(work.sets, work.text_index):
        kept = [row for row in rows if several[row]]
        means[s.title] = float(cosine[kept].mean()) if kept else 1.0
    return means


def effective_length(lengths: Sequence[float], recall: Sequence[float]) -> float | None:
    """Returns the number of tokens at which recall first reaches 95% of its best value.

    Between two measured lengths recall is taken to grow in a straight line. The shortest length if that is enough; None
    if nothing was ever found.

    Args:
        lengths: in tokens, growing.
        recall: at each of them.
    """
    target = EFFECTIVE_SHARE * max(recall)
    if target == 0:
        return None
    first = next(n for n, value in enumerate(recall) if value >= target)
    if first == 0:
        return float(lengths[0])
    return float(np.interp(target, recall[first - 1 : first + 1], lengths[first - 1 : first + 1]))


def _hits_by_image(r: RankedSet) -> np.ndarray:
    """Per image: 1 if it was found by itself, how many of its captions found it, how many it has. [num_images, 3]."""
    owner = np.array(r.pairs.image_of_caption)
    captions = np.bincount(owner, hit_probability(r.t2i, 1).numpy())
    return np.stack([hit_probability(r.i2t, 1).numpy(), captions, np.bincount(owner)], axis=1)


def _effective_lengths(found: dict[str, dict], hits: dict[str, list[np.ndarray]]) -> dict[str, dict[str, object]]:
    """Effective lengths and their 95% intervals, per set, and ``all``: of the mean over the sets.

    Recall is the mean of both directions. None where it is near chance. Intervals resample the images of each set.

    Args:
        found: title -> ``tokens``: the lengths.
        hits: title -> of `_hits_by_image` at each length.
    """
    rng = np.random.default_rng(0)
    lengths, curves, result, intervals = [], [], {}, {}
    for title, by_length in hits.items():
        lengths = [int(length) for length in found[title]["tokens"]]
        num_images = len(by_length[0])
        weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=NUM_RESAMPLES)
        weights = np.concatenate([np.ones((1, num_images)), weights])  # the first row is the set itself
        sums = np.stack([weights @ per_image for per_image in by_length], axis=1)  # [draws, lengths, 3]
        recall = (sums[..., 0] / num_images + sums[..., 1] / sums[..., 2]) / 2
        near_chance = recall[0].max() * by_length[0][:, 2].sum() < MIN_RIGHT
        result[title], intervals[title] = (None, None) if near_chance else _with_interval(lengths, recall)
        if not near_chance:
            curves.append(recall)
    result["all"], intervals["all"] = _with_interval(lengths, np.mean(curves, axis=0)) if curves else (None, None)
    return {"effective_length": result, "effective_length_ci95": intervals}


def _with_interval(lengths: list[int], recall: np.ndarray) -> tuple[float | None, list[float]]:
    """Effective length of the first curve, and the 95% interval over all others. `recall`: [1 + draws, lengths]."""
    drawn = [length for curve in recall[1:] if (length := effective_length(lengths, curve.tolist())) is not None]
    return effective_length(lengths, recall[0].tolist()), [float(b) for b in np.percentile(drawn, [2.5, 97.5])]
