"""A seeded permutation of 0..N-1 that is computed, not stored: any part of it costs only that part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random bijection of 0..size-1.

    It is a balanced Feistel network over the next even number of bits, whose results of `size` and above are sent
    through it again until they fall below ("cycle walking"), which takes fewer than four turns on average.
    Source: Luby and Rackoff 1988 (four rounds); Black and Rogaway 2002 (cycle walking).
    """

    size: int
    key: int

    def __getitem__(self, places: NDArray[np.integer]) -> NDArray[np.int64]:
        """Map places `(n,)` in 0..size-1 to where the permutation sends them."""
        values = places.astype(np.uint64)
        outside = np.arange(len(values))
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(max(1, -(-(self.size - 1).bit_length() // 2)))
        mask = (np.uint64(1) << bits) - np.uint64(1)
        left, right = values >> bits, values & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mixed(right, np.uint64((self.key + turn * _GOLDEN) % 2**64)) & mask)
        return (left << bits) | right


_GOLDEN = 0x9E3779B97F4A7C15  # of splitmix64, as are the shifts and factors below


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Hash 64-bit values under a key (splitmix64's finaliser; Steele, Lea and Flood 2014). Products wrap around."""
    mixed = (values ^ key) * np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
