"""Images in JSON: base64 of a PNG in place of each frame, for clients over HTTP.

A frame of floats in [0, 1] is a PNG of 256 levels, which is exact for the frames of a world.
"""

from __future__ import annotations

import base64
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mesocosm.data.ingest.frames import LoggedFrame, decode_picture
from mesocosm.data.ingest.video import FrameProblem
from mesocosm.datasets.images import is_image
from mesocosm.datasets.leaf import children
from mesocosm.errors import UsageError
from mesocosm.model.tokenizer.frames import as_bytes, as_dtype
from mesocosm.pictures import png

Space = gymnasium.Space[Any]


def to_strings(space: Space, value: Any) -> Any:
    """A value of a space with each image as base64 of a PNG."""
    if is_image(space):
        return base64.b64encode(png(as_bytes(np.asarray(value)))).decode()
    if isinstance(space, spaces.Dict):
        return {key: to_strings(child, value[key]) for key, child in children(space)}
    if isinstance(space, spaces.Tuple):
        return tuple(to_strings(child, value[key]) for key, child in children(space))
    return value


def from_strings(space: Space, value: Any, name: str = "observation") -> Any:
    """The inverse of `to_strings`.

    Args:
        space: The space.
        value: As `schema.json_type` has validated it.
        name: For messages.

    Raises:
        UsageError: A string is no PNG, or its picture is not of the space.
    """
    if is_image(space):
        return _frame(space, value, name)
    if isinstance(space, spaces.Dict):
        parts = children(space)
        return {key: from_strings(child, value[key], f"{name}.{key}") for key, child in parts}
    if isinstance(space, spaces.Tuple):
        parts = children(space)
        return tuple(from_strings(child, value[key], f"{name}.{key}") for key, child in parts)
    return value


def _frame(space: Space, text: str, name: str) -> Any:
    assert space.shape is not None
    try:
        frame = decode_picture(LoggedFrame(base64.b64decode(text, validate=True)))
    except ValueError as error:  # binascii's, or a character that is not ASCII
        raise UsageError(f"{name} must be base64 of a PNG, got {text[:40]!r} ({error})") from error
    except FrameProblem as problem:
        raise UsageError(f"{name} must be base64 of a PNG: {problem}") from problem
    if frame.shape != space.shape:
        got = f"got {list(frame.shape)}"
        raise UsageError(f"{name} must be a picture of {list(space.shape)}, {got}; resize it")
    return as_dtype(frame, np.dtype(space.dtype))
