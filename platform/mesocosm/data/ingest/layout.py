"""Where a table keeps the values of a space: as a list column, a struct, or flattened columns
`observation.0`, `observation.pose.x`.

    observation: list<float>[4]                        one leaf of shape (4,)
    observation.0 ... observation.3: float             the same leaf
    observation: struct<pose: list<float>[2], n: int>  two leaves, at ("pose",) and ("n",)
    observation.pose: list<float>[2], observation.n    the same two leaves

Keys 0..n-1 are a vector where they are flattened columns of numbers (or of booleans), and otherwise
a Tuple.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as is_
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.errors import UsageError

Array = NDArray[Any]
Space = gymnasium.Space[Any]
Kind = str
"""number | bool | text"""


class RowError(UsageError):
    """What is wrong with the table as a whole, seen at a row of the batch."""

    def __init__(self, row: int, text: str):
        super().__init__(text)
        self.row, self.text = row, text

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError, (self.row, self.text)


@dataclass(frozen=True)
class Column:
    """One value a row: a column of the table, or a field of a struct in one."""

    name: str
    fields: tuple[str, ...]
    type: pa.DataType

    @property
    def label(self) -> str:
        return ".".join((self.name, *self.fields))


Node = Column | dict[str, "Node"]


@dataclass(frozen=True)
class Leaf:
    """One array a row."""

    name: str
    """For messages: `observation.pose`"""
    path: tuple[str, ...]
    columns: tuple[Column, ...]
    """One; or as many as `shape` says, where a vector is flattened"""
    kind: Kind
    shape: tuple[int, ...]
    space: Space | None
    """The environment's; None where it is to be inferred"""

    @property
    def flattened(self) -> bool:
        return len(self.columns) > 1 or (self.columns[0].label != self.name)


def explore(schema: pa.Schema, part: str) -> Node | None:
    """What the table has of `part` ("observation"); None where it has nothing. Raises UsageError
    where it has it twice.
    """
    names = [name for name in schema.names if name == part or name.startswith(part + ".")]
    if not names:
        return None
    if part in names:
        if len(names) > 1:
            raise UsageError(
                f"the table has the column {part!r} and the flattened column"
                f" {names[names.index(part) - 1]!r}, so {part} twice; drop one of them"
            )
        return _expand(Column(part, (), schema.field(part).type))
    root: dict[str, Node] = {}
    for name in names:
        *above, last = name[len(part) + 1 :].split(".")
        at = root
        for key in above:
            child = at.setdefault(key, {})
            if not isinstance(child, dict):
                raise UsageError(
                    f"the table has the column {child.name!r} and below it {name!r}; drop one of"
                    " them"
                )
            at = child
        if last in at:
            raise UsageError(
                f"the table has the column {name!r} and others below it; drop one of them"
            )
        at[last] = _expand(Column(name, (), schema.field(name).type))
    return root


def _expand(column: Column) -> Node:
    if not is_.is_struct(column.type):
        return column
    fields = [column.type.field(i) for i in range(column.type.num_fields)]
    return {
        field.name: _expand(Column(column.name, (*column.fields, field.name), field.type))
        for field in fields
    }


def innermost(type: pa.DataType) -> tuple[pa.DataType, int]:
    """The type inside lists, and how many lists deep it is."""
    depth = 0
    while is_.is_list(type) or is_.is_large_list(type) or is_.is_fixed_size_list(type):
        type, depth = type.value_type, depth + 1
    return type, depth


def kind_of(type: pa.DataType) -> Kind | None:
    """None of a type that no space holds; "number" of null, which says nothing yet."""
    inner, _ = innermost(type)
    if is_.is_dictionary(inner):
        inner = inner.value_type
    if is_.is_floating(inner) or is_.is_integer(inner) or is_.is_null(inner):
        return "number"
    if is_.is_boolean(inner):
        return "bool"
    return "text" if is_.is_string(inner) or is_.is_large_string(inner) else None


def is_vector(node: Mapping[str, Node]) -> bool:
    """Flattened columns 0..n-1 of numbers alone, or of booleans alone."""
    if sorted(node) != sorted(str(i) for i in range(len(node))):
        return False
    columns = list(node.values())
    if not all(
        isinstance(c, Column) and not c.fields and innermost(c.type)[1] == 0 for c in columns
    ):
        return False
    return {kind_of(c.type) for c in columns if isinstance(c, Column)} in ({"number"}, {"bool"})


def is_tuple(node: Mapping[str, Node]) -> bool:
    return sorted(node) == sorted(str(i) for i in range(len(node)))


# -- without an environment: leaves as the table has them
# --------------------------------------------------------------


def infer(node: Node, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Leaf]:
    """The leaves of `part`. `shapes`: of list columns, by label, from the first row. Raises
    UsageError on a type that no space holds.
    """
    return list(_infer(node, part, (), shapes))


def _infer(
    node: Node, name: str, path: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Leaf]:
    if isinstance(node, dict):
        if is_vector(node):
            columns = tuple(node[str(i)] for i in range(len(node)))
            kind = kind_of(columns[0].type)  # type: ignore[union-attr]
            assert kind is not None
            yield Leaf(name, path, columns, kind, (len(columns),), None)  # type: ignore[arg-type]
            return
        keys = sorted(node, key=int) if is_tuple(node) else sorted(node)
        for key in keys:
            yield from _infer(node[key], f"{name}.{key}", (*path, key), shapes)
        return
    kind = kind_of(node.type)
    if kind is None:
        raise UsageError(
            f"column {node.label!r} has the type {node.type}, which no space holds; give numbers,"
            " booleans, strings, or lists and structs of them"
        )
    if kind == "text" and innermost(node.type)[1]:
        raise UsageError(
            f"column {node.label!r} is a list of strings, which no space holds; give one string, or"
            " a struct of them"
        )
    yield Leaf(name, path, (node,), kind, shapes.get(node.label, ()), None)


def build(leaves: Sequence[Leaf], found: Mapping[str, Space], depth: int = 0) -> Space:
    """The space whose leaves are `found`, by name."""
    if len(leaves) == 1 and len(leaves[0].path) == depth:
        return found[leaves[0].name]
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.path[depth], []).append(leaf)
    children = {key: build(group, found, depth + 1) for key, group in groups.items()}
    if sorted(children) == sorted(str(i) for i in range(len(children))):
        return spaces.Tuple([children[str(i)] for i in range(len(children))])
    return spaces.Dict(list(children.items()))


# -- with an environment: its leaves, found in the table
# ---------------------------------------------------------------


def match(space: Space, node: Node, part: str) -> tuple[list[Leaf], list[str]]:
    """The leaves of an environment's space, and the columns that it has no place for. Raises
    UsageError where a leaf has no column of its kind.
    """
    unused: list[str] = []
    leaves = [
        _matched(leaf.space, leaf.name, tuple(map(str, leaf.path)), leaf.shape, node, part, unused)
        for leaf in SpaceCodec(space, part).leaves
    ]
    taken = {column.label for leaf in leaves for column in leaf.columns}
    return leaves, [column.label for column in columns_of(node) if column.label not in taken]


def _matched(
    space: Space,
    name: str,
    path: tuple[str, ...],
    shape: tuple[int, ...],
    node: Node,
    part: str,
    unused: list[str],
) -> Leaf:
    at: Node | None = node
    for key in path:
        at = at.get(key) if isinstance(at, dict) else None
    if at is None:
        have = ", ".join(column.label for column in columns_of(node))
        raise UsageError(
            f"the environment's space has {name} ({space}) and the table has no such column (it has"
            f" {have}); add it, or leave --env out"
        )
    if isinstance(at, dict):
        size = int(np.prod(shape))
        if not (is_vector(at) and len(shape) == 1 and len(at) == size):
            have = ", ".join(column.label for column in columns_of(at))
            raise UsageError(
                f"the environment's {name} is {space} and the table has {have}; give one column, or"
                f" {size} flattened ones, or leave --env out"
            )
        columns = tuple(at[str(i)] for i in range(size))
    else:
        columns = (at,)
    kinds = {kind_of(column.type) for column in columns if isinstance(column, Column)}
    wanted = {"text"} if isinstance(space, spaces.Text) else {"number", "bool"}
    if not kinds <= wanted:
        column = columns[0]
        assert isinstance(column, Column)
        raise UsageError(
            f"column {column.label!r} has the type {column.type} where the environment's {name} is"
            f" {space}; convert it, or leave --env out"
        )
    kind = "text" if wanted == {"text"} else "bool" if kinds == {"bool"} else "number"
    return Leaf(name, path, columns, kind, shape, space)  # type: ignore[arg-type]


def columns_of(node: Node) -> Iterator[Column]:
    if isinstance(node, Column):
        yield node
        return
    for child in node.values():
        yield from columns_of(child)


# -- values
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """A leaf's values of B rows. Where `missing` or `misshapen` they are zeros (or "")."""

    array: Array
    """[B, *shape]; of texts [B] objects"""
    missing: Array
    """[B] bool: null, whole or in part"""
    misshapen: Array
    """[B] bool: a list of another length"""


def take(table: pa.Table, leaf: Leaf) -> Values:
    """A leaf's values. A column that the table has not (a JSON batch without it) is missing in
    every row.
    """
    arrays = [_column(table, column) for column in leaf.columns]
    for column, array in zip(leaf.columns, arrays, strict=True):
        if not is_.is_null(innermost(array.type)[0]) and kind_of(array.type) != leaf.kind:
            raise RowError(
                _first(array),
                f"{column.label} is {array.type} where it is {leaf.kind} before (mixed dtypes);"
                " give one type",
            )
    parts = [
        _values(array, leaf.kind, leaf.shape if len(leaf.columns) == 1 else ()) for array in arrays
    ]
    if len(parts) == 1:
        return parts[0]
    return Values(
        np.stack([p.array for p in parts], 1),
        np.any([p.missing for p in parts], 0),
        np.zeros(table.num_rows, bool),
    )


def _column(table: pa.Table, column: Column) -> pa.Array:
    if column.name not in table.column_names:
        return pa.nulls(table.num_rows)
    chunked = table.column(column.name)
    array = chunked.combine_chunks() if chunked.num_chunks != 1 else chunked.chunk(0)
    for field in column.fields:
        if not is_.is_null(array.type) and not is_.is_struct(array.type):
            raise RowError(
                _first(array),
                f"{column.name} is a {array.type} where the first row has a struct; give one type",
            )
        if is_.is_null(array.type) or array.type.get_field_index(field) < 0:
            return pa.nulls(table.num_rows)
        array = array.flatten()[
            array.type.get_field_index(field)
        ]  # flatten, unlike field, knows of the struct's own nulls
    return array


def _first(array: pa.Array) -> int:
    return next((i for i, valid in enumerate(array.is_valid().to_pylist()) if valid), 0)


def _values(array: pa.Array, kind: Kind, shape: tuple[int, ...]) -> Values:
    if is_.is_dictionary(array.type):
        array = array.dictionary_decode()
    rows = len(array)
    missing = (
        np.zeros(rows, bool)
        if array.null_count == 0
        else array.is_null().to_numpy(zero_copy_only=False)
    )
    listed = innermost(array.type)[1] > 0
    if not shape or not listed:
        wrong = (
            ~missing
            if bool(shape) != listed and not is_.is_null(array.type)
            else np.zeros(rows, bool)
        )
        if wrong.any() or is_.is_null(array.type):
            return Values(_zeros(kind, rows, shape), missing, wrong)
        return Values(_scalars(array, kind), missing, wrong)
    lengths = pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = ~missing & (lengths != shape[0])
    good = ~(missing | wrong)
    inner = _values(
        (array if good.all() else array.filter(pa.array(good))).flatten(), kind, shape[1:]
    )
    kept = int(good.sum())
    values = inner.array.reshape(kept, *shape)
    bad, off = (
        np.asarray(mask.reshape(kept, shape[0]).any(1)) for mask in (inner.missing, inner.misshapen)
    )
    if kept == rows:
        return Values(values, bad, off)
    full = np.zeros((rows, *shape), values.dtype)
    full[good], missing[good], wrong[good] = values, bad, off
    return Values(full, missing, wrong)


def _zeros(kind: Kind, rows: int, shape: tuple[int, ...]) -> Array:
    return (
        np.full((rows, *shape), "", object)
        if kind == "text"
        else np.zeros((rows, *shape), bool if kind == "bool" else np.int64)
    )


def _scalars(array: pa.Array, kind: Kind) -> Array:
    if kind == "text":
        return np.array(array.fill_null("").to_pylist(), object)
    if array.null_count:
        array = array.fill_null(False if is_.is_boolean(array.type) else 0)
    return np.asarray(array.to_numpy(zero_copy_only=False))
