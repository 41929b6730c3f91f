"""How well batches of shards are mixed: many shards in each, other neighbours each epoch, any part read alone."""

import random
from collections import Counter
from functools import partial

import pytest
from scipy.stats import chisquare

from training.data import shards
from training.data.order import Lane, mix
from training.data.shards import ShardSource


@pytest.mark.parametrize("seed", range(20))
def test_every_item_comes_once_and_any_part_can_be_read_alone(seed):
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 3, 40, 900]) for _ in range(rng.randint(1, 9))]
    lanes = [Lane(n, lambda done, k=k, n=n: ((k, i) for i in range(done, n))) for k, n in enumerate(sizes)]
    whole = list(mix(lanes, rng.choice([1, 7, 100]), f"{seed}"))
    assert sorted(whole) == [(k, i) for k, n in enumerate(sizes) for i in range(n)]
    window = rng.choice([1, 7, 100, 5000])
    whole = list(mix(lanes, window, f"{seed}"))
    for skip in (0, 1, len(whole) // 3, len(whole) - 1, len(whole)):
        assert list(mix(lanes, window, f"{seed}", max(skip, 0))) == whole[max(skip, 0) :]


def test_skipping_reads_two_windows_and_a_round_more_than_is_yielded():
    num_read = Counter()

    def numbers(lane, done):
        for i in range(done, 10_000):
            num_read[lane] += 1
            yield lane, i

    lanes = [Lane(10_000, partial(numbers, k)) for k in range(4)]
    rest = list(mix(lanes, 100, "order", skip=30_000))
    assert len(rest) == 10_000
    assert num_read.total() <= 10_000 + 2 * 100 + 100 // 8 + 1


def test_what_fits_into_the_window_is_shuffled_as_a_whole():
    lanes = [Lane(10, lambda done: iter(range(done, 10)))]
    firsts = Counter(next(mix(lanes, 10, f"{seed}")) for seed in range(4000))
    assert chisquare([firsts[i] for i in range(10)]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("per_shard", "shards_of_open_clip"), [(5000, 6.4), (1000, 14.4)]
)  # measured by benchmarks/data_mixing.py: open_clip's pipeline with its buffer of 5,000 samples, ours with 1,000
def test_batches_hold_samples_of_many_shards_and_other_neighbours_each_epoch(
    monkeypatch, per_shard, shards_of_open_clip
):
    monkeypatch.setattr(
        shards, "read_exactly", lambda url, first, stop, size, _: ((url, n) for n in range(first, stop))
    )
    num_shards = 200_000 // per_shard
    source = ShardSource([f"{n}.tar" for n in range(num_shards)], [per_shard] * num_shards, seed=0)
    windows = []
    for epoch in (0, 1):
        stream = list(source.read(epoch, 0, 100_000))
        assert len(set(stream)) == 100_000
        batches = [stream[i : i + 512] for i in range(0, len(stream) - 511, 512)]
        assert sum(len({url for url, _ in batch}) for batch in batches) / len(batches) > shards_of_open_clip
        windows.append({item: number for number, batch in enumerate(batches) for item in batch})
    both = windows[0].keys() & windows[1].keys()
    pairs = Counter((windows[0][item], windows[1][item]) for item in both)
    assert max(pairs.values()) < 128  # few of 512 samples that were in one batch are in one batch in the next epoch
