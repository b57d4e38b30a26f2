"""JSONL: one object a line. Pieces are ranges of bytes; a line is of the piece in which it begins.
An integer among floats is a float.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as is_

from mesocosm.data.ingest.leaves import innermost
from mesocosm.data.ingest.readers import BATCH_BYTES, BATCH_ROWS, Piece
from mesocosm.data.ingest.readers.files import opened, size
from mesocosm.data.ingest.values import RowError
from mesocosm.errors import UsageError

HEAD_ROWS = 1000
PIECE_BYTES = 1 << 25


def head(path: str) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for row in _rows(path, 0, size(path)):
        rows.append(row[0])
        if len(rows) == HEAD_ROWS:
            break
    return _table(rows, None)


def pieces(path: str) -> list[tuple[int, int]]:
    end = size(path)
    return [(begin, min(begin + PIECE_BYTES, end)) for begin in range(0, end, PIECE_BYTES)]


def read(piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A RowError counts rows from the piece's begin."""
    rows: list[dict[str, Any]] = []
    done = bytes = 0
    for row, length in _rows(piece.path, piece.begin, piece.end):
        rows.append(row)
        bytes += length
        if len(rows) == BATCH_ROWS or bytes >= BATCH_BYTES:
            yield _table(rows, columns, done)
            done += len(rows)
            rows, bytes = [], 0
    if rows:
        yield _table(rows, columns, done)


def _rows(path: str, begin: int, end: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of the lines that begin in [begin, end), each with its length in bytes. A
    RowError counts rows from `begin`.
    """
    try:
        with opened(path) as file:
            if begin:
                file.seek(begin - 1)
                file.readline()
            number = 0
            while file.tell() < end:
                line = file.readline()
                if not line.strip():
                    if any(iter(lambda: file.read(1 << 16).strip(), b"")):
                        raise RowError(number, "the line is empty; every line must hold one object")
                    return
                yield _object(line, number), len(line)
                number += 1
    except OSError as error:
        raise UsageError(
            f"{path!r} cannot be read ({error.strerror}); check its permissions"
        ) from error


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowError(
            number, f"the line is not JSON ({error}); write one object a line"
        ) from error
    if not isinstance(row, dict):
        raise RowError(number, f"the line holds a {type(row).__name__}; write one object a line")
    return row


def _table(rows: list[dict[str, Any]], columns: Sequence[str] | None, done: int = 0) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row) if columns is None else columns
    try:
        return pa.table({name: _array(name, [row.get(name) for row in rows]) for name in names})
    except RowError as error:
        raise RowError(done + error.row, error.text) from error


def _array(name: str, values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise _mixed(name, values) or RowError(
            0,
            f"{name} cannot be read ({error}); give numbers, booleans, strings, lists or objects of"
            " them",
        ) from error
    if (
        is_.is_floating(innermost(array.type)[0]) and (found := _mixed(name, values)) is not None
    ):  # true among floats would become 1.0
        raise found
    return array


def _mixed(name: str, values: list[Any]) -> RowError | None:
    """The first row whose value is of another type than those before it."""
    so_far: Any = None
    for row, value in enumerate(values):
        try:
            so_far = _joined(so_far, _signature(value))
        except TypeError as error:
            return RowError(row, f"{name} {error} (mixed dtypes); give one type")
        except OverflowError:
            return RowError(
                row, f"{name} holds an integer beyond 64 bits; rescale it, or write it as a string"
            )
    return None


def _signature(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        inner: Any = None
        for item in value:
            inner = _joined(inner, _signature(item))
        return [inner]
    if isinstance(value, dict):
        return {key: _signature(item) for key, item in value.items()}
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise OverflowError
    return {bool: "true or false", str: "a string"}.get(type(value), "a number")


def _joined(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, list) and isinstance(b, list):
        return [_joined(a[0], b[0])]
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: _joined(a.get(key), b.get(key)) for key in {**a, **b}}
    if a != b or isinstance(a, list | dict):
        raise TypeError(f"is {_said(b)} where it was {_said(a)} before")
    return a


def _said(signature: Any) -> str:
    return (
        "a list"
        if isinstance(signature, list)
        else "an object"
        if isinstance(signature, dict)
        else str(signature)
    )
