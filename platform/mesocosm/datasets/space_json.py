"""Gymnasium spaces <-> JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.leaf import Space
from mesocosm.datasets.spaces import unsupported
from mesocosm.errors import UsageError

Array = NDArray[Any]


def space_to_json(space: Space) -> dict[str, Any]:
    """A space as plain JSON (finite numbers, strings, lists), without its random state."""
    dtype = np.dtype(space.dtype)
    if isinstance(space, spaces.Dict):
        parts = [[key, space_to_json(child)] for key, child in space.spaces.items()]
        return {"kind": "Dict", "spaces": parts}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [space_to_json(child) for child in space.spaces]}
    if isinstance(space, spaces.Box):
        bounds = {"low": _array_to_json(space.low), "high": _array_to_json(space.high)}
        for side in ("bounded_below", "bounded_above"):
            bounded = getattr(space, side)
            if dtype.kind == "i" and not bounded.all():
                bounds[side] = _array_to_json(bounded)
        return {"kind": "Box", "shape": list(space.shape), "dtype": dtype.name, **bounds}
    if isinstance(space, spaces.Discrete):
        n, start = int(space.n), int(space.start)
        return {"kind": "Discrete", "n": n, "start": start, "dtype": dtype.name}
    if isinstance(space, spaces.MultiDiscrete):
        nvec, starts = space.nvec.tolist(), space.start.tolist()
        return {"kind": "MultiDiscrete", "nvec": nvec, "start": starts, "dtype": dtype.name}
    if isinstance(space, spaces.MultiBinary):
        shape = space.n if isinstance(space.n, int) else list(space.shape)
        return {"kind": "MultiBinary", "n": shape}
    if isinstance(space, spaces.Text):
        lengths = {"min_length": space.min_length, "max_length": space.max_length}
        return {"kind": "Text", **lengths, "charset": "".join(sorted(space.character_set))}
    raise unsupported(space, "space")


def space_from_json(data: Mapping[str, Any]) -> Space:
    """The space that `space_to_json` wrote; equal to it."""
    kind = data["kind"]
    if kind == "Dict":  # pairs keep their order; gymnasium sorts a dict
        return spaces.Dict([(key, space_from_json(child)) for key, child in data["spaces"]])
    if kind == "Tuple":
        return spaces.Tuple([space_from_json(child) for child in data["spaces"]])
    if kind == "Box":
        shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
        low, high = (_array_from_json(data[bound], shape, dtype) for bound in ("low", "high"))
        box = spaces.Box(low, high, shape, dtype.type)
        for side in ("bounded_below", "bounded_above"):
            if side in data:
                setattr(box, side, _array_from_json(data[side], shape, np.dtype(bool)))
        return box
    if kind == "MultiDiscrete":
        dtype = np.dtype(data["dtype"])
        nvec, start = np.array(data["nvec"], dtype), np.array(data["start"], dtype)
        return spaces.MultiDiscrete(nvec, dtype=data["dtype"], start=start)
    if kind in ("Discrete", "MultiBinary", "Text"):
        facts = {name: value for name, value in data.items() if name != "kind"}
        space: Space = getattr(spaces, kind)(**facts)
        return space
    raise UsageError(f"space kind {kind!r} is unknown; the file was written by another version")


def _array_to_json(array: Array) -> Any:
    """One value where all are equal, else the flat list; infinities as strings."""
    values = [
        str(v) if isinstance(v, float) and not np.isfinite(v) else v for v in array.ravel().tolist()
    ]
    return values[0] if values and all(v == values[0] for v in values) else values


def _array_from_json(data: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if not isinstance(data, list):
        return np.full(shape, float(data) if isinstance(data, str) else data, dtype)
    return np.array([float(v) if isinstance(v, str) else v for v in data], dtype).reshape(shape)
