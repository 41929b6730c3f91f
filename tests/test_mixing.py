"""How well batches of shards are mixed: many shards in each, other neighbours each epoch, any part read alone."""

import random
from collections import Counter

import pytest

from training.data import shards
from training.data.mixing import Lane, mix
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


def test_batches_hold_samples_of_many_shards_and_other_neighbours_each_epoch(monkeypatch):
    monkeypatch.setattr(shards, "read_exactly", lambda url, first, stop, size: ((url, n) for n in range(first, stop)))
    source = ShardSource([f"{n}.tar" for n in range(40)], [5000] * 40, seed=0)
    windows = []
    for epoch in (0, 1):
        stream = list(source.read(epoch, 0, 100_000))
        assert len(set(stream)) == 100_000
        batches = [stream[i : i + 512] for i in range(0, len(stream) - 511, 512)]
        assert sum(len({url for url, _ in batch}) for batch in batches) / len(batches) > 6.4  # open_clip's pipeline
        windows.append({item: number for number, batch in enumerate(batches) for item in batch})
    both = windows[0].keys() & windows[1].keys()
    pairs = Counter((windows[0][item], windows[1][item]) for item in both)
    assert max(pairs.values()) < 128  # of 512 that were together in one epoch, few are in the next
