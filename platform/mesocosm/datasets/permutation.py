"""Keyed permutations of 0..n-1 in O(1) memory, and the 64-bit mixer they are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
ROUNDS = 4
MASK = 2**64 - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
M1, M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S30, S27, S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix(values: NDArray[Any]) -> U64:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): a bijection with full avalanche."""
    z = values.astype(np.uint64)
    z += GOLDEN
    z ^= z >> S30
    z *= M1
    z ^= z >> S27
    z *= M2
    z ^= z >> S31
    return z


def key(*parts: NDArray[Any] | int) -> U64:
    """Fold integers and integer arrays, broadcast, into 64-bit keys of at least one dimension."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        array = np.array([part & MASK], np.uint64) if isinstance(part, int) else part
        state = mix(state ^ mix(array))
    return state


def permute(index: NDArray[Any], n: int, keys: U64) -> NDArray[np.int64]:
    """The image of positions `index` [B] under the permutation of 0..n-1 named by `keys` ([B] or
    [1]): [B] int64.

    A Feistel network over Z_a x Z_b with a*b the least such product near n (a = ceil(sqrt n)), as
    in Black and Rogaway's "Ciphers with Arbitrary Finite Domains" (2002), and cycle walking over
    the fewer than a values above n.
    """
    assert n > 0
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = np.broadcast_to(keys, np.shape(index))
    out = _feistel(np.asarray(index).astype(np.uint64), a, b, keys)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _feistel(out[outside], a, b, keys[outside])
    return out.astype(np.int64)


def _feistel(x: U64, a: int, b: int, keys: U64) -> U64:
    ua, ub = np.uint64(a), np.uint64(b)
    right, left = np.divmod(x, ua)
    for round in range(ROUNDS):
        salt = keys + np.uint64(2 * round)
        left = (left + mix(right ^ salt) % ua) % ua
        right = (right + mix(left ^ ~salt) % ub) % ub
    return right * ua + left
