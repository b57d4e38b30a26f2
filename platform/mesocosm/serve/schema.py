"""JSON types of Gymnasium spaces, exact to shapes, bounds and characters.

pydantic validates requests with them, and OpenAPI publishes them. A Dict is an object, a Tuple and
every array a (nested) array, a Text a string, a bool true or false, a member of Discrete,
MultiDiscrete and MultiBinary an integer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Field, Strict
from typing_extensions import TypedDict

from mesocosm.datasets.spaces import EXACT
from mesocosm.errors import UsageError


def integer(low: float | None, high: float | None) -> Any:
    """The annotation of an integer as JSON Schema defines it: 2.0 is one; true and "2" are not."""
    # The bounds come before the validator, or the schema would lose them.
    return Annotated[int, Strict(), Field(ge=low, le=high), BeforeValidator(_whole)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def json_type(space: gymnasium.Space[Any], name: str, *, reply: bool = False) -> Any:
    """The annotation of a value of `space`; `name` names its objects in the schema.

    In a `reply` a world's numbers may leave a Box's bounds, and a number that is not finite is
    null.
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
        members = (json_type(s, f"{name}_{i}", reply=reply) for i, s in enumerate(space.spaces))
        return tuple[tuple(members)]  # type: ignore[misc]
    if isinstance(space, spaces.Text):
        points = sorted(map(ord, space.character_set))
        characters = "".join(f"\\u{point:04x}" for point in points)
        pattern = f"^[{characters}]*$" if points and points[-1] < 0xD800 else None
        lengths: Any = {"min_length": space.min_length, "max_length": space.max_length}
        return Annotated[str, Strict(), Field(pattern=pattern, **lengths)]
    return _array_type(_number_types(space, reply).tolist())


def _number_types(space: gymnasium.Space[Any], reply: bool) -> NDArray[Any]:
    """The annotation of each number of an array space, in the space's shape."""
    low: Any
    high: Any
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
    elif isinstance(space, spaces.Discrete):
        low = np.array(space.start)
        high = low + space.n - 1
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = space.start, space.start + space.nvec - 1
    elif isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64)
    else:
        raise UsageError(
            f"the space {space} ({type(space).__name__}) is not supported; use Box, Discrete,"
            " MultiDiscrete, MultiBinary, Text, Dict and Tuple"
        )
    dtype = np.dtype(space.dtype)
    # A world computes in float32.
    largest = np.finfo(np.float32 if dtype.itemsize > 4 else dtype).max if dtype.kind == "f" else 0
    types = np.empty(low.shape, object)
    for i in np.ndindex(low.shape):
        if dtype.kind == "f" and reply:
            types[i] = _float_type(None, None) | None
        elif dtype.kind == "f":
            # The shortest digits: 0.7 is within a float32 bound of 0.7, which is a little less.
            bounds = str(max(low[i], -largest)), str(min(high[i], largest))
            types[i] = _float_type(*map(float, bounds))
        elif dtype.kind == "b":
            types[i] = Annotated[bool, Strict()]
        elif isinstance(space, spaces.Box) and reply:
            types[i] = _integer_type(None, None)
        else:
            types[i] = _integer_type(max(int(low[i]), -EXACT), min(int(high[i]), EXACT))
    return types


@lru_cache(1024)
def _float_type(low: float | None, high: float | None) -> Any:
    return Annotated[float, Strict(), AllowInfNan(False), Field(ge=low, le=high)]


_integer_type = lru_cache(1024)(integer)


def _array_type(types: Any) -> Any:
    """A list of one type where all items have the same type, otherwise a tuple of several."""
    if not isinstance(types, list):
        return types
    # Annotations of lists are never equal: pydantic's fields have no equality.
    if any(part != types[0] for part in types):
        return tuple[tuple(map(_array_type, types))]  # type: ignore[misc]
    item = _array_type(types[0]) if types else int
    return Annotated[list[item], Field(min_length=len(types), max_length=len(types))]  # type: ignore[valid-type]
