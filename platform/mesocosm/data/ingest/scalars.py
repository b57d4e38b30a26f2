"""Columns of one value a row: the episode, its step, and what is constant in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as is_
from numpy.typing import NDArray

from mesocosm.data.ingest.edges import Key
from mesocosm.data.ingest.layout import Column, Leaf, RowError

Array = NDArray[Any]


def scalar(table: pa.Table, column: str, kind: str) -> Leaf:
    type = table.schema.field(column).type if column in table.column_names else pa.null()
    return Leaf(column, (), (Column(column, (), type),), kind, (), None)


def read_keys(table: pa.Table, named: bool) -> tuple[list[Key], Array]:
    """(each row's episode, which rows do not say theirs). Such a row is taken to be of the episode
    before it, or else of the one after it.
    """
    keys: list[Key | None] = table.column("episode").to_pylist()
    if any(key is not None and isinstance(key, str) != named for key in keys):
        row = next(
            i for i, key in enumerate(keys) if key is not None and isinstance(key, str) != named
        )
        raise RowError(
            row,
            f"episode is {keys[row]!r} where it is {'a string' if named else 'a whole number'}"
            " before (mixed dtypes); give one type",
        )
    missing = np.array([key is None for key in keys], bool)
    if not missing.any():
        return keys, missing  # type: ignore[return-value]
    if missing.all():
        raise RowError(0, "episode is missing; every row must say which episode it is of")
    at = next(key for key in keys if key is not None)
    filled = []
    for key in keys:
        at = at if key is None else key
        filled.append(at)
    return filled, missing


def read_steps(table: pa.Table) -> tuple[Array, Array]:
    """(each row's step, which rows do not say theirs)"""
    column = table.column("step")
    missing = column.is_null().to_numpy()
    if is_.is_null(column.type):
        return np.zeros(table.num_rows, np.int64), missing
    if not is_.is_integer(column.type):
        row = next(
            (
                i
                for i, step in enumerate(column.to_pylist())
                if step is not None and type(step) is not int
            ),
            0,
        )
        raise RowError(row, f"step is {column[row].as_py()!r}; every row must have a whole number")
    return np.asarray(column.fill_null(0).to_numpy()).astype(np.int64), missing


def texts(table: pa.Table, column: str, default: str) -> list[str]:
    return [default if text is None else text for text in optional(table, column, str)]


def optional(table: pa.Table, column: str, kind: type) -> list[Any]:
    """A column's values, None where it has none."""
    if column not in table.column_names:
        return [None] * table.num_rows
    values: list[Any] = table.column(column).to_pylist()
    wrong = next(
        (i for i, value in enumerate(values) if value is not None and not isinstance(value, kind)),
        None,
    )
    if wrong is not None:
        wanted = "a string" if kind is str else "a whole number, or true or false"
        raise RowError(wrong, f"{column} is {values[wrong]!r} (mixed dtypes); give {wanted}")
    return values
