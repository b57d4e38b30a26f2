"""The documented schema (docs/import.md): which column of the given files holds what.

A `Schema` is decided by the files' columns, their types and their first rows, before the rows are
read. What depends on all values, such as inferred spaces, is added by `Schema.describe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as is_
from gymnasium import spaces

from mesocosm.data.ingest.leaves import (
    SEPARATOR,
    ColumnLeaf,
    Space,
    build_space,
    columns_of,
    find_leaves,
    find_options,
    flat_types,
    flatten,
    innermost,
    kind_of,
    shown,
)
from mesocosm.data.ingest.readers import PROBLEM, About, lerobot
from mesocosm.data.ingest.readers.registry import TRACES
from mesocosm.data.ingest.sources import Source
from mesocosm.data.ingest.values import RowError, Stat, infer_space, take_integers
from mesocosm.datasets.spaces import shown_space
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
    types: dict[str, pa.DataType]
    """The columns that are read, flattened, by the schema's names."""
    observation: list[ColumnLeaf]
    action: list[ColumnLeaf]
    next_observation: list[ColumnLeaf]
    """The columns of the next observation, like `observation`. Empty if the files have none."""
    task: list[ColumnLeaf]
    first_step: int
    """The number of an episode's first step, 0 or 1."""
    per_file: bool
    bounds: str
    """`reality.bounds`."""
    marks_success: bool
    """True if success is a flag of each step. One such step makes the episode a success."""
    done_only: bool
    """The logs do not say whether a time limit ended an episode."""
    spaces: tuple[Space, Space] | None
    """The environment's spaces, or the spaces stated in the logs. None if they are inferred."""
    about: About
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
        """One row per column: its use, and which part of that is a guess."""
        owner = "dataset" if self.spaces == self.about.spaces else "environment"
        rows = []
        for leaf in (*self.observation, *self.action):
            space, how = leaf.space, f"of the {owner}; every value was checked"
            if space is None:
                space, how = infer_space(leaf, stats[leaf.name], leaf in self.action)
            if note := self.about.notes.get(leaf.name.partition(".")[0]):
                how = f"{how}; {note}"
            name = _file_name(leaf.columns[0], self.renames)
            if leaf.flattened and len(leaf.columns) > 1:
                name = f"{name} ... {_file_name(leaf.columns[-1], self.renames)}"
            became = shown_space(space)
            if isinstance(space, spaces.Box):  # its bounds, which may be long, are in the manifest
                became = f"Box{space.shape} {space.dtype}"
            type = str(self.types[leaf.columns[0]])
            rows.append(_row(name, f"{leaf.name}: {became}", how, type))
        return rows + self.rows


def _row(column: str, became: str, how: str, type: str = "") -> dict[str, str]:
    return {"column": column, "type": type, "became": became, "how": how}


def _file_name(name: str, renames: Mapping[str, str]) -> str:
    """The file's name of a flattened column."""
    for column, standard in renames.items():
        if name == standard or name.startswith(standard + SEPARATOR):
            return column + shown(name[len(standard) :])
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
    schemas: list[tuple[Source, pa.Schema]] = []
    first: pa.Table | None = None
    for source in sources:
        try:
            table = source.head()
        except RowError as error:
            raise UsageError(f"{source.name!r} row {error.row + 1}: {error.text}") from error
        schemas.append((source, table.schema))
        if first is None and table.num_rows:
            first, origin = table, source
    if first is None:
        raise UsageError(f"{sources[0].name!r} has no row; give files that have rows")
    about = origin.about
    renames, unused = _renames(origin, first.schema, columns)
    for name, type in zip(first.schema.names, first.schema.types, strict=True):
        if is_.is_null(type) and renames.get(name) in OPTIONAL:
            unused[name] = "null in the first rows"
            del renames[name]
    table = first.select(list(renames)).rename_columns(list(renames.values()))
    head = flatten(table)
    try:
        _check(origin, table, columns, per_file, first.column_names)
        leaves, rest = find_leaves(head, frozenset(table.column_names), spaces)
        task = find_options(head)
        steps, missing = take_integers(head, "step")
    except RowError as error:
        raise UsageError(f"{origin.name!r} row {error.row + 1}: {error.text}") from error
    except UsageError as error:
        raise UsageError(f"{origin.name!r}: {error}") from error
    unused |= {_file_name(n, renames): "the environment's space has no place for it" for n in rest}
    for source, other in schemas:
        if other.names:
            unused |= _compare(origin, head.schema, source, other, renames, columns)
    first_step = int(steps[~missing][:1].tolist() == [1])
    return Schema(
        renames=renames,
        types=dict(zip(head.column_names, head.schema.types, strict=True)),
        **leaves,
        task=task,
        first_step=first_step,
        per_file=per_file,
        bounds=bounds,
        marks_success=about.marks_success and "success" not in columns,
        done_only=about.done_only and not {"terminated", "truncated"} & set(columns),
        spaces=spaces,
        about=about,
        rows=_describe_scalars(about, table, renames, first_step, task)
        + [_row(name, "nothing", how) for name, how in unused.items()],
    )


def _describe_scalars(
    about: About,
    table: pa.Table,
    renames: Mapping[str, str],
    first_step: int,
    task: list[ColumnLeaf],
) -> list[dict[str, str]]:
    """One row per column of one value, and per optional column that is missing."""
    names = table.column_names
    notes = {
        "step": "counted from 1; became 0, 1, ..." if first_step else "",
        "next_observation": "of an episode's last row: the last observation; of the others it was"
        " compared with the next row's observation",
        "task": f"reset options of the episode: {', '.join(leaf.path[0] for leaf in task)}",
        "terminated": "the environment ended the episode",
        "truncated": "something else did, such as a time limit",
        **about.notes,
        **about.filled,
    }
    absent = {
        "behaviour": f"missing: {IMPORTED!r} acted throughout",
        "next_observation": "missing: an episode needs a last row without an action, or its last"
        " action leads nowhere",
        "episode": "missing: each file is one episode (per_file)",
    }
    rows = []
    for name in COLUMNS:
        if name in names and name not in ("observation", "action"):
            type = "" if name in about.filled else str(table.schema.field(name).type)
            rows.append(_row(_file_name(name, renames), name, notes.get(name, ""), type))
    missing = [n for n in absent if not columns_of(n, names) and n not in about.notes]
    return rows + [_row(name, "nothing", absent[name]) for name in missing]


def _renames(
    source: Source, schema: pa.Schema, columns: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(file's name -> schema's name, unused column -> reason)."""
    for standard, column in columns.items():
        if standard not in COLUMNS:
            raise UsageError(
                f"columns.{standard}={column!r} is not a column of the schema"
                f"{nearest(standard, COLUMNS)}; the schema has {', '.join(COLUMNS)}"
            )
    file_columns = (
        {standard: standard for standard in COLUMNS} | source.about.columns | dict(columns)
    )
    renames: dict[str, str] = {}
    unused = {name: why for name, why in source.about.ignored.items() if name in schema.names}
    for name in schema.names:
        if name in unused:
            continue
        for standard, column in file_columns.items():
            if name == column or name.startswith(f"{column}."):
                renames[name] = standard + name[len(column) :].replace(".", SEPARATOR)
                break
        else:
            unused[name] = "unknown column: not used"
    return renames, unused


def _check(
    source: Source,
    table: pa.Table,
    columns: Mapping[str, str],
    per_file: bool,
    file_columns: Sequence[str],
) -> None:
    """Raise UsageError for a required column that is missing, or a column that exists twice."""
    names = table.column_names
    for name in names:
        if len(overlap := sorted(columns_of(name, names))) > 1:
            a, b = map(shown, overlap[:2])
            raise UsageError(f"the columns {a!r} and {b!r} overlap; drop one of them")
    for name in REQUIRED:
        if columns_of(name, names) or (name == "episode" and per_file):
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
    take_integers(table, "seed")
    if "episode" in names and kind_of(table.schema.field("episode").type) != "text":
        take_integers(table, "episode")


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
    typed = first.format not in ("jsonl", *TRACES)
    types = flat_types((to, other.field(n).type) for n, to in renames.items() if n in other.names)
    names = [n for n, to in renames.items() if typed or to.split(SEPARATOR)[0] in REQUIRED]
    missing = [name for name in names if name not in other.names]
    for field in schema:
        name = _file_name(field.name, renames)
        if field.name not in types:
            missing += [name] if typed else []
            continue
        a, b = field.type, types[field.name]
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
    return unused | dict.fromkeys(extra, f"{first.name!r} does not have this column: not used")


def _comparable(type: pa.DataType, typed: bool) -> tuple[str | None, int] | None:
    """The part of a type that must be equal in all files; None for nulls, which fit any type.

    It is not the width of a number nor, in JSON, whether it is an integer.
    """
    inner, depth = innermost(type)
    if is_.is_null(inner):
        return None
    kind = kind_of(inner)
    if kind == "number" and typed:
        kind = "float" if is_.is_floating(inner) else "integer"
    return kind, depth
