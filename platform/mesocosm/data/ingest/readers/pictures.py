"""Folders of PNG or JPEG: a folder an episode, with one table of its steps.

    logs/episode-0/steps.csv                a row a step: action, reward, terminated, truncated, ...
    logs/episode-0/000000.png, 000001.png   frame i, by name, is the observation of row i

The table is CSV, JSONL or Parquet, of any name. With one more frame than rows, the last frame is
the observation after the last action. Several cameras are folders in the episode's folder: each is
a key of the observation, beside the columns `observation.NAME` of the table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from mesocosm.data.ingest.frames import frame_array
from mesocosm.data.ingest.readers import PROBLEM, About, LogPiece, jsonl, parquet
from mesocosm.data.ingest.readers.files import sorted_naturally
from mesocosm.data.ingest.readers.traces import TraceOptions
from mesocosm.errors import UsageError

PICTURES = (".png", ".jpg", ".jpeg")
TABLES = (".csv", ".jsonl", ".ndjson", ".parquet")
OBSERVATION = "observation"
IMAGE = "image"
"""The key of the frames in the episode's own folder, if there are other observations."""


def holds(folder: str) -> bool:
    """True if there is a picture in a local folder or below it."""
    return any(_suffix(name) in PICTURES for _, _, names in _walk(folder) for name in names)


def episodes(folder: str) -> list[str]:
    """The episodes' folders in a folder, in order: those with pictures and a table.

    Raises:
        UsageError: There is none, or one has several tables.
    """
    with_tables = {
        path: tables
        for path, _, names in _walk(folder)
        if (tables := [name for name in names if _suffix(name) in TABLES])
    }
    folders = [path for path in sorted_naturally(with_tables) if any(_cameras(path).values())]
    for path in folders:
        if len(with_tables[path]) > 1:
            raise UsageError(
                f"{path!r} must have one table of its steps next to its pictures, got"
                f" {', '.join(sorted(with_tables[path]))}; leave one"
            )
    if not folders:
        raise UsageError(
            f"{folder!r} has pictures but no table of steps next to them; put one that ends in"
            f" {', '.join(TABLES)} into each episode's folder (docs/import.md)"
        )
    return folders


def about(path: str) -> About:
    """The files of an episode."""
    frames = [file for files in _cameras(path).values() for file in files]
    return About(
        files=[_table_of(path), *frames],
        notes={"episode": "the folder's name", "step": "the number of the row"},
    )


def head(path: str, options: TraceOptions) -> pa.Table:
    """The rows of an episode."""
    return _rows(path, options)[0]


def pieces(path: str) -> list[tuple[int, int]]:
    """One: the whole episode."""
    return [(0, 1)]


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    assert isinstance(piece.traces, TraceOptions)
    table, problem = _rows(piece.path, piece.traces)
    table = table.select([name for name in columns if name in table.column_names])
    if problem is not None:
        problems = [problem] + [None] * (table.num_rows - 1)
        table = table.append_column(PROBLEM, pa.array(problems, pa.string()))
    yield table


def _rows(path: str, options: TraceOptions) -> tuple[pa.Table, str | None]:
    """(the rows of an episode with its frames, the reason why it cannot be read)."""
    table = _read_table(_table_of(path))
    names = {name: options.name(name) for name in ("episode", "step", "action", OBSERVATION)}
    seen = _columns_of(table, names[OBSERVATION])
    cameras, problem = _cameras(path), None
    counts = {name: len(files) for name, files in cameras.items() if files}
    rows = table.num_rows
    if not rows:
        raise UsageError(f"the table of {path!r} has no row; give every step, or leave it out")
    if not seen and set(counts.values()) == {rows + 1}:
        table = pa.concat_tables([table, _last_row(table, names["action"])])
    for camera, count in counts.items():
        if count != table.num_rows:
            problem = f"{_folder(path, camera)!r} has {count} frames for {rows} rows of its table"
            problem += "; give one for each row" + ("" if seen else ", or one more")
        problem = problem or _gap(cameras[camera])
    count = table.num_rows
    for name, values in (("episode", [path] * count), ("step", list(range(count)))):
        if names[name] in table.column_names:
            table = table.drop_columns([names[name]])
        table = table.append_column(names[name], pa.array(values))
    alone = list(counts) == [""] and not seen
    for camera in counts:
        files = [*cameras[camera][:count], *[None] * (count - len(cameras[camera]))]
        key = names[OBSERVATION] if alone else f"{names[OBSERVATION]}.{camera or IMAGE}"
        table = table.append_column(key, frame_array(paths=files))
    return table, problem


def _last_row(table: pa.Table, action: str) -> pa.Table:
    """The last row again, without an action: that of the last frame."""
    last = table.slice(table.num_rows - 1)
    for name in _columns_of(table, action):
        at = table.column_names.index(name)
        last = last.set_column(at, name, pa.nulls(1, table.schema.field(name).type))
    return last


def _columns_of(table: pa.Table, name: str) -> list[str]:
    return [each for each in table.column_names if each == name or each.startswith(f"{name}.")]


def _gap(files: Sequence[str]) -> str | None:
    """Why the numbers in the names of frames say that one is missing."""
    numbers = [re.findall(r"[0-9]+", Path(file).stem)[-1:] for file in files]
    if not all(numbers):
        return None
    places = [int(number[0]) for number in numbers]
    steps = [after - before for before, after in pairwise(places)]
    for i, step in enumerate(steps):
        if step != min(steps) or step < 1:
            return f"between {files[i]!r} and {os.path.basename(files[i + 1])!r} a frame is missing"
    return None


def _table_of(path: str) -> str:
    """The table of an episode's folder."""
    (name,) = [n for n in os.listdir(path) if _suffix(n) in TABLES and not n.startswith((".", "_"))]
    return os.path.join(path, name)


def _read_table(path: str) -> pa.Table:
    """The rows of a table. Raises UsageError or RowError, as the readers of its format do."""
    if path.endswith(".csv"):
        try:
            return pyarrow.csv.read_csv(path)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{path!r} cannot be read as CSV ({reason}); write a header and a row a step"
            ) from error
    reader = parquet if path.endswith(".parquet") else jsonl
    names = reader.head(path).column_names
    pieces = [LogPiece("", 0, path, *piece) for piece in reader.pieces(path)]
    tables = [table for piece in pieces for table in reader.read(piece, names)]
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})


def _cameras(path: str) -> dict[str, list[str]]:
    """The frames of an episode's cameras, in order; "" are those in its own folder."""
    folders = {"": path}
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    for name in sorted_naturally(names):
        if not name.startswith((".", "_")):
            folders[name] = os.path.join(path, name)
    return {
        name: sorted_naturally(
            os.path.join(folder, file)
            for file in os.listdir(folder)
            if _suffix(file) in PICTURES and not file.startswith((".", "_"))
        )
        for name, folder in folders.items()
    }


def _folder(path: str, camera: str) -> str:
    return os.path.join(path, camera) if camera else path


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` without hidden files and folders."""
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield path, folders, [name for name in names if not name.startswith((".", "_"))]
