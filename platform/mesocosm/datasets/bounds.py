"""Values outside their space, and `reality.bounds`, which says what happens to an episode with a
number outside the bounds of a Box: `drop` it, `clip` the number, or `ignore` the bounds. A category
or a text outside its space always drops its episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.leaf import FLOAT32, children
from mesocosm.datasets.texts import text_problem

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
        return np.array([text_problem(space, text) is not None for text in array], bool)
    flat = array.reshape(len(array), -1)
    inside = np.ones(len(array), bool)
    floats = np.dtype(space.dtype).kind == "f"
    if not floats and flat.dtype.kind == "f":
        inside = (flat == np.rint(flat)).all(1)
    low, high = np.zeros(1, np.int64), np.ones(1, np.int64)
    if isinstance(space, spaces.Box):
        if bounds == "ignore":
            return ~inside
        with np.errstate(over="ignore"):  # a number that is too large becomes infinite
            flat = flat.astype(space.dtype) if floats else flat
        low, high = space.low.reshape(-1), space.high.reshape(-1)
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes = space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n
        low = np.ravel(space.start).astype(np.int64)
        high = low + np.ravel(sizes) - 1
    return np.asarray(~(inside & ((flat >= low) & (flat <= high)).all(1)))


def first_outside(space: Space, value: Any, name: str) -> str | None:
    """Describe the first number that is outside the bounds of its Box: "observation.pose=[7.0] is
    outside Box(...)". Values of another shape or kind are left to the codec, which names them.
    """
    problems: list[str] = []

    def check(box: spaces.Box, array: Array, name: str) -> Any:
        if outside(box, array[None])[0]:
            problems.append(f"{name}={array.tolist()} is outside {box}")
        return array

    _map_boxes(space, value, name, check)
    return problems[0] if problems else None


def clipped(space: Space, value: Any) -> Any:
    """One value with every number of a Box clipped to its bounds. An array with a number that is
    not finite, or beyond float32, is not changed: such an episode is dropped.
    """

    def clip(box: spaces.Box, array: Array, name: str) -> Any:
        finite = (np.abs(array.astype(np.float64)) <= FLOAT32).all()
        return np.clip(array, box.low, box.high) if finite else array

    return _map_boxes(space, value, "", clip)


def _map_boxes(
    space: Space, value: Any, name: str, change: Callable[[spaces.Box, Array, str], Any]
) -> Any:
    """The value with `change(box, array, name)` in place of the array of each Box of numbers."""
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        parts = dict(value)
        for key, child in children(space):
            if key in value:
                parts[key] = _map_boxes(child, value[key], f"{name}.{key}", change)
        return parts
    if isinstance(space, spaces.Tuple) and isinstance(value, Sequence):
        items = zip(children(space), value, strict=False)
        return tuple(_map_boxes(child, it, f"{name}.{i}", change) for (i, child), it in items)
    if isinstance(space, spaces.Box) and space.dtype != np.bool_:
        with suppress(ValueError):
            array = np.asarray(value)
            if array.shape == space.shape and array.dtype.kind in "fiu":
                return change(space, array, name)
    return value


class Clipped(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose observations are clipped to its observation space."""

    def reset(self, **options: Any) -> Any:
        observation, *rest = self.env.reset(**options)
        return clipped(self.observation_space, observation), *rest

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        return clipped(self.observation_space, observation), *rest
