"""A pseudo-random order of n items, any part of which can be computed without a list of all n."""

from collections.abc import Iterator
from hashlib import sha256

import numpy as np

_ROUNDS = 6
_CHUNK = 1024
_STEP, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def permuted(size: int, name: str, start: int, stop: int) -> Iterator[int]:
    """Yields the items at positions `start` up to, but not including, `stop` of a permutation of ``range(size)``.

    The permutation is a Feistel network over a power of four that is at least `size`; numbers outside the range are
    encrypted again until they fall into it (cycle walking). Memory doesn't grow with `size`.

    Args:
        size: number of items, below 2**62.
        name: seeds the permutation; the same name always gives the same order.
        start, stop: positions, 0 <= start, stop <= size.

    Raises:
        ValueError: `stop` is larger; positions beyond the size have no number, so the walk would never end.
    """
    if stop > size:
        raise ValueError(f"position {stop} of {size} items")
    keys = np.frombuffer(sha256(name.encode()).digest() + sha256(name.encode() + b"/").digest(), np.uint64)[:_ROUNDS]
    half_bits = max(((size - 1).bit_length() + 1) // 2, 4)  # with fewer bits, the order is visibly non-uniform
    for begin in range(start, stop, _CHUNK):
        numbers = _encrypt(np.arange(begin, min(begin + _CHUNK, stop), dtype=np.uint64), keys, half_bits)
        while (outside := numbers >= size).any():
            numbers[outside] = _encrypt(numbers[outside], keys, half_bits)
        yield from numbers.tolist()


def _encrypt(numbers: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permutes the numbers below 4**half_bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = numbers >> shift, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right * _STEP + key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the input changes every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
