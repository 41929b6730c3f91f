"""Long-text diagnostics: how recall drops when captions are changed, and whether similarity grows with each sentence.

Only captions change; images are encoded once. The texts of all diagnostics are encoded in one pass, and texts with the
same token ids only once, so texts that differ only beyond the model's context get exactly equal scores.

Sources: the changes are those of DeBias-CLIP (arXiv 2602.22419), with both interpretations of its "move"; HiMo is from
HiMo-CLIP (arXiv 2511.06653). Both papers leave details open; the docstrings below state our choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.eval.encode import ComputeOptions, encode_texts
from training.eval.lengths import drop_sentence, shuffle_sentences
from training.eval.metrics import TIE_TOLERANCE, bootstrap_interval, hit_probability, paired_bootstrap
from training.eval.record import DIRECTIONS
from training.eval.retrieval import RankedSet, count_over_ranks
from training.model.assembly.factory import EncoderParts
from training.readers.sentences import join_split, split_sentences
from training.runtime.distributed import DistEnv

NEUTRAL = "This is a photo"
SEGMENTS = (2, 3)  # of HiMo@2 and HiMo@3
MIN_CAPTIONS = 10  # recall by position is reported for positions with at least this many captions
_TOKENIZER_BATCH = 4096


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
}


def diagnose(
    parts: EncoderParts,
    ranked: Sequence[RankedSet],
    env: DistEnv,
    options: ComputeOptions,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """Runs all diagnostics on every benchmark.

    Args:
        parts: the model.
        ranked: the benchmarks.
        env: the ranks share the encoding; all get the result.
        options: batch size, workers, precision.
        seed: seed of shuffling and dropping.

    Returns:
        For each benchmark's title: ``changes``, for each change the number of captions ``changed``, and for each
        direction ``top1`` and the paired ``difference``, ``low``, ``high``, ``p`` relative to the original captions
        with their sentences joined by `join_split`; ``himo``, see `monotonicity`; ``positions``, see
        `recall_by_position`. Recall is given as fractions.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    sentences = {r.pairs.title: [split_sentences(text) or [""] for text in r.pairs.captions] for r in ranked}
    wanted: dict[str, None] = {}
    for own in (own for captions in sentences.values() for own in captions):
        texts = [join_split(change(own, seed)) for change in CHANGES.values()]
        wanted |= dict.fromkeys([*texts, *own, *_prefixes(own)])
    features = _encode_distinct(parts, list(wanted), env, options)
    return {
        r.pairs.title: {
            "changes": _measure_changes(r, sentences[r.pairs.title], features, env, seed),
            "himo": _measure_himo(r, sentences[r.pairs.title], features),
            "positions": recall_by_position(r, sentences[r.pairs.title], features, env),
        }
        for r in ranked
    }


def _prefixes(sentences: Sequence[str]) -> list[str]:
    """Returns the first sentence, the first two, and so on up to the whole caption."""
    return [join_split(sentences[: n + 1]) for n in range(len(sentences))]


@dataclass(frozen=True)
class _Features:
    """Features of texts; texts with the same token ids share a row of `rows` [num_rows, dim]."""

    rows: torch.Tensor
    row_of: dict[str, int]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        return self.rows[[self.row_of[text] for text in texts]]


def _encode_distinct(parts: EncoderParts, texts: list[str], env: DistEnv, options: ComputeOptions) -> _Features:
    row_of, row_of_ids, first = {}, {}, []
    for start in range(0, len(texts), _TOKENIZER_BATCH):
        part = texts[start : start + _TOKENIZER_BATCH]
        for text, ids in zip(part, parts.tokenizer(part).numpy()):
            row_of[text] = row_of_ids.setdefault(ids.tobytes(), len(first))
            if row_of[text] == len(first):
                first.append(text)
    return _Features(encode_texts(parts.model, parts.tokenizer, first, env, options, count_lost=False).features, row_of)


def _measure_changes(
    r: RankedSet, sentences: list[list[str]], features: _Features, env: DistEnv, seed: int
) -> dict[str, dict]:
    owner = torch.tensor(r.pairs.image_of_caption)

    def top1(captions: list[str]) -> dict[str, np.ndarray]:
        counts = count_over_ranks(r.images, features(captions), owner, env)
        return {d: hit_probability(c, 1).numpy() for d, c in zip(DIRECTIONS, counts)}

    whole = [join_split(own) for own in sentences]
    before = top1(whole)
    found: dict[str, dict] = {"as it is": {"changed": 0, **{d: {"top1": float(before[d].mean())} for d in DIRECTIONS}}}
    for name, change in CHANGES.items():
        changed = [join_split(change(own, seed)) for own in sentences]
        after = top1(changed)
        found[name] = {"changed": sum(new != old for new, old in zip(changed, whole))}
        for direction in DIRECTIONS:
            clusters = owner.numpy() if direction == "t2i" else None
            difference = paired_bootstrap(before[direction], after[direction], clusters)
            found[name][direction] = {"top1": float(after[direction].mean()), **difference._asdict()}
    return found


def _measure_himo(r: RankedSet, sentences: list[list[str]], features: _Features) -> dict[str, dict]:
    similarity, cut = [], []
    own_images = r.images.double()
    for own, image in zip(sentences, r.pairs.image_of_caption):
        prefixes = _prefixes(own)
        similarity.append((features(prefixes).double() @ own_images[image]).numpy())
        rows = [features.row_of[text] for text in prefixes]
        cut.append([first == second for first, second in zip(rows, rows[1:])])
    return monotonicity(similarity, cut, torch.tensor(r.pairs.image_of_caption))


def monotonicity(
    similarity: Sequence[np.ndarray], cut: Sequence[Sequence[bool]], owner: torch.Tensor
) -> dict[str, dict[str, object]]:
    """Measures whether the similarity to the image grows as more sentences of its caption are used.

    Args:
        similarity: for each caption, the similarities between its image and the first sentence, the first two
            sentences, and so on, [num_sentences].
        cut: for each caption and each of these texts but the last, whether the next text has the same token ids,
            [num_sentences - 1].
        owner: image of each caption, [num_captions]; intervals resample images.

    Returns:
        ``2`` and ``3`` are HiMo@2 and HiMo@3: a caption is divided into K segments of about equal numbers of sentences,
        where segment k ends after sentence floor(k n / K); ``score`` is the fraction of captions for which every
        additional segment raises the similarity. A tie counts as a failure. ``K`` is the mean over captions of
        Pearson's correlation between 1, ..., n and the similarities, 0 if the similarities are constant. Each has
        ``ci95``; the number of ``captions`` used; ``left_out``, the captions with fewer sentences than segments (for
        ``K``: than 2); ``tied``; and ``tied_by_cut``, the ties whose texts are equal after truncation to the model's
        context.
    """
    found = {}
    for segments in (*SEGMENTS, None):
        scores, kept, tied, tied_by_cut = [], [], 0, 0
        for number, values in enumerate(similarity):
            n = len(values)
            if n < (segments or 2):
                continue
            ends = [n * k // segments - 1 for k in range(1, segments + 1)] if segments else range(n)
            chosen = values[list(ends)]
            ties = [abs(b - a) <= TIE_TOLERANCE for a, b in zip(chosen, chosen[1:])]
            tied += any(ties)
            tied_by_cut += any(all(cut[number][a:b]) for a, b in zip(ends, ends[1:]))
            if segments:
                scores.append(float(all(b > a + TIE_TOLERANCE for a, b in zip(chosen, chosen[1:]))))
            else:
                scores.append(0.0 if np.ptp(values) <= TIE_TOLERANCE else np.corrcoef(np.arange(n), values)[0, 1])
            kept.append(number)
        values = torch.tensor(scores, dtype=torch.float64)
        found[str(segments or "K")] = {
            "score": float(values.mean()) if kept else None,
            "ci95": list(bootstrap_interval(values, owner[kept])) if kept else None,
            "captions": len(kept),
            "left_out": len(similarity) - len(kept),
            "tied": tied,
            "tied_by_cut": tied_by_cut,
        }
    return found


def recall_by_position(
    r: RankedSet,
    sentences: list[list[str]],
    features: Callable[[Sequence[str]], torch.Tensor],
    env: DistEnv,
) -> dict[str, dict[str, object]]:
    """Measures text-to-image recall with single sentences of the captions as queries, by position of the sentence.

    Returns:
        For each position, starting at 1: ``t2i``, R@1 among all images; its interval ``ci95``; and the number of
        ``captions`` with such a sentence. Positions with fewer than `MIN_CAPTIONS` captions are omitted.
    """
    owner = torch.tensor([i for i, own in zip(r.pairs.image_of_caption, sentences) for _ in own])
    place = torch.tensor([n for own in sentences for n in range(1, len(own) + 1)])
    alone = features([sentence for own in sentences for sentence in own])
    _, t2i = count_over_ranks(r.images, alone, owner, env)
    hits = hit_probability(t2i, 1)
    found = {}
    for position in range(1, int(place.max()) + 1):
        here = place == position
        if here.sum() >= MIN_CAPTIONS:
            ci95 = list(bootstrap_interval(hits[here], owner[here]))
            found[str(position)] = {"t2i": float(hits[here].mean()), "ci95": ci95, "captions": int(here.sum())}
    return found
