"""Spaces from values: what each leaf's values were (`Stat`), and the space that this makes it.

    float                     Box without bounds; of an action: within the bounds that were seen
    integers 0..n-1           one a row, at most CATEGORIES: Discrete(n); of an action also as a list: MultiDiscrete
    other integers            Box of their type
    booleans                  Discrete(2); as a list MultiBinary
    strings                   Text over the characters that were seen, up to the longest

Every one of them is a guess from values, and is said to be one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.ingest.layout import Leaf, Space
from mesocosm.errors import UsageError

Array = NDArray[Any]
CATEGORIES = 256
"""More distinct integers are a quantity rather than a choice."""


@dataclass(frozen=True)
class Stat:
    """What the values of a leaf were; `merged` in any order gives the same."""

    count: int = 0
    kinds: frozenset[str] = frozenset()
    """NumPy's names of their types, or text"""
    low: tuple[float, ...] = ()
    """Of each number"""
    high: tuple[float, ...] = ()
    longest: int = 0
    characters: frozenset[str] = frozenset()

    @staticmethod
    def of(array: Array) -> Stat:
        """[B, ...]"""
        if not len(array):
            return Stat()
        if array.dtype == object:
            return Stat(
                len(array),
                frozenset({"text"}),
                longest=max(map(len, array)),
                characters=frozenset().union(*map(set, array)),
            )
        flat = array.reshape(len(array), -1)
        low, high = flat.min(0).astype(np.float64), flat.max(0).astype(np.float64)
        return Stat(
            len(array), frozenset({array.dtype.name}), tuple(low.tolist()), tuple(high.tolist())
        )

    def merged(self, other: Stat) -> Stat:
        if not self.count or not other.count:
            return self if self.count else other
        low = tuple(map(min, self.low, other.low))
        high = tuple(map(max, self.high, other.high))
        return Stat(
            self.count + other.count,
            self.kinds | other.kinds,
            low,
            high,
            max(self.longest, other.longest),
            self.characters | other.characters,
        )


def space_of(leaf: Leaf, stat: Stat, action: bool) -> tuple[Space, str]:
    """The space of a leaf whose values were `stat`, and what is guessed in it. Raises UsageError
    where there were none.
    """
    if not stat.count:
        raise UsageError(
            f"{leaf.name} has no value in any row that can be kept; give data that has some"
        )
    if "text" in stat.kinds:
        charset = "".join(sorted(stat.characters))
        return (
            spaces.Text(max(stat.longest, 1), min_length=0, charset=charset or " "),
            f"guess: at most {stat.longest} of the {len(charset)} characters seen",
        )
    if stat.kinds == {"bool"}:
        return (
            (spaces.MultiBinary(leaf.shape), "booleans")
            if leaf.shape
            else (spaces.Discrete(2), "booleans: 0 is false, 1 true")
        )
    if any(kind.startswith("float") for kind in stat.kinds):
        floats = [kind for kind in stat.kinds if kind.startswith("float")]
        dtype: Any = (
            np.result_type(*floats) if len(floats) == len(stat.kinds) else np.dtype(np.float64)
        )
        if action:
            low, high = (
                np.array(bound, dtype).reshape(leaf.shape) for bound in (stat.low, stat.high)
            )
            return (
                spaces.Box(low, high, leaf.shape, dtype.type),
                f"guess: within what was seen, {_range(stat)}",
            )
        return (
            spaces.Box(-np.inf, np.inf, leaf.shape, dtype.type),
            f"guess: without bounds; {_range(stat)} was seen",
        )
    low_seen, high_seen = min(stat.low, default=0), max(stat.high, default=0)
    if low_seen == 0 and high_seen < CATEGORIES and (not leaf.shape or action):
        sizes = [int(high) + 1 for high in stat.high]
        said = (
            f"guess: a choice among the {'integers' if not leaf.shape else 'integers of each'}"
            " 0..n-1 that were seen"
        )
        return (
            spaces.MultiDiscrete(np.array(sizes).reshape(leaf.shape))
            if leaf.shape
            else spaces.Discrete(sizes[0])
        ), said
    whole: Any = np.result_type(*stat.kinds)
    whole = whole if whole.kind in "iu" else np.dtype(np.int64)
    info = np.iinfo(whole)
    if action:
        low, high = (
            np.array(bound).astype(whole).reshape(leaf.shape) for bound in (stat.low, stat.high)
        )
        return (
            spaces.Box(low, high, leaf.shape, whole.type),
            f"guess: a quantity within what was seen, {_range(stat)}",
        )
    return (
        spaces.Box(info.min, info.max, leaf.shape, whole.type),
        f"guess: a quantity; {_range(stat)} was seen",
    )


def _range(stat: Stat) -> str:
    return f"{min(stat.low):g} to {max(stat.high):g}" if stat.low else "nothing"
