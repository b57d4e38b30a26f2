"""JSON types of Gymnasium spaces, exact to shapes, bounds and characters.

pydantic validates requests with them, and OpenAPI publishes them. A Dict is an object, a Tuple and
every array a (nested) array, a Text a string, a bool true or false, a category an integer, an image
base64 of a PNG (`json_pictures`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from typing_extensions import TypedDict

from mesocosm.datasets.images import is_image
from mesocosm.datasets.leaf import EXACT, children


class Model(BaseModel):
    """The base of requests and replies: no other fields, and attribute docstrings in OpenAPI."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@lru_cache(1024)
def integer(low: float | None, high: float | None) -> Any:
    """The annotation of an integer as JSON Schema defines it: 2.0 is one; true and "2" are not."""
    # The bounds come before the validator, or the schema would lose them.
    return Annotated[int, Strict(), Field(ge=low, le=high), BeforeValidator(_whole)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


@lru_cache(1024)
def _float(low: float | None, high: float | None) -> Any:
    return Annotated[float, Strict(), AllowInfNan(False), Field(ge=low, le=high)]


def json_type(space: gymnasium.Space[Any], name: str, *, reply: bool = False) -> Any:
    """The annotation of a value of `space`; `name` names its objects in the schema.

    In a `reply` a world's numbers may leave a Box's bounds, and a number that is not finite is
    null.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = enumerate(children(space))
        types = {key: json_type(part, f"{name}_{i}", reply=reply) for i, (key, part) in parts}
        if isinstance(space, spaces.Tuple):
            return tuple[tuple(types.values())]  # type: ignore[misc]
        typed = TypedDict(name, types)  # type: ignore[misc, operator]
        setattr(typed, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
        return typed
    if isinstance(space, spaces.Text):
        points = sorted(map(ord, space.character_set))
        characters = "".join(f"\\u{point:04x}" for point in points)
        pattern = f"^[{characters}]*$" if points and points[-1] < 0xD800 else None
        lengths: Any = {"min_length": space.min_length, "max_length": space.max_length}
        return Annotated[str, Strict(), Field(pattern=pattern, **lengths)]
    if is_image(space):
        return _picture(space)
    return _array(_numbers(space, reply).tolist())


def _picture(space: Any) -> Any:
    """The annotation of an image, whose content JSON Schema names and does not check."""
    height, width, channels = space.shape
    kind = "grey" if channels == 1 else "RGB"
    about: dict[str, Any] = {"contentEncoding": "base64", "contentMediaType": "image/png"}
    text = f"a PNG of {width} x {height} pixels, {kind}"
    return Annotated[str, Strict(), Field(description=text, json_schema_extra=about)]


def _numbers(space: Any, reply: bool) -> NDArray[Any]:
    """The annotation of each number of an array space, in the space's shape."""
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
    elif isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape, np.int64), np.ones(space.shape, np.int64)
    else:
        count = space.n if isinstance(space, spaces.Discrete) else space.nvec
        low, high = np.asarray(space.start), np.asarray(space.start + count - 1)
    dtype, largest = np.dtype(space.dtype), EXACT
    number: type[int] | type[float] = int
    if dtype.kind == "b":
        return np.full(low.shape, Annotated[bool, Strict()], object)
    if dtype.kind == "f":  # a world computes in float32
        number, largest = float, np.finfo(np.float32 if dtype.itemsize > 4 else dtype).max
    types = np.empty(low.shape, object)
    for i in np.ndindex(low.shape):
        bounds: Any = None, None
        if not reply or not isinstance(space, spaces.Box):
            # The shortest digits: 0.7 is within a float32 bound of 0.7, which is a little less.
            bounds = number(str(max(low[i], -largest))), number(str(min(high[i], largest)))
        if dtype.kind == "f":
            types[i] = _float(*bounds) | None if reply else _float(*bounds)
        else:
            types[i] = integer(*bounds)
    return types


def _array(types: Any) -> Any:
    """A list of one type where all items have the same type, otherwise a tuple of several."""
    if not isinstance(types, list):
        return types
    # Annotations of lists are never equal: pydantic's fields have no equality.
    if any(part != types[0] for part in types):
        return tuple[tuple(map(_array, types))]  # type: ignore[misc]
    item = _array(types[0]) if types else int
    return Annotated[list[item], Field(min_length=len(types), max_length=len(types))]  # type: ignore[valid-type]
