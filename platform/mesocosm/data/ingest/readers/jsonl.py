"""JSONL: one object a line. Pieces are byte ranges, and a line belongs to the piece it begins in.

An integer among floats is a float.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.types as is_

from mesocosm.data.ingest.leaves import innermost
from mesocosm.data.ingest.readers import BATCH_BYTES, BATCH_ROWS, LogPiece
from mesocosm.data.ingest.readers.files import open_file, stamp
from mesocosm.data.ingest.values import RowError
from mesocosm.datasets.texts import utf8_problem
from mesocosm.errors import UsageError

HEAD_ROWS = 1000
PIECE_BYTES = 1 << 25
BIG = "an integer beyond 64 bits"


def head(path: str) -> pa.Table:
    rows = [row for row, _ in itertools.islice(_rows(path, 0, stamp(path)[0]), HEAD_ROWS)]
    return _table(rows, list(dict.fromkeys(name for row in rows for name in row)))


def pieces(path: str) -> list[tuple[int, int]]:
    end = stamp(path)[0]
    return [(begin, min(begin + PIECE_BYTES, end)) for begin in range(0, end, PIECE_BYTES)]


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
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
    """The objects of the lines that begin in [begin, end), each with its length in bytes."""
    try:
        with open_file(path) as file:
            if begin:
                file.seek(begin - 1)
                file.readline()
            for number in itertools.count():
                if file.tell() >= end:
                    return
                line = file.readline()
                if not line.strip():
                    if any(iter(lambda: file.read(1 << 16).strip(), b"")):
                        raise RowError(number, "the line is empty; every line must hold one object")
                    return
                try:
                    row = json.loads(line)
                except ValueError as error:
                    text = f"the line is not JSON ({error}); write one object a line"
                    raise RowError(number, text) from error
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise RowError(number, f"the line holds a {kind}; write one object a line")
                yield row, len(line)
    except OSError as error:
        raise UsageError(
            f"{path!r} cannot be read ({error.strerror}); check its permissions"
        ) from error


def _table(rows: list[dict[str, Any]], columns: Sequence[str], done: int = 0) -> pa.Table:
    try:
        return pa.table({name: _array(name, [row.get(name) for row in rows]) for name in columns})
    except RowError as error:
        raise RowError(done + error.row, error.text) from error


def _array(name: str, values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
    except UnicodeEncodeError as error:
        row, problem = _surrogate(values)
        raise RowError(row, f"{name}: {problem}") from error
    except (pa.ArrowException, OverflowError, TypeError) as error:
        _check_kinds(name, values)
        types = "numbers, booleans, strings, lists or objects of them"
        raise RowError(0, f"{name} cannot be read ({error}); give {types}") from error
    if is_.is_floating(innermost(array.type)[0]):  # true among floats has become 1.0
        _check_kinds(name, values)
    return array


def _surrogate(values: list[Any]) -> tuple[int, str]:
    """The first row with a text that UTF-8 cannot hold, and the problem."""
    for row, value in enumerate(values):
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str) and (problem := utf8_problem(item)) is not None:
                return row, problem
            if isinstance(item, list | dict):
                pending += [*item, *(item.values() if isinstance(item, dict) else ())]
    return 0, "a text cannot be written as UTF-8"


def _check_kinds(name: str, values: list[Any]) -> None:
    """Raise RowError at the first value of another kind than those before it."""
    kinds: dict[tuple[str, ...], str] = {}
    for row, value in enumerate(values):
        for path, kind in _kinds(value, ()):
            if kind == BIG:
                raise RowError(row, f"{name} holds {BIG}; rescale it, or write it as a string")
            before = kinds.setdefault(path, kind)
            if kind != before:
                text = f"{name} is {kind} where it was {before} before (mixed dtypes)"
                raise RowError(row, f"{text}; give one type")


def _kinds(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(where, kind) of a JSON value and of all values in it."""
    if isinstance(value, list):
        yield path, "a list"
        for item in value:
            yield from _kinds(item, (*path, ""))
    elif isinstance(value, dict):
        yield path, "an object"
        for key, item in value.items():
            yield from _kinds(item, (*path, key))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, BIG
    elif value is not None:
        yield path, {bool: "true or false", str: "a string"}.get(type(value), "a number")
