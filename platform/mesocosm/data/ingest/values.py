"""Columns of an Arrow table as NumPy arrays, and the spaces that are inferred from their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as is_
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.ingest.frames import logged_frames
from mesocosm.data.ingest.leaves import SEPARATOR, ColumnLeaf, Space, innermost, kind_of, shown
from mesocosm.errors import UsageError

Array = NDArray[Any]
CATEGORIES = 256
"""Integers with more distinct values are a quantity rather than a choice."""


class RowError(UsageError):
    """A fault of a whole file, with the row of the batch (from 0) that shows it."""

    def __init__(self, row: int, text: str):
        super().__init__(text)
        self.row, self.text = row, text


def take(table: pa.Table, leaf: ColumnLeaf) -> tuple[Array, Array, Array]:
    """Read one leaf of B rows from a flattened table.

    Returns:
        (values [B, *shape], missing [B] bool, wrong shape [B] bool). Values are 0 in rows that
        are missing, also in part, or of another shape. Of pictures they are `LoggedFrame` [B].
    """
    parts = []
    kinds = ("number", "bool") if leaf.kind == "flag" else (leaf.kind,)
    for name in leaf.columns:
        array = _column(table, name)
        if not is_.is_null(innermost(array.type)[0]) and kind_of(array.type) not in kinds:
            must = f"{shown(name)} must be {' or '.join(kinds)}"
            raise RowError(_first_valid(array), f"{must}, got {array.type} (mixed dtypes)")
        if leaf.kind == "image":
            frames, absent = logged_frames(array)
            return frames, absent, np.zeros(len(frames), bool)
        parts.append(_values(array, leaf.kind, () if leaf.flattened else leaf.shape))
    if not leaf.flattened:
        return parts[0]
    values, missing, misshapen = zip(*parts, strict=True)
    return np.stack(values, 1), np.any(missing, 0), np.any(misshapen, 0)


def take_integers(table: pa.Table, name: str) -> tuple[Array, Array]:
    """A column of whole numbers as (int64 [B], missing [B] bool)."""
    array = _column(table, name)
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if is_.is_null(array.type):
        return np.zeros(len(array), np.int64), missing
    if not is_.is_integer(array.type):
        row = _first_valid(array)
        if is_.is_floating(array.type):
            fractions = np.flatnonzero(pc.fill_null(array, 0).to_numpy() % 1)
            row = int(fractions[0]) if len(fractions) else row
        raise RowError(row, f"{name} must be a whole number, got {array[row].as_py()!r}")
    return pc.fill_null(array, 0).to_numpy().astype(np.int64), missing


def _column(table: pa.Table, name: str) -> pa.Array:
    """A column. Batches of JSON may lack it, or hold a struct in one batch and not in another."""
    if name in table.column_names:
        return table[name].combine_chunks()
    for other in table.column_names:
        type = table.schema.field(other).type
        nested = other.startswith(name + SEPARATOR) or name.startswith(other + SEPARATOR)
        if nested and not is_.is_null(type):
            raise RowError(
                _first_valid(table[other]),
                f"{shown(other)} is {type} where the first rows have {shown(name)} (mixed dtypes)",
            )
    return pa.nulls(table.num_rows)


def _first_valid(array: pa.Array | pa.ChunkedArray) -> int:
    return max(pc.index(array.is_valid(), True).as_py(), 0)


def _values(array: pa.Array, kind: str, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """(values [B, *shape], missing [B], wrong shape [B]) of an array of B values or lists."""
    missing = array.is_null().to_numpy(zero_copy_only=False)
    fine = np.zeros(len(array), bool)
    values = np.zeros((len(array), *shape), {"text": object, "bool": bool}.get(kind, np.int64))
    if is_.is_null(array.type):
        return values, missing, fine
    if bool(shape) != is_.is_list(array.type):
        return values, missing, ~missing
    if not shape:
        fill = {"text": "", "bool": False}.get(kind_of(array.type) or "", 0)
        return pc.fill_null(array, fill).to_numpy(zero_copy_only=False), missing, fine
    whole = pc.fill_null(pc.list_value_length(array), -1).to_numpy() == shape[0]
    inner, gaps, odd = _values(array.filter(pa.array(whole)).flatten(), kind, shape[1:])
    missing, misshapen = missing.copy(), ~missing & ~whole
    count = int(whole.sum())
    missing[whole] = gaps.reshape(count, shape[0]).any(1)
    misshapen[whole] = odd.reshape(count, shape[0]).any(1)
    values = values.astype(inner.dtype)
    values[whole] = inner.reshape(count, *shape)
    return values, missing, misshapen


@dataclass(frozen=True)
class Stat:
    """Statistics of the values of a leaf. `merged` gives the same in any order."""

    count: int = 0
    kinds: frozenset[str] = frozenset()
    """NumPy's names of the types, text, or image."""
    low: tuple[float, ...] = ()
    """Per element."""
    high: tuple[float, ...] = ()
    longest: int = 0
    characters: frozenset[str] = frozenset()

    @staticmethod
    def of(array: Array) -> Stat:
        """Statistics of values [B, ...]."""
        if not len(array):
            return Stat()
        if array.dtype == object:
            characters = frozenset().union(*map(set, array))
            longest = max(map(len, array))
            kinds = frozenset({"text"})
            return Stat(len(array), kinds, longest=longest, characters=characters)
        flat = array.reshape(len(array), -1)
        low, high = (tuple(bound.astype(float).tolist()) for bound in (flat.min(0), flat.max(0)))
        return Stat(len(array), frozenset({array.dtype.name}), low, high)

    def merged(self, other: Stat) -> Stat:
        """Statistics of the values of both."""
        if not self.count or not other.count:
            return self if self.count else other
        return Stat(
            self.count + other.count,
            self.kinds | other.kinds,
            tuple(map(min, self.low, other.low)),
            tuple(map(max, self.high, other.high)),
            max(self.longest, other.longest),
            self.characters | other.characters,
        )


def infer_space(leaf: ColumnLeaf, stat: Stat, action: bool) -> tuple[Space, str]:
    """Infer the space of a leaf from its values.

    Returns:
        (space, a description of what is guessed in it).

    Raises:
        UsageError: No row has a value.
    """
    if not stat.count:
        raise UsageError(f"{leaf.name} has no value in any usable row; give data that has some")
    if leaf.pixels:
        return spaces.Box(0, 255, leaf.shape, np.uint8), "frames of the first one's size"
    if "text" in stat.kinds:
        charset = "".join(sorted(stat.characters))
        how = f"guess: at most {stat.longest} of the {len(charset)} characters seen"
        return spaces.Text(max(stat.longest, 1), min_length=0, charset=charset or " "), how
    if stat.kinds == {"bool"}:
        if leaf.shape:
            return spaces.MultiBinary(leaf.shape), "booleans"
        return spaces.Discrete(2), "booleans: 0 is false, 1 true"
    lowest, highest = min(stat.low, default=0), max(stat.high, default=0)
    seen = f"{lowest:g} to {highest:g}" if stat.low else "nothing"
    floats = [kind for kind in stat.kinds if kind.startswith("float")]
    if not floats and lowest == 0 and highest < CATEGORIES and (not leaf.shape or action):
        sizes = np.array(stat.high, np.int64).reshape(leaf.shape) + 1
        how = "guess: a choice among the integers 0..n-1 that were seen"
        return (spaces.MultiDiscrete(sizes) if leaf.shape else spaces.Discrete(int(sizes))), how
    dtype: Any = np.result_type(*stat.kinds)
    if floats and len(floats) < len(stat.kinds):
        dtype = np.dtype(np.float64)
    elif not floats and dtype.kind == "f":  # int64 and uint64 together
        dtype = np.dtype(np.int64)
    quantity = "" if floats else "a quantity, "
    if action:
        low, high = (np.array(b).astype(dtype).reshape(leaf.shape) for b in (stat.low, stat.high))
        box = spaces.Box(low, high, leaf.shape, dtype.type)
        return box, f"guess: {quantity}within the values seen, {seen}"
    least, most = (-np.inf, np.inf) if floats else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    box = spaces.Box(least, most, leaf.shape, dtype.type)
    return box, f"guess: {quantity}without bounds; {seen} was seen"
