"""Diagnostics of long text: what a model loses when captions are changed, and how it judges their sentences.

Only captions change; images are encoded once. Texts with the same token ids get the features of one of them, so texts
that differ only beyond the model's context get exactly equal scores. Only one change's features are in memory at a
time, and single sentences are processed in parts of the captions.

HiMo is from HiMo-CLIP (arXiv 2511.06653), the wrong sentence from CS-CLIP (arXiv 2602.23906). Both papers leave details
open; the docstrings below state our choices.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from training.eval.caches import FeatureStore
from training.eval.changes import Change, wrong_sentence
from training.eval.encode import Encoder, Encoding
from training.eval.lengths import effective_lengths, hits_by_image
from training.eval.metrics import TIE_TOLERANCE, bootstrap_interval, hit_probability, paired_bootstrap
from training.eval.record import DIRECTIONS
from training.eval.retrieval import EncodedSet, RankedSet, count_over_ranks
from training.readers.captions import join_split, split_sentences

SEGMENTS = (2, 3)  # of HiMo@2 and HiMo@3
MIN_CAPTIONS = 10  # recall by position is reported for positions with at least this many captions
CAPTIONS_AT_ONCE = 4096
NUM_CHECKED = 32  # number of captions encoded again to check that the features are those of the model
SAME_MODEL = 0.99  # minimum cosine; bf16 compared with fp32 reaches 0.999


def check_text_model(encoder: Encoder, encoded: EncodedSet) -> None:
    """Checks that features from a file are those of the model, by encoding some captions again.

    Changed captions, encoded by the model, are compared with the file's features, so both must be of the same model.

    Raises:
        ValueError: the features in the file are not those of the model.
    """
    captions = encoded.pairs.captions
    rows = torch.linspace(0, len(captions) - 1, min(NUM_CHECKED, len(captions))).long()
    again = encoder.texts([captions[i] for i in rows]).features
    same_size = again.shape[1] == encoded.texts.shape[1]
    cosine = float((again * encoded.texts[rows]).sum(dim=1).min()) if same_size else 0.0
    if cosine < SAME_MODEL:
        raise ValueError(
            f"--features: text_features are not those of --model for the same captions (cosine {cosine:.3f}, expected "
            f"at least {SAME_MODEL}); give the model and weights that the file was made with, and put captions into it"
        )


def diagnose(
    encoder: Encoder, ranked: Sequence[RankedSet], changes: Sequence[Change], seed: int = 0
) -> dict[str, dict]:
    """Runs diagnostics on every benchmark.

    Args:
        encoder: the model; the ranks share the work, and all get the result.
        ranked: the benchmarks, with the features of the original captions.
        changes: result of `list_changes`.
        seed: seed of random changes; a caption is changed in the same way in every run.

    Returns:
        ``lengths``, if lengths or sensitivity are asked: ``context_length``; ``sets``, for each title ``tokens``,
        ``sentences`` and ``sensitivity``, which map each number or change to ``i2t`` and ``t2i`` (R@1 as fractions) and
        in ``sensitivity`` to ``similarity``, the mean cosine with the original caption's feature; and the result of
        `lengths.effective_lengths`.
        ``diagnostics``, if asked: for each title ``changes``, for each change the number of captions ``changed``, and
        for each direction ``top1`` and the paired ``difference``, ``low``, ``high``, ``p`` relative to the original
        captions with their sentences joined by `join_split`; ``himo``, see `monotonicity`; ``wrong_sentence``, see
        `half_truths`; and ``positions``, see `recall_by_position`.

    Raises:
        FloatingPointError: the model returned NaN or infinity.
    """
    tokenizer = encoder.parts.tokenizer
    originals = FeatureStore(partial(encoder.texts, count_lost=False))
    for r in ranked:
        originals.add(_token_keys(tokenizer, r.pairs.captions), Encoding(r.texts, {}, r.lost_tokens))
    measured, hits = _measure_changes(encoder, ranked, changes, originals, seed)
    compared = {title: found for title, kinds in measured.items() if (found := kinds.pop("changes", None))}
    result: dict[str, dict] = {}
    if any(measured.values()):
        result["lengths"] = {"context_length": getattr(tokenizer, "context_length", None), "sets": measured}
        result["lengths"] |= effective_lengths(hits) if all(hits.values()) else {}
    if compared:
        result["diagnostics"] = {
            r.pairs.title: {"changes": compared[r.pairs.title], **_measure_sentences(encoder, r, originals, seed)}
            for r in ranked
        }
    return result


def _measure_changes(
    encoder: Encoder, ranked: Sequence[RankedSet], changes: Sequence[Change], originals: FeatureStore, seed: int
) -> tuple[dict[str, dict[str, dict]], dict[str, dict[int, np.ndarray]]]:
    """Returns for each title: kind -> name -> results of a change, and number of tokens -> hits of each image."""
    measured: dict[str, dict[str, dict]] = {r.pairs.title: {} for r in ranked}
    hits: dict[str, dict[int, np.ndarray]] = {r.pairs.title: {} for r in ranked}
    as_it_is: dict[str, dict[str, np.ndarray]] = {}
    for change in changes:
        tokenizer = change.tokenizer or encoder.parts.tokenizer
        store = originals.copy(partial(encoder.texts, tokenizer=tokenizer, count_lost=False))
        for r in ranked:
            title = r.pairs.title
            texts = [change(caption, seed) for caption in r.pairs.captions]
            features = store(texts, _token_keys(tokenizer, texts)).features
            counts = count_over_ranks(r.images, features, r.owner, encoder.env)
            found = {d: hit_probability(c, 1).numpy() for d, c in zip(DIRECTIONS, counts)}
            if change.kind == "tokens":
                hits[title][int(change.name)] = hits_by_image(r.owner, *counts)
            if change.kind == "changes":
                row = _compare(r, texts, found, as_it_is.setdefault(title, found))
            else:
                row = {d: float(values.mean()) for d, values in found.items()}
                if change.kind == "sensitivity":  # of captions with two sentences or more
                    several = torch.tensor([len(split_sentences(text)) > 1 for text in r.pairs.captions])
                    cosine = (r.texts.double() * features.double()).sum(dim=1)[several]
                    row["similarity"] = float(cosine.mean()) if several.any() else 1.0
            measured[title].setdefault(change.kind, {})[change.name] = row
    return measured, hits


def _token_keys(tokenizer: Callable, texts: Sequence[str]) -> list[bytes]:
    """Returns the token ids of each text without padding, as bytes."""
    padding, keys = int(tokenizer([""])[0, -1]), []
    for start in range(0, len(texts), CAPTIONS_AT_ONCE):
        ids = tokenizer(list(texts[start : start + CAPTIONS_AT_ONCE])).numpy()
        lengths = ids.shape[1] - (ids[:, ::-1] != padding).argmax(1)
        keys += [row[:length].tobytes() for row, length in zip(ids, lengths)]
    return keys


def _compare(
    r: RankedSet, texts: list[str], after: dict[str, np.ndarray], before: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Compares a change with the captions as they are; without differences if these are what was measured.

    `after` and `before` map directions to the probability that a right answer comes first, [num_queries].
    """
    unchanged = (join_split(split_sentences(caption)) for caption in r.pairs.captions)
    found: dict[str, Any] = {"changed": sum(new != old for new, old in zip(texts, unchanged))}
    for direction, clusters in zip(DIRECTIONS, (None, r.owner.numpy())):
        found[direction] = {"top1": float(after[direction].mean())}
        if after is not before:
            found[direction] |= paired_bootstrap(before[direction], after[direction], clusters)._asdict()
    return found


def _measure_sentences(encoder: Encoder, r: RankedSet, originals: FeatureStore, seed: int) -> dict[str, dict]:
    """Measures prefixes, single sentences and wrong sentences, in parts of the captions."""
    captions, owner = r.pairs.captions, r.pairs.image_of_caption
    similarity, cut, pairs, searched = [], [], [], []
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        numbers = range(start, min(start + CAPTIONS_AT_ONCE, len(captions)))
        sentences = [split_sentences(captions[n]) or [""] for n in numbers]
        prefixes = [[join_split(s[: k + 1]) for k in range(len(s))] for s in sentences]
        # Of the first sentence and of the whole caption: the correct text, and it with the wrong sentence.
        wrong = [wrong_sentence(captions, owner, n, seed) for n in numbers]
        doubtful = [
            [join_split(text) for correct in (s[:1], s) for text in (correct, [*correct, w])] if w else []
            for s, w in zip(sentences, wrong)
        ]
        groups = sentences + prefixes + doubtful
        texts = list(itertools.chain(*groups))
        keys = _token_keys(encoder.parts.tokenizer, texts)
        features = originals.copy()(texts, keys).features
        ends = itertools.accumulate(map(len, groups))
        places = [slice(end - len(group), end) for end, group in zip(ends, groups)]
        for n, prefix, pair in zip(numbers, places[len(numbers) :], places[2 * len(numbers) :]):
            image = r.images[owner[n]].double()
            similarity.append((features[prefix].double() @ image).numpy())
            cut.append([a == b for a, b in itertools.pairwise(keys[prefix])])
            score = (features[pair].double() @ image).numpy()
            same = [a == b for a, b in itertools.pairwise(keys[pair])]
            pairs.append(list(zip(score[::2], score[1::2], same[::2])))
        image_of = torch.tensor([owner[n] for n, s in zip(numbers, sentences) for _ in s])
        _, t2i = count_over_ranks(r.images, features[: len(image_of)], image_of, encoder.env, both=False)
        position = torch.cat([torch.arange(1, len(s) + 1) for s in sentences])
        searched.append((image_of, position, hit_probability(t2i, 1)))
    return {
        "himo": monotonicity(similarity, cut, r.owner),
        "wrong_sentence": half_truths(pairs, r.owner),
        "positions": recall_by_position(*map(torch.cat, zip(*searched))),
    }


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
        found[str(segments or "K")] = _summary(torch.tensor(scores).double(), kept, owner, tied, tied_by_cut)
    return found


def half_truths(
    scores: Sequence[Sequence[tuple[float, float, bool]]], owner: torch.Tensor
) -> dict[str, dict[str, object]]:
    """Measures whether a model prefers a correct text to the same text with a wrong sentence at its end.

    Args:
        scores: for each caption the similarities of its image to the correct text and to the longer one, and whether
            both have the same token ids; first for the first sentence, then for the whole caption. Empty for a caption
            without a wrong sentence.
        owner: image of each caption, [num_captions]; intervals resample images.

    Returns:
        ``after the first sentence`` and ``after the whole caption``: ``score``, the share of captions for which the
        correct text has the higher similarity (a tie counts as a failure), and ``margin``, by how much on average, with
        ``ci95`` and ``margin_ci95``; the number of ``captions``; ``left_out``, those without a wrong sentence and those
        whose wrong sentence is beyond the model's context; ``tied``; and ``tied_by_cut``, the latter ones.
    """
    found = {}
    for text, name in enumerate(("after the first sentence", "after the whole caption")):
        kept = [n for n, pairs in enumerate(scores) if pairs and not pairs[text][2]]
        cut = sum(pairs[text][2] for pairs in scores if pairs)
        margins = torch.tensor([scores[n][text][0] - scores[n][text][1] for n in kept], dtype=torch.float64)
        tied = cut + int((margins.abs() <= TIE_TOLERANCE).sum())
        found[name] = _summary((margins > TIE_TOLERANCE).double(), kept, owner, tied, cut)
        found[name]["margin"] = float(margins.mean()) if kept else None
        found[name]["margin_ci95"] = list(bootstrap_interval(margins, owner[kept])) if kept else None
    return found


def _summary(scores: torch.Tensor, kept: list[int], owner: torch.Tensor, tied: int, tied_by_cut: int) -> dict:
    return {
        "score": float(scores.mean()) if kept else None,
        "ci95": list(bootstrap_interval(scores, owner[kept])) if kept else None,
        "captions": len(kept),
        "left_out": len(owner) - len(kept),
        "tied": tied,
        "tied_by_cut": tied_by_cut,
    }


def recall_by_position(owner: torch.Tensor, position: torch.Tensor, hits: torch.Tensor) -> dict[str, dict[str, object]]:
    """Summarises text-to-image recall with single sentences of the captions as queries, by position of the sentence.

    Args:
        owner: image of each sentence, [num_sentences].
        position: its position in its caption, starting at 1.
        hits: probability of a hit.

    Returns:
        For each position ``t2i``, R@1 among all images; its interval ``ci95``; and the number of ``captions`` with such
        a sentence. Positions with fewer than `MIN_CAPTIONS` captions are omitted.
    """
    found = {}
    for number in range(1, int(position.max()) + 1):
        chosen = position == number
        if chosen.sum() >= MIN_CAPTIONS:
            ci95 = list(bootstrap_interval(hits[chosen], owner[chosen]))
            found[str(number)] = {"t2i": float(hits[chosen].mean()), "ci95": ci95, "captions": int(chosen.sum())}
    return found
