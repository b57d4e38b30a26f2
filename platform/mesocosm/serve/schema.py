"""Gymnasium spaces as JSON types: what a value of a space is in a request and in a reply, exact to
shapes, bounds and characters.

pydantic checks a request by them, and OpenAPI tells them to programs. A Dict is an object, a Tuple
and every array a (nested) array, a Text a string, a bool true or false, a member of Discrete,
MultiDiscrete and MultiBinary an integer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Field, Strict
from typing_extensions import TypedDict

from mesocosm.data.format.spaces import EXACT
from mesocosm.errors import UsageError


def integer(low: float | None, high: float | None) -> Any:
    """The annotation of an integer as JSON Schema has it: 2.0 is one, true and "2" are none. The
    bounds stand inside, or the schema would lose them.
    """
    return Annotated[int, Strict(), Field(ge=low, le=high), BeforeValidator(_whole)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Scalar:
    """One number of an array; a bound that is None is not told."""

    kind: type
    low: float | None = None
    high: float | None = None

    def annotation(self, reply: bool) -> Any:
        if self.kind is bool:
            return Annotated[bool, Strict()]
        if self.kind is int:
            return integer(self.low, self.high)
        number = Annotated[float, Strict(), AllowInfNan(False), Field(ge=self.low, le=self.high)]
        return number | None if reply else number


def json_type(space: gymnasium.Space[Any], name: str, *, reply: bool = False) -> Any:
    """The annotation of a value of `space`; `name` names its objects in the schema.

    A request lies within a Box's bounds. In a `reply` it need not (a world imagines what it
    imagines), and a number that JSON has not is null.
    """
    if isinstance(space, spaces.Dict):
        fields = {
            key: json_type(child, f"{name}_{i}", reply=reply)
            for i, (key, child) in enumerate(space.spaces.items())
        }
        typed = TypedDict(name, fields)  # type: ignore[misc, operator]
        setattr(typed, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
        return typed
    if isinstance(space, spaces.Tuple):
        members = [
            json_type(child, f"{name}_{i}", reply=reply) for i, child in enumerate(space.spaces)
        ]
        return tuple[tuple(members)]  # type: ignore[misc]
    if isinstance(space, spaces.Text):
        points = sorted(map(ord, space.character_set))
        characters = "".join(f"\\u{point:04x}" for point in points)
        pattern = f"^[{characters}]*$" if points and points[-1] < 0xD800 else None
        return Annotated[
            str,
            Strict(),
            Field(min_length=space.min_length, max_length=space.max_length, pattern=pattern),
        ]
    shape, scalars = _scalars(space, reply)
    return _nested(scalars, shape, reply)


def to_batch(space: gymnasium.Space[Any], values: Sequence[Any]) -> Any:
    """B values that `json_type` accepted, in a vector environment's layout (leaves [B, ...] of the
    space's dtype; Text: B strings).
    """
    if isinstance(space, spaces.Dict):
        return {
            key: to_batch(child, [value[key] for value in values])
            for key, child in space.spaces.items()
        }
    if isinstance(space, spaces.Tuple):
        return tuple(
            to_batch(child, [value[i] for value in values]) for i, child in enumerate(space.spaces)
        )
    if isinstance(space, spaces.Text):
        return tuple(values)
    return np.array(values, space.dtype).reshape(len(values), *(space.shape or ()))


def to_json(value: Any) -> Any:
    """A value, or an array of numbers, as JSON has it; a number that is not finite is null."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind != "f" or np.isfinite(value).all():
            return value.tolist()
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def _scalars(space: gymnasium.Space[Any], reply: bool) -> tuple[tuple[int, ...], list[Scalar]]:
    """Shape, and the numbers of the array in row order."""
    if isinstance(space, spaces.Box):
        dtype = np.dtype(space.dtype)
        if dtype == np.bool_:
            return space.shape, [Scalar(bool)] * int(np.prod(space.shape))
        kind = float if dtype.kind == "f" else int
        if reply:
            return space.shape, [Scalar(kind)] * int(np.prod(space.shape))
        return space.shape, [
            Scalar(kind, *_bounds(kind, dtype, low, high))
            for low, high in zip(space.low.ravel(), space.high.ravel(), strict=True)
        ]
    if isinstance(space, spaces.Discrete):
        return (), [Scalar(int, int(space.start), int(space.start) + int(space.n) - 1)]
    if isinstance(space, spaces.MultiDiscrete):
        starts, counts = np.ravel(space.start).tolist(), np.ravel(space.nvec).tolist()
        return space.shape, [
            Scalar(int, start, start + n - 1) for start, n in zip(starts, counts, strict=True)
        ]
    if isinstance(space, spaces.MultiBinary):
        return space.shape, [Scalar(int, 0, 1)] * int(np.prod(space.shape))
    raise UsageError(
        f"the space {space} ({type(space).__name__}) is not supported; use Box, Discrete,"
        " MultiDiscrete, MultiBinary, Text, Dict and Tuple"
    )


def _bounds(kind: type, dtype: np.dtype[Any], low: Any, high: Any) -> tuple[Any, Any]:
    """A Box's bounds as JSON numbers. A float is told by its shortest digits: 0.7 is within a
    float32 bound of 0.7, which is a little less.
    """
    if kind is int:
        return max(int(low), -EXACT), min(int(high), EXACT)
    largest = np.finfo(
        np.float32 if dtype.itemsize > 4 else dtype
    ).max  # a world computes in float32
    return float(str(max(low, -largest))), float(str(min(high, largest)))


def _nested(scalars: Sequence[Scalar], shape: tuple[int, ...], reply: bool) -> Any:
    """An array of one type where all its items have the same bounds, a tuple of several where they
    differ.
    """
    if not shape:
        return scalars[0].annotation(reply)
    size, step = shape[0], int(np.prod(shape[1:]))
    if len(set(scalars)) <= 1 or size == 0:
        item = _nested(scalars[:step] or [Scalar(int)], shape[1:], reply)
        return Annotated[list[item], Field(min_length=size, max_length=size)]  # type: ignore[valid-type]
    items = [_nested(scalars[i * step : (i + 1) * step], shape[1:], reply) for i in range(size)]
    return tuple[tuple(items)]  # type: ignore[misc]
