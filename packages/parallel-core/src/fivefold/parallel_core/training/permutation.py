"""A seeded shuffle of 0 .. length-1 that is computed where it is asked for, never stored.

A Feistel network is a bijection of the numbers of an even count of bits whatever its round
function is; a number that it sends beyond the length is sent on until it comes back inside
("cycle walking", Black and Rogaway 2002), which keeps the whole a bijection of the length.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def permute(index: NDArray[np.int64], length: int, *key: int) -> NDArray[np.int64]:
    """Where the shuffle that ``key`` names sends each number of ``index``.

    Args:
        index: (N,) numbers in [0, length).
        length: how many numbers are shuffled, at least 1.
        key: integers, such as a seed and an epoch; each key names another shuffle.

    Returns:
        (N,) numbers in [0, length); over all of ``range(length)``, each exactly once.
    """
    round_keys = _round_keys(key)
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    values = _feistel(index.astype(np.uint64), half_bits, round_keys)
    # The domain is less than 4 * length (or 4), so a few walks bring every number home.
    while (outside := values >= length).any():
        values[outside] = _feistel(values[outside], half_bits, round_keys)
    return values.astype(np.int64)


def _round_keys(key: tuple[int, ...]) -> list[np.uint64]:
    # Hashed as text: any Python integer is a key, and (1, 12) differs from (11, 2).
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return [np.uint64(word) for word in np.frombuffer(digest, "<u8")]


def _feistel(
    values: NDArray[np.uint64], half_bits: int, round_keys: list[np.uint64]
) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
