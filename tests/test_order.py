"""The order in which a table is read: every row once, every position equally likely, in little memory."""

import tracemalloc
from collections import Counter

import pytest

from training.data.order import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 257, 4096, 70_001])
def test_every_item_comes_once_and_any_part_can_be_read_alone(size):
    order = list(permuted(size, "a", 0, size))
    assert sorted(order) == list(range(size))
    begin, end = size // 3, size - size // 4
    assert list(permuted(size, "a", begin, end)) == order[begin:end]


def test_every_item_is_equally_likely_in_every_place():
    size, num_orders = 11, 1000
    seen = Counter(pair for n in range(num_orders) for pair in enumerate(permuted(size, f"{n}/rows", 0, size)))
    expected = num_orders / size
    chi_squared = sum((seen[place, item] - expected) ** 2 / expected for place in range(size) for item in range(size))
    assert chi_squared < 161  # 100 degrees of freedom: exceeded by one uniform shuffle in 10,000


def test_neighbours_in_the_order_are_not_neighbours_in_the_table():
    order = list(permuted(1_000_000, "a", 0, 20_000))
    close = sum(abs(a - b) < 1000 for a, b in zip(order, order[1:]))
    assert 10 < close < 90  # 40 expected of a uniform shuffle


def test_memory_does_not_grow_with_the_table():
    list(permuted(10, "a", 0, 10))
    tracemalloc.start()
    rows = [row for row in permuted(100_000_000, "a", 60_000_000, 60_010_000)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(rows)) == 10_000 and max(rows) < 100_000_000
    assert peak < 2 << 20  # a list of all rows would be 800 MB
