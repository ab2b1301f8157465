"""A pseudo-random order of rows without memory: any position can be computed separately, on any rank.

A balanced Feistel network (Luby and Rackoff, 1988) permutes the numbers of 2n bits, for any round function; walking its
cycles until the value falls below `num_rows` restricts it to a permutation of that many numbers
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 3). The round function is the
finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD_MASK = 0xFFFF_FFFF_FFFF_FFFF

_Words = NDArray[np.uint64]


def rows_at(
    seed: int, epochs: NDArray[np.int64], positions_in_epoch: NDArray[np.int64], num_rows: int
) -> NDArray[np.int64]:
    """The rows at the given positions: for a fixed (seed, epoch) a bijection of [0, num_rows).

    Args:
        seed: any integer; only its lowest 64 bits count.
        epochs: one epoch per position, one-dimensional.
        positions_in_epoch: each in [0, num_rows), one-dimensional.
        num_rows: rows in an epoch, at least 1.

    Raises:
        ValueError: no rows, or a position outside the epoch.
    """
    if num_rows < 1:
        raise ValueError(f"{num_rows} rows can't be permuted; an epoch needs at least 1")
    if positions_in_epoch.size and not 0 <= positions_in_epoch.min() <= positions_in_epoch.max() < num_rows:
        raise ValueError(f"a position of {positions_in_epoch} is outside an epoch of {num_rows} rows")
    half_bits = max(1, -(-(num_rows - 1).bit_length() // 2))
    keys = _mix(_mix(np.array([seed & _WORD_MASK], np.uint64)) + epochs.astype(np.uint64))
    rows = _feistel(positions_in_epoch.astype(np.uint64), keys, half_bits)
    # The network's domain is at most 4 times num_rows, so few passes bring every value inside.
    while (outside := np.flatnonzero(rows >= num_rows)).size:
        rows[outside] = _feistel(rows[outside], keys[outside], half_bits)
    return rows.astype(np.int64)


def mixed(seed: int, epoch: int, values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A pseudo-random number for each value, different in every epoch: a sort key for a random order."""
    key = _mix(_mix(np.array([seed & _WORD_MASK], np.uint64)) + np.uint64(epoch))
    return _mix(_mix(values.astype(np.uint64)) ^ key)


def _feistel(values: _Words, keys: _Words, half_bits: int) -> _Words:
    """One pass of the network over numbers of 2 * half_bits bits, each value with its own key."""
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> half, values & mask
    for turn in range(1, _ROUNDS + 1):
        left, right = right, left ^ (_mix(right + keys * np.uint64(2 * turn + 1)) & mask)
    return (left << half) | right


def _mix(words: _Words) -> _Words:
    """SplitMix64's finalizer; relies on arrays wrapping around silently."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
