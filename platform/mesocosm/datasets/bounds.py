"""Values outside their space, and `reality.bounds`: what `collect` and `import` do with them.

    drop     the episode is dropped
    clip     a number outside the bounds of a Box becomes the nearest bound
    ignore   numbers outside the bounds of a Box are stored as they are

A category or a text outside its space always drops its episode, because no column can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.spaces import FLOAT32, children

Array = NDArray[Any]
Space = gymnasium.Space[Any]
FIX = "correct the space, or set reality.bounds=clip or reality.bounds=ignore"


def outside(space: Space, array: Array, bounds: str = "drop") -> Array:
    """Which values are outside their space, [B] bool.

    Bounds are compared in the precision of the space, in which the values may have been logged.

    Args:
        space: a Box, Discrete, MultiDiscrete, MultiBinary or Text.
        array: [B, *shape]; of texts [B] objects.
        bounds: with "ignore", the bounds of a Box are not compared.
    """
    if not len(array):
        return np.zeros(0, bool)
    if isinstance(space, spaces.Text):
        allowed = space.character_set
        lengths = range(space.min_length, space.max_length + 1)
        return np.array([not (len(v) in lengths and set(v) <= allowed) for v in array], bool)
    flat = array.reshape(len(array), -1)
    inside = np.ones(len(array), bool)
    if np.dtype(space.dtype).kind != "f" and flat.dtype.kind == "f":
        inside = (flat == np.rint(flat)).all(1)
    low: Array
    high: Array
    if isinstance(space, spaces.Box):
        if bounds == "ignore":
            return ~inside
        with np.errstate(over="ignore"):  # a number that is too large becomes infinite
            flat = flat.astype(space.dtype) if np.dtype(space.dtype).kind == "f" else flat
        low, high = space.low.reshape(-1), space.high.reshape(-1)
    elif isinstance(space, spaces.Discrete):
        low = np.array([int(space.start)])
        high = low + int(space.n) - 1
    elif isinstance(space, spaces.MultiDiscrete):
        low = np.ravel(space.start)
        high = low + np.ravel(space.nvec) - 1
    else:
        low, high = np.array([0]), np.array([1])
    return np.asarray(~(inside & ((flat >= low) & (flat <= high)).all(1)))


def first_outside(space: Space, value: Any, name: str) -> str | None:
    """Describe the first number of one value that is outside the bounds of its Box.

    Returns:
        "observation.pose=[7.0] is outside Box(...)", or None where every number is inside. Values
        of another shape or kind are left to the codec, which names them.
    """
    for key, child, part in _parts(space, value):
        description = first_outside(child, part, f"{name}.{key}")
        if description is not None:
            return description
    array = _numbers(space, value)
    if array is None or not outside(space, array[None])[0]:
        return None
    return f"{name}={array.tolist()} is outside {space}"


def clipped(space: Space, value: Any) -> Any:
    """One value with every number of a Box clipped to its bounds; the rest is not changed.

    An array with a number that is not finite, or beyond float32, is not changed either: such an
    episode is dropped, here and in `import`.
    """
    parts = {key: clipped(child, part) for key, child, part in _parts(space, value)}
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        return {**value, **parts}
    if isinstance(space, spaces.Tuple) and isinstance(value, Sequence):
        return tuple(parts.values())
    array = _numbers(space, value)
    if array is None or not (np.abs(array.astype(np.float64)) <= FLOAT32).all():
        return value
    assert isinstance(space, spaces.Box)
    return np.clip(array, space.low, space.high)


def _parts(space: Space, value: Any) -> list[tuple[str, Space, Any]]:
    """The (key, space, value) of each part of a Dict or Tuple that the value has."""
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        return [(key, child, value[key]) for key, child in children(space) if key in value]
    if isinstance(space, spaces.Tuple) and isinstance(value, Sequence):
        return [(str(i), child, value[i]) for i, child in children(space) if i < len(value)]
    return []


def _numbers(space: Space, value: Any) -> Array | None:
    """The value of a Box of numbers as an array; None where it has another kind or shape."""
    if not isinstance(space, spaces.Box) or space.dtype == np.bool_:
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.shape == space.shape and array.dtype.kind in "fiu" else None


class Clipped(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose observations are clipped to its observation space."""

    def reset(self, **options: Any) -> Any:
        observation, *rest = self.env.reset(**options)
        return clipped(self.observation_space, observation), *rest

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        return clipped(self.observation_space, observation), *rest
