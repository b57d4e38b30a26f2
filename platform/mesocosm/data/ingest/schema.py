"""What the columns of the given files are for: a `Layout` to read them by, and the table that says
so to the user.

Everything here is decided by the files' columns, types and first rows, before the rows are read;
what is decided by values (`inference`) is said later, by `Schema.describe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import pyarrow as pa
import pyarrow.types as is_

from mesocosm.data.ingest.inference import Stat, space_of
from mesocosm.data.ingest.layout import (
    Column,
    Leaf,
    Node,
    RowError,
    build,
    columns_of,
    explore,
    infer,
    innermost,
    kind_of,
    match,
)
from mesocosm.data.ingest.readers import PROBLEM, Source, lerobot
from mesocosm.data.ingest.rows import IMPORTED, OPTIONAL, REQUIRED, Layout
from mesocosm.errors import UsageError, nearest

Space = gymnasium.Space[Any]
KNOWN = (*REQUIRED, *OPTIONAL)
SCALARS = {
    "reward": "number",
    "terminated": "number bool",
    "truncated": "number bool",
    "duration": "number",
    "success": "number bool",
    "behaviour": "text",
}
"""What kinds of value a column may hold."""


@dataclass(frozen=True)
class Schema:
    layout: Layout
    renames: dict[str, str]
    """Theirs -> ours, of the columns that are read"""
    strict: bool
    """The format has types, which all files must share"""
    whole_file: bool
    """The table has no episode column: a file is an episode"""
    types: dict[str, str]
    """Of each column that is read, by our name"""
    unused: dict[str, str]
    """Columns that nothing is made of, theirs, and why"""
    spaces: tuple[Space, Space] | None
    given: str
    """Whose the spaces are, where they are not inferred"""
    made: dict[str, str]
    """Ours, that the format lacks, and what is put there"""
    notes: dict[str, str]
    """What is to be known of our columns in this format"""
    defaults: list[dict[str, str]] = field(default_factory=list)
    done_only: bool = False
    """The logs do not say whether a time limit ended an episode"""

    def columns(self) -> list[str]:
        """Theirs, to be read."""
        return list(self.renames)

    def ours(self, table: pa.Table) -> pa.Table:
        names = [name for name in table.column_names if name in self.renames or name == PROBLEM]
        return table.select(names).rename_columns([self.renames.get(name, name) for name in names])

    def spaces_of(self, stats: Mapping[str, Stat]) -> tuple[Space, Space]:
        """(observation space, action space): the environment's, or what the values make them."""
        if self.spaces is not None:
            return self.spaces
        both = []
        for leaves, action in ((self.layout.observation, False), (self.layout.action, True)):
            both.append(
                build(
                    leaves,
                    {
                        leaf.name: space_of(leaf, stats.get(leaf.name, Stat()), action)[0]
                        for leaf in leaves
                    },
                )
            )
        return both[0], both[1]

    def describe(self, stats: Mapping[str, Stat]) -> list[dict[str, str]]:
        """One row a column: what it became, and what is a guess."""
        theirs = {ours: name for name, ours in self.renames.items()}
        rows = []
        for leaves, action in ((self.layout.observation, False), (self.layout.action, True)):
            for leaf in leaves:
                space, how = (
                    (leaf.space, f"of {self.given}; every value was checked")
                    if leaf.space is not None
                    else space_of(leaf, stats[leaf.name], action)
                )
                how = "; ".join(filter(None, [how, self.notes.get(leaf.name.partition(".")[0])]))
                first, last = leaf.columns[0], leaf.columns[-1]
                label = (
                    _theirs(first, theirs)
                    if first is last
                    else f"{_theirs(first, theirs)} ... {_theirs(last, theirs)}"
                )
                rows.append(
                    {
                        "column": label,
                        "type": str(first.type),
                        "became": f"{leaf.name}: {_short(space)}",
                        "how": how,
                    }
                )
        for name in [n for n in KNOWN if n in self.types and n not in ("observation", "action")]:
            if name in self.made:
                rows.append({"column": name, "type": "", "became": name, "how": self.made[name]})
                continue
            how = self.notes.get(name) or _how(name, self.layout)
            rows.append(
                {
                    "column": theirs.get(name, name),
                    "type": self.types[name],
                    "became": name,
                    "how": how,
                }
            )
        rows += self.defaults
        rows += [
            {"column": name, "type": "", "became": "nothing", "how": why}
            for name, why in self.unused.items()
        ]
        return rows


def _short(space: Space) -> str:
    """Without a Box's bounds, which may be long; they are in the manifest."""
    return (
        f"Box{space.shape} {space.dtype}" if isinstance(space, gymnasium.spaces.Box) else str(space)
    )


def _theirs(column: Column, theirs: Mapping[str, str]) -> str:
    return ".".join((theirs.get(column.name, column.name), *column.fields))


def _how(name: str, layout: Layout) -> str:
    return {
        "step": "" if layout.first_step == 0 else "counted from 1; became 0, 1, ...",
        "next_observation": (
            "of an episode's last row: the last observation; of the others it was compared with the"
            " next row's observation"
        ),
        "task": f"reset options of the episode: {', '.join(leaf.path[0] for leaf in layout.task)}",
        "terminated": "the environment ended the episode",
        "truncated": "something else did, such as a time limit",
    }.get(name, "")


def read_schema(
    sources: Sequence[Source],
    columns: Mapping[str, str],
    per_file: bool,
    spaces: tuple[Space, Space] | None,
    bounds: str = "drop",
) -> Schema:
    """Look at every file's columns and the first rows of the first. `bounds`: `reality.bounds`.

    Raises UsageError naming the file: a column that is missing, of a type that cannot be, or of
    another type than in the first file.
    """
    heads: list[tuple[Source, pa.Schema]] = []
    first: pa.Table | None = None
    for source in sources:
        try:
            table = source.head()
        except RowError as error:
            raise UsageError(f"{source.name!r} row {error.row + 1}: {error.text}") from error
        heads.append((source, table.schema))
        if first is None and table.num_rows:
            first, origin = table, source
    if first is None:
        raise UsageError(f"{sources[0].name!r} has no row; give files that have")
    renames, unused = _renames(origin, first.schema, {**origin.columns, **columns})
    whole_file = per_file and "episode" not in renames.values()
    table = first.select(list(renames)).rename_columns(list(renames.values()))
    _check(origin, table, columns, whole_file, list(first.schema.names))
    try:
        layout, more, defaults = _layout(table, spaces)
    except UsageError as error:
        raise UsageError(f"{origin.name!r}: {error}") from error
    theirs = {ours: name for name, ours in renames.items()}
    unused |= {
        ".".join([theirs.get(label.split(".")[0], label.split(".")[0]), *label.split(".")[1:]]): why
        for label, why in more.items()
    }
    strict = origin.format != "jsonl"
    for source, other in heads:
        if len(other.names):
            unused |= _same(
                origin, table.schema, source, other, renames, {**source.columns, **columns}, strict
            )
    if whole_file:
        defaults.append(_default("episode", "missing: each file is one episode (per_file)"))
    layout = replace(
        layout, bounds=bounds, marks_success=origin.marks_success and "success" not in columns
    )
    done_only = origin.done_only and not {"terminated", "truncated"} & set(columns)
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    given = "the dataset" if spaces is not None and spaces == origin.spaces else "the environment"
    return Schema(
        layout,
        renames,
        strict,
        whole_file,
        types,
        unused,
        spaces,
        given,
        origin.made,
        origin.notes,
        defaults,
        done_only,
    )


def _renames(
    source: Source, schema: pa.Schema, columns: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(theirs -> ours, unused)."""
    for ours, theirs in columns.items():
        if ours not in KNOWN:
            raise UsageError(
                f"columns.{ours}={theirs!r} names no column of the schema{nearest(ours, KNOWN)};"
                f" the schema has {', '.join(KNOWN)}"
            )
    found: dict[str, str] = {}
    unused = {name: why for name, why in source.ignored.items() if name in schema.names}
    for name in schema.names:
        if name in unused:
            continue
        for ours in KNOWN:
            theirs = columns.get(ours, ours)
            if name == theirs or name.startswith(theirs + "."):
                found[name] = ours + name[len(theirs) :]
                break
        else:
            unused[name] = "unknown column: not used"
    return found, unused


def _check(
    source: Source, table: pa.Table, columns: Mapping[str, str], whole_file: bool, have: list[str]
) -> None:
    schema = table.schema
    for name in REQUIRED:
        if name == "episode" and whole_file:
            continue
        if explore(schema, name) is None:
            wanted = columns.get(name, name)
            fix = f"add it, or say which column it is: columns.{name}=NAME"
            folder = lerobot.folder_of(source.path, have)
            if folder is not None:
                fix = (
                    "these columns are LeRobot's: name the LeRobot folder"
                    f" itself{f', {folder!r},' if folder else ''} instead of its files"
                )
            elif name == "episode":
                fix += "; where each file is one episode, say per_file=true"
            raise UsageError(
                f"{source.name!r} has no column {wanted!r}, which is required (it has"
                f" {', '.join(have)}); {fix}"
            )
    for name, kinds in SCALARS.items():
        if name in schema.names:
            type = schema.field(name).type
            if not is_.is_null(type) and (kind_of(type) not in kinds.split() or innermost(type)[1]):
                raise UsageError(
                    f"{source.name!r}: column {name!r} has the type {type}; give"
                    f" {' or '.join(kinds.split())}, one a row"
                )
    for name, allowed in (
        ("episode", "whole numbers or strings"),
        ("step", "whole numbers"),
        ("seed", "whole numbers"),
    ):
        if name not in schema.names:
            continue
        type = schema.field(name).type
        if not (
            is_.is_integer(type)
            or is_.is_null(type)
            or (name == "episode" and (is_.is_string(type) or is_.is_large_string(type)))
        ):
            broken = (
                i
                for i, value in enumerate(table.column(name).to_pylist())
                if isinstance(value, float) and not value.is_integer()
            )
            row = next((f" row {i + 1}" for i in broken), "")
            raise UsageError(
                f"{source.name!r}{row}: column {name!r} has the type {type}; give {allowed}"
            )


def _layout(
    table: pa.Table, spaces: tuple[Space, Space] | None
) -> tuple[Layout, dict[str, str], list[dict[str, str]]]:
    schema = table.schema
    nodes = {
        part: explore(schema, part)
        for part in ("observation", "action", "next_observation", "task")
    }
    shapes = {
        column.label: _shape(table, column)
        for node in nodes.values()
        if node is not None
        for column in columns_of(node)
    }
    unused: dict[str, str] = {}
    leaves: dict[str, list[Leaf]] = {}
    for part, space in (("observation", 0), ("action", 1), ("next_observation", 0)):
        node = nodes[part]
        if node is None:
            continue
        if spaces is None:
            leaves[part] = infer(node, part, shapes)
        else:
            leaves[part], rest = match(spaces[space], node, part)
            unused |= dict.fromkeys(rest, "the environment's space has no place for it")
    following = leaves.get("next_observation", [])
    own, theirs = (
        [(leaf.path, leaf.kind, leaf.shape) for leaf in part]
        for part in (leaves["observation"], following)
    )
    if following and own != theirs:
        raise UsageError(
            f"next_observation has the parts {theirs} where observation has {own}; make them alike,"
            " or leave next_observation out"
        )
    defaults = (
        []
        if "behaviour" in schema.names
        else [_default("behaviour", f"missing: {IMPORTED!r} acted throughout")]
    )
    if nodes["next_observation"] is None:
        defaults.append(
            _default(
                "next_observation",
                "missing: an episode needs a last row without an action, or its last action leads"
                " nowhere",
            )
        )
    present = frozenset(
        name
        for name in OPTIONAL
        if name in schema.names and not is_.is_null(schema.field(name).type)
    )
    for name in OPTIONAL:
        if name in schema.names and name not in present:
            unused[name] = "it is null in the first rows"
    named = "episode" in schema.names and kind_of(schema.field("episode").type) == "text"
    step = next((step for step in table.column("step").to_pylist() if step is not None), 0)
    task = _task(nodes["task"], shapes)
    return (
        Layout(
            leaves["observation"],
            leaves["action"],
            following,
            task,
            present,
            named,
            1 if step == 1 else 0,
        ),
        unused,
        defaults,
    )


def _task(node: Node | None, shapes: Mapping[str, tuple[int, ...]]) -> list[Leaf]:
    if node is None or (isinstance(node, Column) and is_.is_null(node.type)):
        return []
    if isinstance(node, Column):
        raise UsageError(
            f"column 'task' has the type {node.type}; give a struct, or columns task.NAME, that"
            " name each reset option"
        )
    found = []
    for key in sorted(node):
        leaf = infer(node[key], f"task.{key}", shapes)
        if len(leaf) != 1 or leaf[0].path or leaf[0].shape:
            raise UsageError(
                f"column 'task.{key}' is not one number, boolean or string a row; give one for each"
                " reset option"
            )
        found.append(Leaf(leaf[0].name, (key,), leaf[0].columns, leaf[0].kind, (), None))
    return found


def _default(column: str, how: str) -> dict[str, str]:
    return {"column": column, "type": "", "became": "nothing", "how": how}


def _shape(table: pa.Table, column: Column) -> tuple[int, ...]:
    if not innermost(column.type)[1]:
        return ()
    for row in table.column(column.name).to_pylist():
        for field_name in column.fields:
            row = None if row is None else row[field_name]
        shape: list[int] = []
        while isinstance(row, list):
            shape.append(len(row))
            row = row[0] if row else None
        if shape:
            return tuple(shape)
    raise UsageError(
        f"column {column.label!r} holds no list in its first {table.num_rows} rows; give lists of"
        " one length"
    )


def _same(
    first: Source,
    schema: pa.Schema,
    source: Source,
    other: pa.Schema,
    renames: Mapping[str, str],
    columns: Mapping[str, str],
    strict: bool,
) -> dict[str, str]:
    """Columns that `source` has beyond what is read. Raises UsageError where one that is read is
    missing or of another type there.
    """
    theirs, unused = _renames(source, other, columns)
    for name, ours in renames.items():
        if name not in other.names:
            if strict or ours.partition(".")[0] in REQUIRED:
                raise UsageError(
                    f"{source.name!r} has no column {name!r}, which {first.name!r} has; give files"
                    " of the same columns"
                )
            continue
        a, b = schema.field(ours).type, other.field(name).type
        if _canonical(a, strict) != _canonical(b, strict) and not (
            is_.is_null(innermost(a)[0]) or is_.is_null(innermost(b)[0])
        ):
            raise UsageError(
                f"column {name!r} is {a} in {first.name!r} and {b} in {source.name!r} (mixed"
                " dtypes); give one type"
            )
    extra = [name for name in theirs if name not in renames]
    return unused | dict.fromkeys(extra, f"{first.name!r} has no such column: not used")


def _canonical(type: pa.DataType, strict: bool) -> Any:
    """What must be alike in all files: not the width of a number, and in JSON not whether it has a
    point.
    """
    if is_.is_struct(type):
        return (
            {
                type.field(i).name: _canonical(type.field(i).type, strict)
                for i in range(type.num_fields)
            }
            if strict
            else "struct"
        )
    inner, depth = innermost(type)
    kind = kind_of(inner)
    if kind == "number" and strict:
        kind = "float" if is_.is_floating(inner) else "integer"
    return [kind, depth]
