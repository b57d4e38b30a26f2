"""The documented schema (docs/import.md): which column of the given files holds what.

A `Schema` is decided by the files' columns, their types and their first rows, before the rows are
read. What depends on all values, such as inferred spaces, is added by `Schema.describe`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as is_
from gymnasium import spaces

from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.data.ingest.readers import PROBLEM, Source, lerobot
from mesocosm.data.ingest.values import (
    SEPARATOR,
    Array,
    Leaf,
    RowError,
    Space,
    Stat,
    build_space,
    flatten,
    infer_space,
    innermost,
    is_numbered,
    kind_of,
    shown,
    take_integers,
)
from mesocosm.errors import UsageError, nearest

REQUIRED = ("episode", "step", "observation", "action", "reward", "terminated", "truncated")
OPTIONAL = ("next_observation", "duration", "behaviour", "task", "seed", "success")
COLUMNS = (*REQUIRED, *OPTIONAL)
IMPORTED = "imported"
"""The behaviour of rows that name none."""


@dataclass(frozen=True)
class Schema:
    """Which column of the files holds what, and how rows are read."""

    renames: dict[str, str]
    """File's name -> schema's name, of the columns that are read."""
    names: frozenset[str]
    """The columns read, flattened, by the schema's names."""
    types: dict[str, str]
    """Arrow types of those columns."""
    observation: list[Leaf]
    action: list[Leaf]
    next_observation: list[Leaf]
    """As `observation`. Empty where the files have no next observations."""
    task: list[Leaf]
    text_keys: bool
    """Episodes are named by strings."""
    first_step: int
    """The number of an episode's first step, 0 or 1."""
    per_file: bool
    whole_file: bool
    """The files have no episode column: each file is one episode."""
    bounds: str
    """`reality.bounds`."""
    marks_success: bool
    """Success is a flag of each step: any of them makes the episode a success."""
    done_only: bool
    """The logs do not say whether a time limit ended an episode."""
    spaces: tuple[Space, Space] | None
    """The environment's spaces. None where they are inferred."""
    spaces_from: str
    notes: dict[str, str]
    """Remarks of the format on our columns."""
    rows: list[dict[str, str]]
    """Description of the columns that are not leaves of a space."""

    def select(self, table: pa.Table) -> pa.Table:
        """The columns that are read, by the schema's names, flattened."""
        names = [name for name in table.column_names if name in self.renames or name == PROBLEM]
        renamed = [self.renames.get(name, name) for name in names]
        return flatten(table.select(names).rename_columns(renamed))

    def build_spaces(self, stats: Mapping[str, Stat]) -> tuple[Space, Space]:
        """(observation space, action space): the environment's, or inferred."""
        if self.spaces is not None:
            return self.spaces
        observation, action = (
            {leaf.name: infer_space(leaf, stats.get(leaf.name, Stat()), acts)[0] for leaf in leaves}
            for leaves, acts in ((self.observation, False), (self.action, True))
        )
        return build_space(self.observation, observation), build_space(self.action, action)

    def describe(self, stats: Mapping[str, Stat]) -> list[dict[str, str]]:
        """One row per column: what it became, and what is a guess."""
        rows = []
        for leaf in (*self.observation, *self.action):
            space, how = leaf.space, f"of {self.spaces_from}; every value was checked"
            if space is None:
                space, how = infer_space(leaf, stats[leaf.name], leaf in self.action)
            ends = dict.fromkeys(
                _file_name(n, self.renames) for n in (leaf.columns[:1] + leaf.columns[-1:])
            )
            note = self.notes.get(leaf.name.partition(".")[0])
            # The bounds of a Box may be long. They are in the manifest.
            box = isinstance(space, spaces.Box)
            short = f"Box{space.shape} {space.dtype}" if box else str(space)
            type = self.types[leaf.columns[0]]
            rows.append(
                _row(
                    " ... ".join(ends),
                    f"{leaf.name}: {short}",
                    "; ".join(filter(None, [how, note])),
                    type,
                )
            )
        return rows + self.rows


def _row(column: str, became: str, how: str, type: str = "") -> dict[str, str]:
    return {"column": column, "type": type, "became": became, "how": how}


def _file_name(name: str, renames: Mapping[str, str]) -> str:
    """The file's name of a flattened column."""
    for theirs, ours in renames.items():
        if name == ours or name.startswith(ours + SEPARATOR):
            return theirs + shown(name[len(ours) :])
    return shown(name)


def read_schema(
    sources: Sequence[Source],
    columns: Mapping[str, str],
    per_file: bool,
    spaces: tuple[Space, Space] | None,
    bounds: str = "drop",
) -> Schema:
    """Decide the schema from the columns of every file and the first rows of the first.

    Raises:
        UsageError: A column is missing, is of a type that cannot be read, or differs between
            files. Names the file.
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
        raise UsageError(f"{sources[0].name!r} has no row; give files that have rows")
    renames, unused = _renames(origin, first.schema, columns)
    for ours in [ours for ours in renames.values() if ours in OPTIONAL]:
        theirs = _file_name(ours, renames)
        if is_.is_null(first.schema.field(theirs).type):
            unused[theirs] = "null in the first rows"
            del renames[theirs]
    try:
        table = first.select(list(renames)).rename_columns(list(renames.values()))
        head, top = flatten(table), frozenset(table.column_names)
        for name in top:
            if len(overlap := sorted(_below(name, top))) > 1:
                a, b = overlap[:2]
                raise UsageError(f"columns {shown(a)!r} and {shown(b)!r} overlap; drop one of them")
        whole_file = per_file and not _below("episode", head.column_names)
        _check(origin, head, columns, whole_file, first.column_names)
        leaves, rest = _leaves(head, top, spaces)
        task = _task_leaves(head)
        step, missing = take_integers(head, "step")
    except RowError as error:
        raise UsageError(f"{origin.name!r} row {error.row + 1}: {error.text}") from error
    except UsageError as error:
        raise UsageError(f"{origin.name!r}: {error}") from error
    unused |= {_file_name(n, renames): "the environment's space has no place for it" for n in rest}
    for source, other in heads:
        if other.names:
            unused |= _compare(origin, head.schema, source, other, renames, columns)
    types = {field.name: str(field.type) for field in (*table.schema, *head.schema)}
    rows = [
        _row(name, name, origin.about.filled[name])
        if name in origin.about.filled
        else _row(
            _file_name(name, renames),
            name,
            origin.about.notes.get(name) or _how(name, step[~missing], task),
            types[name],
        )
        for name in COLUMNS
        if name in top and name not in ("observation", "action")
    ]
    missing_columns = {
        "behaviour": f"missing: {IMPORTED!r} acted throughout",
        "next_observation": "missing: an episode needs a last row without an action, or its last"
        " action leads nowhere",
        "episode": "missing: each file is one episode (per_file)",
    }
    for name, how in missing_columns.items():
        if not _below(name, head.column_names):
            rows.append(_row(name, "nothing", how))
    rows += [_row(name, "nothing", why) for name, why in unused.items()]
    about = origin.about
    return Schema(
        renames=renames,
        names=frozenset(head.column_names),
        types=types,
        **leaves,
        task=task,
        text_keys="episode" in top and kind_of(table.schema.field("episode").type) == "text",
        first_step=int(step[~missing][:1].tolist() == [1]),
        per_file=per_file,
        whole_file=whole_file,
        bounds=bounds,
        marks_success=about.marks_success and "success" not in columns,
        done_only=about.done_only and not {"terminated", "truncated"} & set(columns),
        spaces=spaces,
        spaces_from=(
            "the dataset" if spaces is not None and spaces == about.spaces else "the environment"
        ),
        notes=about.notes,
        rows=rows,
    )


def _how(name: str, steps: Array, task: Sequence[Leaf]) -> str:
    return {
        "step": "counted from 1; became 0, 1, ..." if steps[:1].tolist() == [1] else "",
        "next_observation": (
            "of an episode's last row: the last observation; of the others it was compared with the"
            " next row's observation"
        ),
        "task": f"reset options of the episode: {', '.join(leaf.path[0] for leaf in task)}",
        "terminated": "the environment ended the episode",
        "truncated": "something else did, such as a time limit",
    }.get(name, "")


def _below(part: str, names: Iterable[str]) -> list[str]:
    """The columns of `part`: itself, or `part.KEY`."""
    return [name for name in names if name == part or name.startswith(part + SEPARATOR)]


def _renames(
    source: Source, schema: pa.Schema, columns: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(file's name -> schema's name, unused column -> reason)."""
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise UsageError(
                f"columns.{ours}={theirs!r} is not a column of the schema{nearest(ours, COLUMNS)};"
                f" the schema has {', '.join(COLUMNS)}"
            )
    theirs_of = {ours: ours for ours in COLUMNS} | source.about.columns | dict(columns)
    renames: dict[str, str] = {}
    unused = {name: why for name, why in source.about.ignored.items() if name in schema.names}
    for name in schema.names:
        if name in unused:
            continue
        for ours, theirs in theirs_of.items():
            if name == theirs or name.startswith(f"{theirs}."):
                renames[name] = ours + name[len(theirs) :].replace(".", SEPARATOR)
                break
        else:
            unused[name] = "unknown column: not used"
    return renames, unused


def _check(
    source: Source,
    head: pa.Table,
    columns: Mapping[str, str],
    whole_file: bool,
    file_columns: Sequence[str],
) -> None:
    """Raise UsageError for a required column that is missing, or a column that exists twice."""
    names = head.column_names
    for name in REQUIRED:
        if _below(name, names) or (name == "episode" and whole_file):
            continue
        fix = f"add it, or set columns.{name}=NAME to the column that holds it"
        folder = lerobot.folder_of(source.path, file_columns)
        if folder is not None:
            folder = f", {folder!r}," if folder else ""
            fix = f"these columns are LeRobot's: give the LeRobot folder itself{folder} instead"
        elif name == "episode":
            fix += "; where each file is one episode, set per_file=true"
        raise UsageError(
            f"the table has no column {columns.get(name, name)!r}, which is required (it has"
            f" {', '.join(file_columns)}); {fix}"
        )
    for name in {"episode", "step", "seed"} & set(names):
        if name != "episode" or kind_of(head.schema.field(name).type) != "text":
            take_integers(head, name)


def _leaves(
    head: pa.Table, top: frozenset[str], spaces: tuple[Space, Space] | None
) -> tuple[dict[str, list[Leaf]], list[str]]:
    """({observation, action, next_observation: leaves}, columns without a place)."""
    leaves: dict[str, list[Leaf]] = {}
    for part in ("observation", "action", "next_observation"):
        if not _below(part, head.column_names):
            leaves[part] = []
        elif spaces is None:
            leaves[part] = list(_infer(head, top, part, ()))
        else:
            leaves[part] = _match(head, top, spaces[part == "action"], part)
    if leaves["next_observation"]:
        seen, following = (
            [(leaf.path, leaf.kind, leaf.shape) for leaf in leaves[part]]
            for part in ("observation", "next_observation")
        )
        if seen != following:
            raise UsageError(
                f"next_observation has the parts {following} and observation {seen}; make them"
                " equal, or leave next_observation out"
            )
    used = {name for part in leaves.values() for leaf in part for name in leaf.columns}
    return leaves, [n for part in leaves for n in _below(part, head.column_names) if n not in used]


def _infer(head: pa.Table, top: frozenset[str], name: str, path: tuple[str, ...]) -> Iterator[Leaf]:
    """The leaves below `name`, as the table has them."""
    if name in head.column_names:
        type = head.schema.field(name).type
        kind, depth = kind_of(type), innermost(type)[1]
        if kind is None or (kind == "text" and depth):
            raise UsageError(
                f"column {shown(name)!r} has the type {type}, which no space holds; give numbers,"
                " booleans or lists of them, strings, or structs"
            )
        shape = _shape(head, name) if depth else ()
        yield Leaf(shown(name), path, (name,), kind, shape)
        return
    below = _below(name, head.column_names)
    keys = dict.fromkeys(column[len(name) + 1 :].split(SEPARATOR)[0] for column in below)
    columns = [f"{name}{SEPARATOR}{i}" for i in range(len(keys))]
    if set(columns) == set(below) and set(columns) <= top:
        types = [head.schema.field(column).type for column in columns]
        kinds = {kind_of(type) for type in types}
        if kinds in ({"number"}, {"bool"}) and not any(innermost(type)[1] for type in types):
            yield Leaf(shown(name), path, tuple(columns), str(kinds.pop()), (len(columns),))
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
        f"column {shown(name)!r} holds no list in its first {head.num_rows} rows; give lists of one length"
    )


def _match(head: pa.Table, top: frozenset[str], space: Space, part: str) -> list[Leaf]:
    """The leaves of an environment's space, with the columns that hold them."""
    leaves = []
    for leaf in SpaceCodec(space, part).leaves:
        path = tuple(map(str, leaf.path))
        name = SEPARATOR.join((part, *path))
        below = _below(name, head.column_names)
        columns = [f"{name}{SEPARATOR}{i}" for i in range(math.prod(leaf.shape))]
        if name in below:
            columns = [name]
        elif len(leaf.shape) != 1 or not set(columns) == set(below) <= top:
            names = ", ".join(map(shown, below or _below(part, head.column_names)))
            raise UsageError(
                f"the environment's {leaf.name} is {leaf.space} and no column of the table fits it"
                f" (it has {names}); give one column, or one per element, or leave --env out"
            )
        kinds = {kind_of(head.schema.field(column).type) for column in columns}
        text = isinstance(leaf.space, spaces.Text)
        if not kinds <= ({"text"} if text else {"number", "bool"}):
            type = head.schema.field(columns[0]).type
            raise UsageError(
                f"column {shown(columns[0])!r} has the type {type} where the environment's {leaf.name} is"
                f" {leaf.space}; convert it, or leave --env out"
            )
        kind = "text" if text else "bool" if kinds == {"bool"} else "number"
        leaves.append(Leaf(leaf.name, path, tuple(columns), kind, leaf.shape, leaf.space))
    return leaves


def _task_leaves(head: pa.Table) -> list[Leaf]:
    leaves = []
    for name in sorted(_below("task", head.column_names)):
        key, type = name.removeprefix(f"task{SEPARATOR}"), head.schema.field(name).type
        kind = kind_of(type)
        if name == "task" or SEPARATOR in key or kind is None or innermost(type)[1]:
            raise UsageError(
                f"column {shown(name)!r} has the type {type}; give a struct, or columns task.NAME, of one"
                " number, boolean or string for each reset option"
            )
        leaves.append(Leaf(shown(name), (key,), (name,), kind))
    return leaves


def _compare(
    first: Source,
    schema: pa.Schema,
    source: Source,
    other: pa.Schema,
    renames: Mapping[str, str],
    columns: Mapping[str, str],
) -> dict[str, str]:
    """The columns of `source` that are not read.

    Raises:
        UsageError: One that is read is missing in `source`, or of another type than in `first`.
    """
    others, unused = _renames(source, other, columns)
    typed = first.format != "jsonl"
    table = other.empty_table().select([name for name in renames if name in other.names])
    table = flatten(table.rename_columns([renames[name] for name in table.column_names]))
    names = [n for n, ours in renames.items() if typed or ours.split(SEPARATOR)[0] in REQUIRED]
    missing = [name for name in names if name not in other.names]
    for field in schema:
        name = _file_name(field.name, renames)
        if field.name not in table.column_names:
            missing += [name] if typed else []
            continue
        a, b = field.type, table.schema.field(field.name).type
        if len({_comparable(a, typed), _comparable(b, typed)} - {None}) > 1:
            raise UsageError(
                f"column {name!r} is {a} in {first.name!r} and {b} in {source.name!r} (mixed"
                " dtypes); give one type"
            )
    if missing:
        raise UsageError(
            f"{source.name!r} has no column {missing[0]!r}, which {first.name!r} has; give files of"
            " the same columns"
        )
    extra = [name for name in others if name not in renames]
    return unused | dict.fromkeys(extra, f"{first.name!r} has no such column: not used")


def _comparable(type: pa.DataType, typed: bool) -> tuple[str | None, int] | None:
    """What must be equal in all files: neither the width of a number nor, in JSON, its point.

    None for nulls, which go with every type.
    """
    inner, depth = innermost(type)
    if is_.is_null(inner):
        return None
    kind = kind_of(inner)
    if kind == "number" and typed:
        kind = "float" if is_.is_floating(inner) else "integer"
    return kind, depth
