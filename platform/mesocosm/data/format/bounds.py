"""Values outside their space, and `reality.bounds`, which says what `collect` and `import` do with
them.

    drop     the episode is dropped
    clip     a number outside the bounds of a Box becomes the nearest bound
    ignore   numbers outside the bounds of a Box are stored as they are

`clip` and `ignore` concern the numbers of a Box. A category or a text outside its space always
drops its episode, because no column can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.format.spaces import FLOAT32

Array = NDArray[Any]
Space = gymnasium.Space[Any]
FIX = "correct the space, or set reality.bounds=clip or reality.bounds=ignore"


def outside(space: Space, array: Array, bounds: str = "drop") -> Array:
    """Which values are outside their space.

    Bounds are compared in the precision of the space, in which the values may have been logged.

    Args:
        space: a Box, Discrete, MultiDiscrete, MultiBinary or Text.
        array: [B, *shape]; of texts [B] objects.
        bounds: with "ignore", the bounds of a Box are not compared.

    Returns:
        [B] bool.
    """
    if not len(array):
        return np.zeros(0, bool)
    if isinstance(space, spaces.Text):
        allowed = space.character_set
        lengths = range(space.min_length, space.max_length + 1)
        return np.array([not (len(v) in lengths and set(v) <= allowed) for v in array], bool)
    flat = array.reshape(len(array), -1)
    whole = np.ones(len(array), bool)
    if flat.dtype.kind == "f":
        whole = (flat == np.rint(flat)).all(1)
    if isinstance(space, spaces.Box):
        dtype = np.dtype(space.dtype)
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            typed = flat.astype(dtype) if dtype.kind == "f" else flat
        inside = ((typed >= space.low.reshape(-1)) & (typed <= space.high.reshape(-1))).all(1)
        inside |= bounds == "ignore"
        return np.asarray(~(inside if dtype.kind == "f" else inside & whole))
    if isinstance(space, spaces.Discrete):
        low, n = np.array([space.start]), np.array([space.n])
    elif isinstance(space, spaces.MultiDiscrete):
        low, n = np.ravel(space.start), np.ravel(space.nvec)
    else:
        low, n = np.zeros(1, np.int64), np.array([2])
    return np.asarray(~(whole & ((flat >= low) & (flat < low + n)).all(1)))


def first_outside(space: Space, value: Any, name: str) -> str | None:
    """Describe the first number of one value that is outside the bounds of its Box.

    Returns:
        "observation.pose=[7.0] is outside Box(...)", or None where every number is inside. Values
        of another shape or kind are left to the codec, which names them.
    """
    for key, child, part in _children(space, value):
        found = first_outside(child, part, f"{name}.{key}")
        if found is not None:
            return found
    if not isinstance(space, spaces.Box) or space.dtype == np.bool_:
        return None
    array = _of_shape(space, value)
    if array is None or not outside(space, array[None])[0]:
        return None
    return f"{name}={array.tolist()} is outside {space}"


def clipped(space: Space, value: Any) -> Any:
    """One value with every number of a Box clipped to its bounds; the rest is left as it is.

    An array with a number that is not finite, or beyond float32, is left as it is, too: such an
    episode is dropped, here and in `import`.
    """
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        parts = {key: clipped(child, part) for key, child, part in _children(space, value)}
        return {**value, **parts}
    if isinstance(space, spaces.Tuple) and isinstance(value, Sequence):
        return tuple(clipped(child, part) for _, child, part in _children(space, value))
    if not isinstance(space, spaces.Box) or space.dtype == np.bool_:
        return value
    array = _of_shape(space, value)
    if array is None or not (np.abs(array.astype(np.float64)) <= FLOAT32).all():
        return value
    return np.clip(array, space.low, space.high)


def _children(space: Space, value: Any) -> list[tuple[str, Space, Any]]:
    """(key, space, value) of each part of a Dict or Tuple that the value has."""
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        return [(key, child, value[key]) for key, child in space.spaces.items() if key in value]
    if isinstance(space, spaces.Tuple) and isinstance(value, Sequence):
        parts = zip(space.spaces, value, strict=False)
        return [(str(i), child, part) for i, (child, part) in enumerate(parts)]
    return []


def _of_shape(space: spaces.Box, value: Any) -> Array | None:
    """The value as numbers of the shape of the space; None where it is something else."""
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
