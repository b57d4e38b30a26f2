"""Randomness as a function: an integer hash of (seed, environment, episode, step, slot), the same
bits in numpy, torch CPU and CUDA.

The hash is splitmix64's finaliser (Steele, Lea, Flood 2014) on int64 with wraparound. Functions
take torch tensors, or numpy arrays of int64, and return the same kind.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMBER, TASK, REWARD, REWARD_VALUE, TERMINATION, SAMPLED, POSSIBLE = range(7)
"""Slots of uniforms that belong to no observation; those of observations start at OBSERVATION."""
OBSERVATION = 16
KEEP = 0.8
"""Fraction of the episodes that a member trains on."""

Ints = TypeVar("Ints", Tensor, NDArray[np.int64])


def _signed(value: int) -> int:
    """`value` modulo 2^64 as a signed int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_SEED = _signed(0xD1342543DE82EF95)
_FIELDS = [_signed(c) for c in (0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3)]


def mix(x: Ints) -> Ints:
    """A bijection of int64 that scatters every bit; the masks make arithmetic shifts logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def keys(seed: int, env: Any, episode: Any, step: Any) -> Any:
    """int64 keys of the broadcast shape of `env`, `episode` and `step`: torch if one of them is a
    tensor, numpy otherwise.
    """
    fields: tuple[Any, ...] = (env, episode, step)
    device = next((field.device for field in fields if isinstance(field, Tensor)), None)
    state: Any = np.full(1, _signed(seed), np.int64)
    arrays: list[Any]
    if device is None:  # arrays of at least one dimension: numpy warns of a scalar's wraparound
        arrays = [np.atleast_1d(np.asarray(field, dtype=np.int64)) for field in fields]
    else:
        state = torch.from_numpy(state).to(device)
        arrays = [torch.as_tensor(field, dtype=torch.int64, device=device) for field in fields]
    state = mix(state * _SEED + _GOLDEN)
    for array, constant in zip(arrays, _FIELDS, strict=True):
        state = mix((state ^ (array * constant)) + _GOLDEN)
    if device is None:
        return state.reshape(np.broadcast_shapes(*(np.shape(field) for field in fields)))
    return state


def bits(key: Any, slot: Any) -> Any:
    """int64 of the broadcast shape: the hash of (key, slot), the bits of `uniform`."""
    step = (slot + 1) * _GOLDEN
    return mix(key + (_signed(step) if isinstance(slot, int) else step))


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


def member_mask(episode: Tensor, members: int) -> Tensor:
    """[B] int64 episode hashes -> bool [K, B]: the members that train on an episode: each with
    probability KEEP, and always one that the hash chooses.
    """
    member = torch.arange(members, device=episode.device).unsqueeze(1)
    key = mix(episode)
    always = (key >> 1) % members
    return (uniform(key, member) < KEEP) | (member == always)


def left_out(episode: Tensor, members: int) -> Tensor:
    """bool [K]: the members to which `member_mask` gives none of these (few) episodes. They train
    on all of them.
    """
    return ~member_mask(episode, members).any(1)


def fitted_by(episode: Tensor, members: int) -> Tensor:
    """[B] int64 episode hashes -> bool [K, B]: the members whose base and heads are fitted on an
    episode. The other episodes stop the fit, so a single member leaves out as many as each of
    several does.
    """
    if members == 1:
        return (uniform(mix(episode), 0) < KEEP).unsqueeze(0)
    return member_mask(episode, members)
