"""Gymnasium spaces <-> flat arrays: numbers [B, n] float64 and categories [B, m] int64.

A space is flattened into leaves, in the space's own order. Box leaves become numbers (Box of bool:
categories of 2); Discrete, MultiDiscrete and MultiBinary become categories that count from 0; a
Text of at most L characters becomes L categories, 0 for "ended", c for the c-th character of its
sorted charset. Integers are exact up to 2**53. Nothing is clipped to a space's bounds: values
outside a Box pass both ways (`bounds` checks them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.spec import TextSpan

EXACT = 2**53
"""Integers beyond this have no exact float64."""
FLOAT32 = float(np.nextafter((2 - 2.0**-24) * 2.0**127, 0))
"""The largest number that a world can compute with."""

Array = NDArray[Any]
Space = gymnasium.Space[Any]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Leaf:
    """One Box, Discrete, MultiDiscrete, MultiBinary or Text inside a space, and the columns that
    hold it.
    """

    name: str
    """For messages: `observation.camera.pose`"""
    path: Path
    space: Space
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    numbers: slice
    categories: slice
    cardinalities: tuple[int, ...] = ()
    start: Array | None = None
    """[m] int64: the raw value of category 0"""
    characters: Array | None = None
    """Text: sorted code points, uint32"""

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f"

    def label(self, column: int) -> str:
        """The name of one of its number columns: `observation.pose[2]`."""
        return f"{self.name}[{column}]" if self.shape else self.name


class SpaceCodec:
    """Encodes and decodes batches of values of one space.

    Raises UsageError for a space that cannot be held (images, Graph, Sequence, OneOf, a space
    without parts), naming its key path.
    """

    def __init__(self, space: Space, name: str = "observation"):
        self.space = space
        self.name = name
        self.leaves: list[Leaf] = []
        self.numbers = 0
        """n"""
        self.cardinalities: tuple[int, ...] = ()
        """of each of the m category columns"""
        self._collect(space, (), name)
        if not self.leaves:
            raise UsageError(
                f"{name}: the space {space} has no parts; a world needs at least one number or"
                " category"
            )

    @property
    def categories(self) -> int:
        return len(self.cardinalities)

    @property
    def texts(self) -> list[TextSpan]:
        """The category columns that hold texts."""
        found = []
        for leaf in self.leaves:
            if isinstance(leaf.space, spaces.Text) and leaf.cardinalities:
                found.append(
                    TextSpan(leaf.categories.start, leaf.space.max_length, leaf.space.min_length)
                )
        return found

    def number_names(self) -> list[str]:
        """The key path of each number column, for messages."""
        return [
            leaf.name for leaf in self.leaves for _ in range(leaf.numbers.stop - leaf.numbers.start)
        ]

    def labels(self) -> list[str]:
        """A name for each number column: `observation.pose[2]`."""
        found = []
        for leaf in self.leaves:
            found += [leaf.label(i) for i in range(leaf.numbers.stop - leaf.numbers.start)]
        return found

    def matching(self, name: str) -> list[Leaf]:
        """The leaves at or under the key path `name` ("goal", "camera.pose"); none where the space
        has no such key.
        """
        paths = [".".join(str(key) for key in leaf.path) for leaf in self.leaves]
        return [
            leaf
            for leaf, path in zip(self.leaves, paths, strict=True)
            if path == name or path.startswith(name + ".")
        ]

    def _collect(self, space: Space, path: Path, name: str) -> None:
        if isinstance(space, spaces.Dict):
            for key, child in space.spaces.items():
                if not isinstance(key, str):
                    raise UsageError(
                        f"{name}: the Dict key {key!r} is not a string; use string keys"
                    )
                self._collect(child, (*path, key), f"{name}.{key}")
        elif isinstance(space, spaces.Tuple):
            for i, child in enumerate(space.spaces):
                self._collect(child, (*path, i), f"{name}.{i}")
        else:
            self._append(space, path, name)

    def _append(self, space: Space, path: Path, name: str) -> None:
        numbers, start, characters = 0, None, None
        cardinalities: tuple[int, ...] = ()
        if isinstance(space, spaces.Box):
            box = np.dtype(space.dtype)
            if box == np.uint8 and len(space.shape) >= 3:
                raise UsageError(
                    f"{name}: images ({space}) are not supported yet; give features instead, or"
                    " drop this key with a wrapper"
                )
            if box.kind == "f" and box.itemsize > 8:
                raise UsageError(f"{name}: dtype {box} is wider than float64; use float64")
            size = int(np.prod(space.shape))
            if box == np.bool_:
                cardinalities, start = (2,) * size, np.zeros(size, np.int64)
            else:
                numbers = size
        elif isinstance(space, spaces.Discrete):
            cardinalities, start = (int(space.n),), np.array([int(space.start)], np.int64)
        elif isinstance(space, spaces.MultiDiscrete):
            cardinalities = tuple(int(n) for n in np.ravel(space.nvec))
            start = np.ravel(space.start).astype(np.int64)
        elif isinstance(space, spaces.MultiBinary):
            size = int(np.prod(space.shape))
            cardinalities, start = (2,) * size, np.zeros(size, np.int64)
        elif isinstance(space, spaces.Text):
            characters = np.array(sorted(ord(c) for c in space.character_set), np.uint32)
            cardinalities = (len(characters) + 1,) * space.max_length
        else:
            known = "Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict and Tuple"
            raise UsageError(
                f"{name}: the space {space} ({type(space).__name__}) is not supported; use {known}"
            )
        m = len(self.cardinalities)
        shape = () if isinstance(space, spaces.Text) else tuple(space.shape or ())
        dtype = np.dtype(str) if isinstance(space, spaces.Text) else np.dtype(space.dtype)
        columns = (slice(self.numbers, self.numbers + numbers), slice(m, m + len(cardinalities)))
        self.leaves.append(
            Leaf(name, path, space, shape, dtype, *columns, cardinalities, start, characters)
        )
        self.numbers += numbers
        self.cardinalities += cardinalities

    # -- encode
    # --------------------------------------------------------------------------------------------------

    def encode(self, batch: Any) -> tuple[Array, Array]:
        """Values in the layout of a Gymnasium vector environment (leaves [B, ...]; Text: B strings)
        as (numbers, categories).

        Raises MesocosmError naming the leaf where shape, kind or range is not the space's.
        """
        return self._encode([_descend(batch, leaf) for leaf in self.leaves])

    def encode_list(self, values: Sequence[Any]) -> tuple[Array, Array]:
        """A list of B raw values as (numbers, categories)."""
        return self._encode(
            [[_descend(value, leaf) for value in values] for leaf in self.leaves], len(values)
        )

    def encode_leaves(self, columns: Sequence[Any], size: int) -> tuple[Array, Array]:
        """B values that lie leaf by leaf, in the order of `leaves`, each [B, ...] (Text: B
        strings), as (numbers, categories).
        """
        return self._encode(columns, size)

    def _encode(self, columns: Sequence[Any], size: int | None = None) -> tuple[Array, Array]:
        try:
            size = len(columns[0]) if size is None else size
        except TypeError as error:
            raise MesocosmError(
                f"{self.leaves[0].name}: a batch was expected, got {columns[0]!r}; add a leading"
                " dimension"
            ) from error
        numbers = np.empty((size, self.numbers), np.float64)
        categories = np.empty((size, self.categories), np.int64)
        for leaf, values in zip(self.leaves, columns, strict=True):
            if leaf.characters is not None:
                categories[:, leaf.categories] = _encode_text(leaf, leaf.characters, values, size)
                continue
            try:
                array = np.asarray(values)
            except ValueError as error:
                raise MesocosmError(
                    f"{leaf.name}: values of several shapes; every one must have shape {leaf.shape}"
                ) from error
            if array.shape != (size, *leaf.shape):
                raise MesocosmError(
                    f"{leaf.name}: shape {array.shape[1:]} where the space says {leaf.shape}; make"
                    " the environment and its space agree"
                )
            flat = array.reshape(size, int(np.prod(leaf.shape)))
            if leaf.start is None:
                numbers[:, leaf.numbers] = _checked_numbers(leaf, flat)
            else:
                categories[:, leaf.categories] = _checked_categories(leaf, flat)
        return numbers, categories

    # -- decode
    # --------------------------------------------------------------------------------------------------

    def decode(self, numbers: Array, categories: Array) -> Any:
        """(numbers [B, n], categories [B, m]) as a vector environment's batch:
        `gymnasium.vector.utils.concatenate`'s layout.

        Integers are rounded and saturate at their dtype's range; a text that ends before its
        min_length goes on with the first character.
        """
        return self._build(
            self.space, iter([_decode_leaf(leaf, numbers, categories) for leaf in self.leaves])
        )

    def _build(self, space: Space, leaves: Iterator[Any]) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._build(child, leaves) for key, child in space.spaces.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(self._build(child, leaves) for child in space.spaces)
        return next(leaves)

    def unbatch(self, batch: Any) -> list[Any]:
        """A batch as the list of its raw values."""
        columns = [(leaf, _descend(batch, leaf)) for leaf in self.leaves]
        return [
            self._build(self.space, iter([_item(leaf, column[i]) for leaf, column in columns]))
            for i in range(len(columns[0][1]))
        ]


def check_spaces(observation: Space, action: Space) -> None:
    """Raise UsageError where a world cannot hold one of them."""
    SpaceCodec(observation, "observation")
    SpaceCodec(action, "action")


def _item(leaf: Leaf, value: Any) -> Any:
    return value if isinstance(leaf.space, spaces.Text | spaces.Discrete) else np.array(value)


def _descend(value: Any, leaf: Leaf) -> Any:
    for key in leaf.path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise MesocosmError(
                f"{leaf.name}: the value has no key {key!r}; make the environment and its space"
                " agree"
            ) from error
    return value


def _checked_numbers(leaf: Leaf, flat: Array) -> Array:
    if flat.dtype.kind not in "fiub":
        raise MesocosmError(
            f"{leaf.name}: values of dtype {flat.dtype} where the space says {leaf.dtype}; make the"
            " environment and its space agree"
        )
    if (
        flat.dtype.kind in "iu"
        and flat.dtype.itemsize == 8
        and flat.size
        and (flat.max() > EXACT or flat.min() < -EXACT)
    ):
        worst = flat.max() if flat.max() > EXACT else flat.min()
        raise MesocosmError(
            f"{leaf.name}: the integer {worst} is beyond 2**53 and has no exact float64; rescale"
            " it, or split it with a wrapper"
        )
    found = first_beyond_float32(flat)
    if found is not None:
        row, column = found
        raise MesocosmError(
            f"{leaf.label(column)} holds {flat[row, column]:g}, and a world computes in float32;"
            " rescale it"
        )
    return flat


def first_beyond_float32(values: Array) -> tuple[int, int] | None:
    """(row, column) of the first finite number of `values` [B, n] that float32 cannot hold; None
    where there is none.
    """
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4 or not values.size:
        return None
    if max(values.max(), -values.min()) <= FLOAT32:  # false where a number is NaN
        return None
    found = np.argwhere(np.isfinite(values) & (np.abs(values) > FLOAT32))
    return (int(found[0][0]), int(found[0][1])) if len(found) else None


def _checked_categories(leaf: Leaf, flat: Array) -> Array:
    assert leaf.start is not None
    if flat.dtype.kind not in "iub":
        raise MesocosmError(
            f"{leaf.name}: values of dtype {flat.dtype} where the space {leaf.space} holds"
            " integers; make the environment and its space agree"
        )
    categories = flat.astype(np.int64) - leaf.start
    bad = (categories < 0) | (categories >= np.array(leaf.cardinalities, np.int64))
    if bad.any():
        raise MesocosmError(
            f"{leaf.name}: the value {flat[bad][0]} is outside the space {leaf.space}; make the"
            " environment and its space agree"
        )
    return categories


def _encode_text(leaf: Leaf, characters: Array, values: Any, size: int) -> Array:
    assert isinstance(leaf.space, spaces.Text)
    if (
        isinstance(values, str)
        or len(values) != size
        or not all(isinstance(v, str) for v in values)
    ):
        raise MesocosmError(
            f"{leaf.name}: {size} strings were expected, got {values!r}; make the environment and"
            " its space agree"
        )
    width = leaf.space.max_length
    lengths = np.array([len(v) for v in values], np.int64).reshape(size)
    if size and (lengths.max() > width or lengths.min() < leaf.space.min_length):
        worst = next(v for v in values if not leaf.space.min_length <= len(v) <= width)
        raise MesocosmError(
            f"{leaf.name}: the text {worst!r} has {len(worst)} characters where the space says"
            f" {leaf.space.min_length} to {width}"
        )
    codes = np.frombuffer(
        "".join(v.ljust(width, "\0") for v in values).encode("utf-32-le", "surrogatepass"), "<u4"
    ).reshape(size, width)
    there = np.arange(width) < lengths[:, None]
    found = np.searchsorted(characters, codes).clip(max=max(len(characters) - 1, 0))
    unknown = there & (characters[found] != codes) if len(characters) else there
    if unknown.any():
        raise MesocosmError(
            f"{leaf.name}: the character {chr(int(codes[unknown][0]))!r} is not in the charset of"
            f" {leaf.space}"
        )
    return np.where(there, found + 1, 0)


def _decode_leaf(leaf: Leaf, numbers: Array, categories: Array) -> Any:
    size = len(numbers)
    if leaf.characters is not None:
        return _decode_text(leaf, leaf.characters, categories[:, leaf.categories])
    if leaf.start is None:
        values = numbers[:, leaf.numbers]
        if not leaf.is_float:
            info = np.iinfo(leaf.dtype)
            top = (
                float(info.max)
                if float(info.max) <= info.max
                else np.nextafter(float(info.max), 0.0)
            )
            values = np.clip(np.rint(values), float(info.min), top)
    else:
        values = categories[:, leaf.categories] + leaf.start
    return values.astype(leaf.dtype).reshape(size, *leaf.shape)


def _decode_text(leaf: Leaf, characters: Array, codes: Array) -> tuple[str, ...]:
    assert isinstance(leaf.space, spaces.Text)
    width = leaf.space.max_length
    if width == 0 or not len(characters):
        return ("",) * len(codes)
    ended = codes == 0
    ended[:, : leaf.space.min_length] = False
    lengths = np.where(ended.any(1), ended.argmax(1), width)
    points = np.concatenate([characters[:1], characters])[np.clip(codes, 0, len(characters))]
    text = points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return tuple(text[i * width : i * width + int(length)] for i, length in enumerate(lengths))


# -- spaces as JSON
# ----------------------------------------------------------------------------------------------


def space_to_json(space: Space) -> dict[str, Any]:
    """A space as plain JSON (finite numbers, strings, lists), without its random state. Raises
    UsageError on an unsupported space.
    """
    if isinstance(space, spaces.Dict):
        return {
            "kind": "Dict",
            "spaces": [[key, space_to_json(child)] for key, child in space.spaces.items()],
        }
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "spaces": [space_to_json(child) for child in space.spaces]}
    if isinstance(space, spaces.Box):
        bounds = {"low": _array_to_json(space.low), "high": _array_to_json(space.high)}
        dtype = np.dtype(space.dtype)
        for side in ("below", "above"):
            bounded = getattr(space, f"bounded_{side}")
            if dtype.kind == "i" and not bounded.all():
                bounds[f"bounded_{side}"] = _array_to_json(bounded)
        return {"kind": "Box", "shape": list(space.shape), "dtype": dtype.name, **bounds}
    if isinstance(space, spaces.Discrete):
        return {
            "kind": "Discrete",
            "n": int(space.n),
            "start": int(space.start),
            "dtype": np.dtype(space.dtype).name,
        }
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "kind": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": np.dtype(space.dtype).name,
        }
    if isinstance(space, spaces.MultiBinary):
        return {
            "kind": "MultiBinary",
            "n": space.n if isinstance(space.n, int) else list(space.shape),
        }
    if isinstance(space, spaces.Text):
        return {
            "kind": "Text",
            "min_length": space.min_length,
            "max_length": space.max_length,
            "charset": "".join(sorted(space.character_set)),
        }
    raise UsageError(
        f"the space {space} ({type(space).__name__}) is not supported; use Box, Discrete,"
        " MultiDiscrete, MultiBinary, Text, Dict and Tuple"
    )


def space_from_json(data: Mapping[str, Any]) -> Space:
    """The space that `space_to_json` wrote; equal to it."""
    kind = data["kind"]
    if kind == "Dict":
        return spaces.Dict(
            [(key, space_from_json(child)) for key, child in data["spaces"]]
        )  # pairs keep their order; a dict would be sorted
    if kind == "Tuple":
        return spaces.Tuple([space_from_json(child) for child in data["spaces"]])
    if kind == "Box":
        shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
        low, high = (_array_from_json(data[bound], shape, dtype) for bound in ("low", "high"))
        box = spaces.Box(low, high, shape, dtype.type)
        for side in ("below", "above"):
            if f"bounded_{side}" in data:
                setattr(
                    box,
                    f"bounded_{side}",
                    _array_from_json(data[f"bounded_{side}"], shape, np.dtype(bool)),
                )
        return box
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"], dtype=data["dtype"])
    if kind == "MultiDiscrete":
        dtype = np.dtype(data["dtype"])
        return spaces.MultiDiscrete(
            np.array(data["nvec"], dtype), dtype=data["dtype"], start=np.array(data["start"], dtype)
        )
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"])
    if kind == "Text":
        return spaces.Text(
            data["max_length"], min_length=data["min_length"], charset=data["charset"]
        )
    raise UsageError(f"space kind {kind!r} is unknown; the file was written by another version")


def _array_to_json(array: Array) -> Any:
    """One value where all are equal, else the flat list; infinities as strings, for JSON has none."""
    values = [
        str(v) if isinstance(v, float) and not np.isfinite(v) else v
        for v in np.ravel(array).tolist()
    ]
    return values[0] if values and all(v == values[0] for v in values) else values


def _array_from_json(data: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if not isinstance(data, list):
        return np.full(shape, float(data) if isinstance(data, str) else data, dtype)
    return np.array([float(v) if isinstance(v, str) else v for v in data], dtype).reshape(shape)
