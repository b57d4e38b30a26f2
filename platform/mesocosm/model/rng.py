"""Randomness as a function: an integer hash of (seed, environment, episode, step, slot), the same
bits in numpy, torch CPU and CUDA.

The hash is splitmix64's finaliser (Steele, Lea, Flood 2014) on int64 with wraparound, arithmetic
shifts masked to logical ones. Every function takes torch tensors, or numpy arrays of int64, and
gives the same kind back.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMBER, TASK, REWARD, REWARD_VALUE, TERMINATION = range(5)
"""Slots of the uniforms that are no observation's; slots of observations and starts count from
OBSERVATION.
"""
OBSERVATION = 16
KEEP = 0.8
"""Share of the episodes that a member trains on."""

Ints = TypeVar("Ints", Tensor, NDArray[np.int64])


def _signed(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_FIELDS = tuple(
    _signed(c)
    for c in (0xD1342543DE82EF95, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3)
)


def mix(x: Ints) -> Ints:
    """A bijection of int64 that scatters every bit."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def keys(seed: int, env: Any, episode: Any, step: Any) -> Any:
    """int64 keys of the broadcast shape of `env`, `episode` and `step`: torch if one of them is a
    tensor, numpy otherwise.
    """
    given = (env, episode, step)
    tensors = [value for value in given if isinstance(value, Tensor)]
    if tensors:
        fields = [
            torch.as_tensor(value, dtype=torch.int64, device=tensors[0].device) for value in given
        ]
        return _fold(
            torch.full((1,), _signed(seed), dtype=torch.int64, device=tensors[0].device), fields
        )
    shape = np.broadcast_shapes(*(np.shape(value) for value in given))
    arrays = [np.atleast_1d(np.asarray(value, dtype=np.int64)) for value in given]
    return _fold(np.full(1, _signed(seed), dtype=np.int64), arrays).reshape(shape)


def _fold(state: Any, fields: list[Any]) -> Any:
    state = mix(state * _FIELDS[0] + _GOLDEN)
    for field, constant in zip(fields, _FIELDS[1:], strict=True):
        state = mix((state ^ (field * constant)) + _GOLDEN)
    return state


def bits(key: Any, slot: Any) -> Any:
    """int64 of the broadcast shape: the hash of (key, slot), from which `uniform` takes its bits."""
    return mix(
        key + (_signed((slot + 1) * _GOLDEN) if isinstance(slot, int) else (slot + 1) * _GOLDEN)
    )


def uniform(key: Any, slot: Any) -> Any:
    """float32 strictly between 0 and 1: the 2^23 odd multiples of 2^-24, each exact. `slot` is an
    int or int64s that broadcast with `key`.
    """
    numerator = ((bits(key, slot) >> 41) & ((1 << 23) - 1)) * 2 + 1
    if isinstance(numerator, Tensor):
        return numerator.to(torch.float32) * 2.0**-24
    return numerator.astype(np.float32) * np.float32(2.0**-24)


def member_of(seed: int, env: Any, episode: Any, members: int) -> Any:
    """int64 in 0 .. members-1: the member that imagines an episode."""
    hashed = bits(keys(seed, env, episode, -1), MEMBER)
    return ((hashed >> 32) & 0x7FFFFFFF) % members


def member_mask(episode: Tensor, members: int, keep: float = KEEP) -> Tensor:
    """[B] int64 episode hashes -> bool [K, B]: the members that train on an episode, each with
    probability `keep` (a little more: one member, by the hash too, always does).
    """
    member = torch.arange(members, device=episode.device).unsqueeze(1)
    key = mix(episode)
    always = (key >> 1) % members
    return (uniform(key, member) < keep) | (member == always)


def left_out(episode: Tensor, members: int) -> Tensor:
    """bool [K]: the members to which `member_mask` gives none of these episodes, as happens with
    one to three. They train on all of them.
    """
    return ~member_mask(episode, members).any(1)
