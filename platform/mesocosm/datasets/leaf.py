"""The leaves of a space, and checks of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.texts import check_text
from mesocosm.errors import MesocosmError

EXACT = 2**53
"""Integers beyond this have no exact float64."""
FLOAT32 = float(np.nextafter((2 - 2.0**-24) * 2.0**127, 0))
"""The largest number that a world can compute with."""
AGREE = "make the environment and its space agree"

Array = NDArray[Any]
Space = gymnasium.Space[Any]
Path = tuple[str | int, ...]


def children(space: Space) -> list[tuple[Any, Space]]:
    """The (key, space) of each part of a Dict or Tuple, in the space's own order."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return list(enumerate(space.spaces)) if isinstance(space, spaces.Tuple) else []


@dataclass(frozen=True)
class Leaf:
    """One Box, Discrete, MultiDiscrete, MultiBinary or Text inside a space, and its columns. An
    image has none."""

    name: str
    """The name in messages: `observation.camera.pose`"""
    path: Path
    space: Space
    numbers: slice
    categories: slice
    cardinalities: tuple[int, ...] = ()
    start: Array | None = None  # [m] int64: the raw value of category 0
    characters: Array | None = None  # Text: sorted code points, uint32; empty without slots
    text: int | None = None
    """Text: its column in the texts of a dataset."""
    image: int | None = None
    """Image: its place among the images of a dataset."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.space.shape or ())

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.space.dtype)

    def labels(self) -> list[str]:
        """The name of each number column: `observation.pose[2]`."""
        columns = range(self.numbers.stop - self.numbers.start)
        return [f"{self.name}[{i}]" if self.shape else self.name for i in columns]


def first_beyond_float32(values: Array) -> tuple[int, int] | None:
    """The (row, column) of the first finite number of `values` [B, n] that float32 cannot hold."""
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4 or not values.size:
        return None
    if max(values.max(), -values.min()) <= FLOAT32:  # false where a number is NaN
        return None
    places = np.argwhere(np.isfinite(values) & (np.abs(values) > FLOAT32)).tolist()
    return (places[0][0], places[0][1]) if places else None


def check_numbers(leaf: Leaf, flat: Array) -> None:
    if flat.dtype.kind not in "fiub":
        raise MesocosmError(f"{leaf.name} must have dtype {leaf.dtype}, got {flat.dtype}; {AGREE}")
    if flat.dtype.kind in "iu" and flat.dtype.itemsize == 8 and flat.size:
        for extreme in (flat.max(), flat.min()):
            if abs(int(extreme)) > EXACT:
                problem = f"the integer {extreme} is beyond 2**53 and has no exact float64"
                fix = "rescale it, or split it with a wrapper"
                raise MesocosmError(f"{leaf.name}: {problem}; {fix}")
    if (place := first_beyond_float32(flat)) is not None:
        problem = f"holds {flat[place]:g}, and a world computes in float32"
        raise MesocosmError(f"{leaf.labels()[place[1]]} {problem}; rescale it")


def checked_categories(leaf: Leaf, start: Array, flat: Array) -> Array:
    if flat.dtype.kind not in "iub":
        problem = f"must hold integers of {leaf.space}, got dtype {flat.dtype}"
        raise MesocosmError(f"{leaf.name} {problem}; {AGREE}")
    categories = flat.astype(np.int64) - start
    bad = (categories < 0) | (categories >= np.array(leaf.cardinalities, np.int64))
    if bad.any():
        problem = f"the value {flat[bad][0]} is outside the space {leaf.space}"
        raise MesocosmError(f"{leaf.name}: {problem}; {AGREE}")
    return categories


def checked_frames(leaf: Leaf, frames: Array) -> Array:
    """Frames [B, height, width, channels] in the dtype of an image. Raises MesocosmError where they
    are of another kind.
    """
    if frames.dtype != leaf.dtype and len(frames):
        problem = f"must have dtype {leaf.dtype}, got {frames.dtype}"
        raise MesocosmError(f"{leaf.name} {problem}; {AGREE}")
    return frames.astype(leaf.dtype, copy=False)


def checked_texts(leaf: Leaf, values: Any, size: int) -> Sequence[str]:
    space = leaf.space
    assert isinstance(space, spaces.Text)
    strings = not isinstance(values, str) and all(isinstance(value, str) for value in values)
    if not strings or len(values) != size:
        raise MesocosmError(f"{leaf.name} must be {size} strings, got {values!r}; {AGREE}")
    for value in values:
        check_text(space, value, leaf.name)
    return [str(value) for value in values]
