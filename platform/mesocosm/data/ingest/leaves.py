"""Locations of the arrays of a space in the columns of a table (`ColumnLeaf`).

    observation: list<float>[4]                        one leaf of shape (4,)
    observation.0 ... observation.3: float             the same leaf, flattened
    observation: struct<pose: list<float>[2], n: int>  two leaves, at ("pose",) and ("n",)
    observation.pose: list<float>[2], observation.n    the same two leaves
    observation: binary                                one leaf of frames (`frames`)

Keys 0..n-1 are a vector if they are flattened columns of numbers (or of booleans), else a Tuple.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.types as is_
from gymnasium import spaces

from mesocosm.data.ingest.frames import FrameDecoder, is_picture, logged_frames
from mesocosm.data.ingest.video import FrameProblem
from mesocosm.datasets.images import check_layout, is_image
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError

Space = gymnasium.Space[Any]
SEPARATOR = "\x1f"
"""Separates the keys in the name of a flattened column, since a key may have dots."""


@dataclass(frozen=True)
class ColumnLeaf:
    """One array of a space, in one column or in the flattened columns of a vector."""

    name: str
    """The name in messages: `observation.pose`."""
    path: tuple[str, ...]
    columns: tuple[str, ...]
    """One flattened column, or one per element of a vector."""
    kind: str
    """number, bool, text, image (pictures that are decoded), or flag: a number or a bool."""
    shape: tuple[int, ...] = ()
    space: Space | None = None
    """The environment's space, or None if the space is inferred from the values."""
    pixels: bool = False
    """It is an image [height, width, channels], as pictures or as numbers."""

    @staticmethod
    def scalar(name: str, kind: str) -> ColumnLeaf:
        return ColumnLeaf(name, (), (name,), kind)

    @property
    def flattened(self) -> bool:
        """True if each element has a column."""
        return shown(self.columns[0]) != self.name


def innermost(type: pa.DataType) -> tuple[pa.DataType, int]:
    """The type inside nested lists, and the depth of the nesting."""
    depth = 0
    while is_.is_list(type):
        type, depth = type.value_type, depth + 1
    return type, depth


def kind_of(type: pa.DataType) -> str | None:
    """The kind of a type: number, bool, text or image. None for a type without a space. Nulls count
    as numbers.
    """
    inner, _ = innermost(type)
    if is_picture(inner):
        return "image"
    if is_.is_floating(inner) or is_.is_integer(inner) or is_.is_null(inner):
        return "number"
    if is_.is_boolean(inner):
        return "bool"
    return "text" if is_.is_string(inner) or is_.is_large_string(inner) else None


def flatten(table: pa.Table) -> pa.Table:
    """Replace each struct by one column per field, at any depth. Pictures stay as they are."""
    while any(_nested(field.type) for field in table.schema):
        columns: dict[str, pa.ChunkedArray] = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            if _nested(column.type):
                names = [f"{name}{SEPARATOR}{field.name}" for field in column.type]
                # Unlike pc.struct_field, this keeps the struct's own nulls.
                columns |= zip(names, column.flatten(), strict=True)
            else:
                columns[name] = column
        table = pa.table(columns)
    return table


def flat_types(types: Iterable[tuple[str, pa.DataType]]) -> dict[str, pa.DataType]:
    """The columns of `flatten`, by name, of columns (name, type)."""
    flat: dict[str, pa.DataType] = {}
    for name, type in types:
        inner = [(f"{name}{SEPARATOR}{f.name}", f.type) for f in type] if _nested(type) else []
        flat |= flat_types(inner) if _nested(type) else {name: type}
    return flat


def _nested(type: pa.DataType) -> bool:
    return bool(is_.is_struct(type)) and not is_picture(type)


def shown(name: str) -> str:
    """A flattened column's name, for messages: `observation.pose`."""
    return name.replace(SEPARATOR, ".")


def columns_of(part: str, names: Iterable[str]) -> list[str]:
    """The columns of `part`: itself, or `part.KEY`."""
    return [name for name in names if name == part or name.startswith(part + SEPARATOR)]


def find_leaves(
    head: pa.Table, top: frozenset[str], spaces: tuple[Space, Space] | None
) -> tuple[dict[str, list[ColumnLeaf]], list[str]]:
    """({observation, action, next_observation: leaves}, columns without a place).

    Args:
        head: The first rows, flattened. `top` are its columns before that.
    """
    leaves: dict[str, list[ColumnLeaf]] = {}
    unused: list[str] = []
    for part in ("observation", "action", "next_observation"):
        names = columns_of(part, head.column_names)
        leaves[part] = []
        if names and spaces is None:
            leaves[part] = list(_infer(head, top, part, ()))
        elif names and spaces is not None:
            leaves[part] = _match(head, top, spaces[part == "action"], part)
        used = {name for leaf in leaves[part] for name in leaf.columns}
        unused += [name for name in names if name not in used]
    seen, following = (
        [(leaf.path, leaf.kind, leaf.shape) for leaf in leaves[part]]
        for part in ("observation", "next_observation")
    )
    if following and seen != following:
        raise UsageError(
            f"next_observation has the parts {following} and observation {seen}; make them equal,"
            " or leave next_observation out"
        )
    return leaves, unused


def _infer(
    head: pa.Table, top: frozenset[str], name: str, path: tuple[str, ...]
) -> Iterator[ColumnLeaf]:
    """The leaves below `name`, as the table has them."""
    if name in head.column_names:
        type = head.schema.field(name).type
        kind, depth = kind_of(type), innermost(type)[1]
        if kind is None or (kind in ("text", "image") and depth):
            raise UsageError(
                f"column {shown(name)!r} has the type {type}, which no space holds; give numbers,"
                " booleans or lists of them, strings, pictures, or structs"
            )
        if kind == "image":
            shape, pixels = _picture_shape(head, name), True
        else:
            shape = _shape(head, name) if depth else ()
            pixels = depth == 3 and _is_pixels(innermost(type)[0], shape, shown(name))
        if pixels and name.split(SEPARATOR)[0] == "action":
            raise UsageError(f"{shown(name)} must not be an image; act in numbers")
        yield ColumnLeaf(shown(name), path, (name,), kind, shape, pixels=pixels)
        return
    below = columns_of(name, head.column_names)
    keys = dict.fromkeys(column[len(name) + 1 :].split(SEPARATOR)[0] for column in below)
    columns = [f"{name}{SEPARATOR}{i}" for i in range(len(keys))]
    if set(columns) == set(below) and set(columns) <= top:
        types = [head.schema.field(column).type for column in columns]
        kinds = {kind_of(type) for type in types}
        if kinds in ({"number"}, {"bool"}) and not any(innermost(type)[1] for type in types):
            yield ColumnLeaf(shown(name), path, tuple(columns), str(kinds.pop()), (len(columns),))
            return
    for key in sorted(keys, key=int) if is_numbered(keys) else sorted(keys):
        yield from _infer(head, top, name + SEPARATOR + key, (*path, key))


def _shape(head: pa.Table, name: str) -> tuple[int, ...]:
    """The shape of the first list of a column that is not empty."""
    for row in head[name].to_pylist():
        shape: list[int] = []
        while isinstance(row, list):
            shape.append(len(row))
            row = row[0] if row else None
        if shape:
            return tuple(shape)
    raise UsageError(
        f"column {shown(name)!r} holds no list in its first {head.num_rows} rows; give lists of"
        " one length"
    )


def _is_pixels(type: pa.DataType, shape: tuple[int, ...], name: str) -> bool:
    """True if nested lists of this shape are an image. Raises UsageError for another layout."""
    if not is_.is_uint8(type):
        return False
    box = spaces.Box(0, 255, shape, np.uint8)
    check_layout(box, name)
    return is_image(box)


def _picture_shape(head: pa.Table, name: str) -> tuple[int, ...]:
    """[height, width, channels] of the first picture of a column that can be read."""
    frames, missing = logged_frames(head[name].combine_chunks())
    problem = "it has none"
    with closing(FrameDecoder()) as decoder:
        for frame in frames[~missing].tolist():
            if frame.raw:
                problem = "its space is unknown"
                break
            try:
                return decoder.decode(frame).shape
            except FrameProblem as error:
                problem = problem if problem != "it has none" else str(error)
    raise UsageError(
        f"column {shown(name)!r} holds no picture that can be read in its first {head.num_rows}"
        f" rows: {problem}; give PNG or JPEG, or video"
    )


def _match(head: pa.Table, top: frozenset[str], space: Space, part: str) -> list[ColumnLeaf]:
    """The leaves of an environment's space, with the columns that hold them."""
    leaves = []
    for leaf in SpaceCodec(space, part).leaves:
        path = tuple(map(str, leaf.path))
        name = SEPARATOR.join((part, *path))
        below = columns_of(name, head.column_names)
        columns = [f"{name}{SEPARATOR}{i}" for i in range(math.prod(leaf.shape))]
        if name in below:
            columns = [name]
        elif len(leaf.shape) != 1 or not set(columns) == set(below) <= top:
            names = ", ".join(map(shown, below or columns_of(part, head.column_names)))
            raise UsageError(
                f"the environment's {leaf.name} is {leaf.space} and no column of the table fits it"
                f" (it has {names}); give one column, or one per element, or leave --env out"
            )
        kinds = {kind_of(head.schema.field(column).type) for column in columns}
        text, pixels = isinstance(leaf.space, spaces.Text), leaf.image is not None
        fits = {"text"} if text else {"number", "bool"}
        if pixels:
            fits = {"number"} if kinds == {"number"} else {"image"}
        if not kinds <= fits:
            type = head.schema.field(columns[0]).type
            raise UsageError(
                f"column {shown(columns[0])!r} must fit the environment's {leaf.name}, which is"
                f" {leaf.space}, got {type}; convert it, or leave --env out"
            )
        kind = str(kinds.pop()) if len(kinds) == 1 else "number"
        leaves.append(
            ColumnLeaf(leaf.name, path, tuple(columns), kind, leaf.shape, leaf.space, pixels)
        )
    return leaves


def find_options(head: pa.Table) -> list[ColumnLeaf]:
    leaves = []
    for name in sorted(columns_of("task", head.column_names)):
        key, type = name.removeprefix(f"task{SEPARATOR}"), head.schema.field(name).type
        kind = kind_of(type)
        if name == "task" or SEPARATOR in key or kind in (None, "image") or innermost(type)[1]:
            raise UsageError(
                f"column {shown(name)!r} must hold one number, boolean or string per reset option"
                f" (a struct, or columns task.NAME), got {type}"
            )
        leaves.append(ColumnLeaf(shown(name), (key,), (name,), kind))
    return leaves


def build_space(
    leaves: Sequence[ColumnLeaf], inferred: Mapping[str, Space], depth: int = 0
) -> Space:
    """Nest the spaces of the leaves, by name, as their paths say."""
    if len(leaves) == 1 and len(leaves[0].path) == depth:
        return inferred[leaves[0].name]
    keys = dict.fromkeys(leaf.path[depth] for leaf in leaves)
    children = {
        key: build_space([leaf for leaf in leaves if leaf.path[depth] == key], inferred, depth + 1)
        for key in keys
    }
    if is_numbered(children):
        return spaces.Tuple([children[str(i)] for i in range(len(children))])
    return spaces.Dict(list(children.items()))


def is_numbered(keys: Mapping[str, Any]) -> bool:
    """True if the keys are 0, 1, ..., n-1."""
    return set(keys) == set(map(str, range(len(keys))))
