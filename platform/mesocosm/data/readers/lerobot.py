"""LeRobot folders of version 3: `meta/info.json` beside `data/chunk-*/file-*.parquet`, whose files are Parquet with columns of their own names.

`observation.state` and `action` are read, `episode_index` and `frame_index` number them, `next.reward` and `next.done` are taken where there.
Images and videos are not read. A LeRobot episode has no observation after its last action, which therefore leads nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mesocosm.data.readers import Piece, parquet
from mesocosm.errors import UsageError

INFO = "meta/info.json"
VERSION = "v3"
NAMES = {"episode": "episode_index", "step": "frame_index", "observation": "observation.state", "action": "action"}
WHERE_THERE = {"reward": "next.reward", "terminated": "next.done"}
MADE = {
    "reward": (0.0, "missing: LeRobot's next.reward is not there; 0 throughout"),
    "terminated": (False, "missing: LeRobot's next.done is not there; false throughout"),
    "truncated": (False, "missing: LeRobot does not say it; false throughout"),
}

pieces = parquet.pieces


def data(folder: str) -> list[str]:
    """The folder's data, in order. Raises UsageError where it is of another version."""
    info = Path(folder) / INFO
    try:
        version = str(json.loads(info.read_text()).get("codebase_version"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(info)!r} cannot be read ({error}); give a whole LeRobot folder") from error
    if not version.startswith(VERSION):
        raise UsageError(f"{folder!r} is a LeRobot folder of version {version}, and {VERSION} is read; convert it by LeRobot's own converter")
    found = sorted(str(path) for path in (Path(folder) / "data").glob("chunk-*/file-*.parquet"))
    if not found:
        raise UsageError(f"{folder!r} is a LeRobot folder without data/chunk-*/file-*.parquet; give a whole one")
    return found


def columns(path: str) -> Mapping[str, str]:
    """Ours to theirs."""
    have = parquet.head(path).column_names
    return {**NAMES, **{ours: name for ours, name in WHERE_THERE.items() if name in have}}


def made(path: str) -> Mapping[str, str]:
    """Our columns that the file has not, and what is put there."""
    theirs = columns(path)
    return {name: how for name, (_, how) in MADE.items() if name not in theirs}


def head(path: str) -> pa.Table:
    return _completed(parquet.head(path), made(path))


def read(piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    missing = [name for name in MADE if name in columns]
    for table in parquet.read(piece, columns):
        yield _completed(table, missing)


def _completed(table: pa.Table, names: Mapping[str, str] | Sequence[str]) -> pa.Table:
    for name in names:
        table = table.append_column(name, pa.array(np.full(table.num_rows, MADE[name][0])))
    return table
