"""Ranks, recall and intervals against brute force, the published numbers, and arithmetic done by hand."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from training.eval.metrics import (
    RankCounts,
    _resampled_means,
    bootstrap_interval,
    count_ranks,
    expected_rank,
    float64_device,
    hit_probability,
    rounding_bound,
    summarise,
)

REFERENCE = Path(__file__).parent / "reference"


def unit(*shape, seed=0, dtype=torch.float32):
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1
    )


def test_equals_the_published_numbers():
    saved = np.load(REFERENCE / "retrieval.npz")
    expected = json.loads((REFERENCE / "retrieval.json").read_text())
    image, text = torch.from_numpy(saved["image"]), torch.from_numpy(saved["text"])
    for direction, counts in zip(("image_to_text", "text_to_image"), count_ranks(image, text, torch.arange(200))):
        got = summarise(counts)
        for k in (1, 5, 10):
            assert got[f"top{k}"] == pytest.approx(expected[f"{direction}_R@{k}"], abs=1e-9)
        assert got["mean-rank"] == pytest.approx(expected[f"{direction}_mean_rank"])
        # The reference also takes the median of whole-number ranks; 200 queries have no ties.
        assert got["median-rank"] == pytest.approx(expected[f"{direction}_median_rank"])


@pytest.mark.parametrize("block_size", [1, 7, 64, 4096])
@pytest.mark.parametrize("num_images,captions_per_image", [(37, 1), (13, 5)])
def test_equals_brute_force_argsort(num_images, captions_per_image, block_size):
    owner = torch.arange(num_images).repeat_interleave(captions_per_image)[
        torch.randperm(num_images * captions_per_image, generator=torch.Generator().manual_seed(1))
    ]
    image, text = unit(num_images, 8, seed=2), unit(len(owner), 8, seed=3)
    i2t, t2i = count_ranks(image, text, owner, tile=(block_size, 3 * block_size))
    score = image.double() @ text.double().T
    order = score.argsort(dim=1, descending=True)
    for i in range(num_images):
        # The rank of the first right caption counts only wrong captions before it, not other right ones.
        places = [n for n, t in enumerate(order[i]) if owner[t] == i]
        assert expected_rank(i2t)[i] == places[0] + 1
    order = score.argsort(dim=0, descending=True)
    for t in range(len(owner)):
        assert expected_rank(t2i)[t] == (order[:, t] == owner[t]).nonzero().item() + 1


def test_ties_are_the_mean_over_all_orders():
    # Scores on a coarse grid, so that there are many ties; the truth is the mean over all orders of the candidates.
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-1, 2, (6, 3), generator=generator).double()
    text = torch.randint(-1, 2, (6, 3), generator=generator).double()
    image = image[:5]
    owner = torch.tensor([0, 1, 1, 2, 3, 4])
    i2t, t2i = count_ranks(image, text, owner)
    score = image @ text.T

    def brute_force(scores, is_right, k):
        hits, ranks = [], []
        for order in itertools.permutations(range(len(scores))):
            ranking = sorted(order, key=lambda c: -scores[c].item())
            place = next(n for n, c in enumerate(ranking) if is_right[c])
            hits.append(place < k)
            ranks.append(place + 1)
        return np.mean(hits), np.mean(ranks)

    for k in (1, 2, 4):
        for i in range(5):
            hit, mean_rank = brute_force(score[i], owner == i, k)
            assert hit_probability(i2t, k)[i].item() == pytest.approx(hit)
            assert expected_rank(i2t)[i].item() == pytest.approx(mean_rank)
        for t in range(6):
            hit, mean_rank = brute_force(score[:, t], torch.arange(5) == owner[t], k)
            assert hit_probability(t2i, k)[t].item() == pytest.approx(hit)
            assert expected_rank(t2i)[t].item() == pytest.approx(mean_rank)


@pytest.mark.parametrize("num_pairs", [10, 1001])
def test_a_constant_model_scores_one_in_n(num_pairs):
    features = unit(1, 96).expand(num_pairs, 96)
    for counts in count_ranks(features, features, torch.arange(num_pairs), tile=(64, 48)):
        result = summarise(counts)
        assert result["top1"] == pytest.approx(1 / num_pairs)
        assert result["top10"] == pytest.approx(10 / num_pairs)
        assert result["mean-rank"] == pytest.approx((num_pairs + 1) / 2)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_shares_of_several_processes_add_up(world_size):
    image, text = unit(50, 4, seed=5), unit(50, 4, seed=6)
    text[10:20] = text[10]
    whole = count_ranks(image, text, torch.arange(50), tile=(8, 16))
    parts = [
        count_ranks(image, text, torch.arange(50), tile=(8, 16), rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for direction in (0, 1):
        for field in ("better", "tied"):
            assert torch.equal(sum(getattr(p[direction], field) for p in parts), getattr(whole[direction], field)), (
                field
            )


def nearly_tied(seed):
    """Returns features and owners, with copies, copies that differ in the last bits, and rows of very small numbers."""
    rng = np.random.default_rng(seed)
    num_images, dim, per_image = (
        int(rng.integers(2, 60)),
        int(rng.choice([1, 3, 64, 512, 700])),
        int(rng.integers(1, 4)),
    )
    image, text = rng.normal(size=(num_images, dim)), rng.normal(size=(num_images * per_image, dim))
    for rows in (image, text):
        rows *= 10.0 ** rng.uniform(-6, 0, size=(1, dim))  # few columns decide, many add rounding
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        copies = rng.integers(0, len(rows), size=(2, max(1, len(rows) // 2)))
        rows[copies[0]] = rows[copies[1]]
    image, text = image.astype(np.float32), text.astype(np.float32)
    for rows in (image, text):
        chosen = rng.random(rows.shape) < 0.05
        rows[chosen] = np.nextafter(rows[chosen], np.float32(rng.choice([-1, 1])))
    owner = rng.permutation(np.repeat(np.arange(num_images), per_image))
    return torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(owner)


@pytest.mark.parametrize("seed", range(40))
def test_near_ties_are_decided_in_float64(seed):
    """Scores that float32 can't tell apart: every count equals that of the whole matrix in float64."""
    image, text, owner = nearly_tied(seed)
    score = image.double().numpy() @ text.double().numpy().T
    is_right = owner.numpy()[None] == np.arange(len(image))[:, None]
    own = score[owner, np.arange(len(owner))]
    best = np.where(is_right, score, -np.inf).max(1)
    shares = [count_ranks(image, text, owner, tile=(7, 16), rank=rank, world_size=3) for rank in range(3)]
    for direction, (target, axis) in enumerate(((best[:, None], 1), (own[None], 0))):
        for name, found in (("better", score > target + 1e-12), ("tied", ~is_right & (abs(score - target) <= 1e-12))):
            expected = (found & ~is_right).sum(axis)
            assert np.array_equal(getattr(count_ranks(image, text, owner)[direction], name), expected), name
            assert np.array_equal(sum(getattr(share[direction], name) for share in shares), expected), name


def test_float32_alone_would_decide_some_of_these_near_ties_wrongly():
    wrong = 0
    for seed in range(40):
        image, text, owner = nearly_tied(seed)
        scores = [image @ text.T, image.double() @ text.double().T]
        ranks = [(score > score[owner, torch.arange(len(owner))]).sum(0) for score in scores]
        wrong += int((ranks[0] != ranks[1]).sum())
    assert wrong > 100


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_of_rounding_holds(seed):
    """Against exact sums of exact products (math.fsum), with terms of very different size."""
    rng = np.random.default_rng(seed)
    dim = int(rng.choice([1, 2, 17, 512, 2048]))
    first, second = (
        (rng.normal(size=(20, dim)) * 10.0 ** rng.uniform(-8, 3, size=(20, dim))).astype(np.float32) for _ in range(2)
    )
    bound = rounding_bound(torch.from_numpy(first), torch.from_numpy(second))
    computed = (torch.from_numpy(first) @ torch.from_numpy(second).T).tolist()
    for i, j in itertools.product(range(20), repeat=2):
        exact = math.fsum(float(a) * float(b) for a, b in zip(first[i], second[j]))
        assert abs(computed[i][j] - exact) <= bound


def test_ranks_do_not_depend_on_the_precision_of_the_caller():
    image, text = unit(300, 64, seed=1), unit(300, 64, seed=2)
    expected = count_ranks(image, text, torch.arange(300))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = count_ranks(image, text, torch.arange(300))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for side, other in zip(expected, found):
        assert torch.equal(side.better, other.better) and torch.equal(side.tied, other.tied)


def test_an_image_without_caption_is_an_error():
    with pytest.raises(ValueError, match="image 2 has no caption"):
        count_ranks(unit(3, 4), unit(2, 4), torch.tensor([0, 1]))


def test_bootstrap_interval_is_that_of_resampled_queries():
    hits = (torch.arange(400) < 100).double()
    low, high = bootstrap_interval(hits)
    rng = np.random.default_rng(1)
    means = [hits.numpy()[rng.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.008)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.008)
    assert bootstrap_interval(torch.ones(30, dtype=torch.float64)) == (1.0, 1.0)


def test_right_duplicates_share_the_first_place():
    counts = RankCounts(torch.tensor([0]), torch.tensor([3]), torch.tensor([2]))
    # Two right and three wrong candidates with the same score: a right one is first with probability 2 in 5.
    assert hit_probability(counts, 1).item() == pytest.approx(2 / 5)
    assert hit_probability(counts, 4).item() == pytest.approx(1.0)


def test_intervals_of_both_directions_cover_the_truth_as_often_as_they_say():
    # COCO's shape: 1,000 images of unequal difficulty with five captions each; the truth is the mean of the Beta, 0.6.
    rng, trials, covered = np.random.default_rng(0), 600, {"i2t": 0, "t2i": 0, "captions as independent": 0}
    images = torch.arange(1000).repeat_interleave(5)
    for trial in range(trials):
        difficulty = rng.beta(0.6, 0.4, 1000)
        by_image = torch.from_numpy((rng.random(1000) < difficulty).astype(float))
        by_caption = torch.from_numpy((rng.random((1000, 5)) < difficulty[:, None]).astype(float).flatten())
        for name, values, clusters in (
            ("i2t", by_image, None),
            ("t2i", by_caption, images),
            ("captions as independent", by_caption, None),
        ):
            low, high = bootstrap_interval(values, clusters, num_resamples=1000, seed=trial)
            covered[name] += low <= 0.6 <= high
    share = {name: number / trials for name, number in covered.items()}
    assert 0.93 <= share["i2t"] <= 0.97 and 0.93 <= share["t2i"] <= 0.97, share
    assert share["captions as independent"] < 0.85, share  # what the clusters are for


def test_copies_of_a_caption_do_not_narrow_an_interval():
    """Five copies of each caption carry no more information than one, so the interval must not shrink."""
    once = RankCounts(torch.arange(40) % 2, torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.int64))
    copies = RankCounts(*(t.repeat_interleave(5) for t in (once.better, once.tied, once.num_right)))
    owner = torch.arange(40).repeat_interleave(5)
    assert summarise(copies, clusters=owner)["top1-ci95"] == summarise(once)["top1-ci95"]


def test_an_interval_of_many_values_is_the_normal_one():
    """With 4,000 values, the percentiles 2.5 and 97.5 lie 1.96 standard errors from the mean."""
    rng, sides = np.random.default_rng(0), []
    for _ in range(20):
        values = torch.from_numpy(rng.integers(0, 10, 4000) / 10)
        low, high = bootstrap_interval(values, num_resamples=2300, seed=len(sides))
        error = values.std() / len(values) ** 0.5
        sides.append([(values.mean() - low) / error, (high - values.mean()) / error])
    np.testing.assert_allclose(np.mean(sides, axis=0), 1.96, rtol=0.02)


def test_an_interval_is_the_same_each_time_and_ignores_unused_numbers_of_clusters():
    values, clusters = torch.rand(300, generator=torch.Generator().manual_seed(0)).double(), torch.arange(300) // 3
    found = bootstrap_interval(values, clusters)
    assert found == bootstrap_interval(values, clusters) == bootstrap_interval(values, 7 * clusters + 2)
    assert found == bootstrap_interval(values, clusters, num_resamples=2000, seed=0)
    assert found != bootstrap_interval(values, clusters, num_resamples=2000, seed=1)


@pytest.mark.parametrize("num_resamples", [1, 500, 1234])
def test_each_resample_gives_one_mean(num_resamples):
    assert _resampled_means(np.arange(10.0), np.arange(10), num_resamples, seed=0).shape == (num_resamples,)


def test_probabilities_and_ranks_are_in_double_precision():
    counts = RankCounts(torch.arange(3), torch.full((3,), 2), torch.ones(3, dtype=torch.int64))
    assert hit_probability(counts, 1).dtype == expected_rank(counts).dtype == torch.float64


def test_the_bound_of_rounding_is_that_of_the_book():
    """n u / (1 - n u) times the largest norms, with n = dim + 2 and u = 2^-24; and the smallest normal number."""
    first, second = (
        torch.tensor([[3.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]),
        torch.tensor([[0.0, 0, 4, 0, 0], [2, 0, 0, 0, 0]]),
    )
    n = 7 * 2.0**-24
    assert rounding_bound(first, second) == pytest.approx(n / (1 - n) * 12 * (1 + 1e-9) + 5 * 2.0**-126, rel=1e-13)
    assert rounding_bound(torch.zeros(1, 5), second) == 5 * 2.0**-126


def test_apples_gpus_have_no_float64():
    assert [float64_device(name).type for name in ("mps", "cpu", "meta")] == ["cpu", "cpu", "meta"]
