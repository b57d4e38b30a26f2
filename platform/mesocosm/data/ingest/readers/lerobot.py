"""LeRobot folders of version 3: `meta/info.json` beside `data/chunk-*/file-*.parquet`, whose files
are Parquet with their own column names.

`observation.state`, `observation.environment_state` and `action` are read, `episode_index` and
`frame_index` number them. `next.reward`, `next.done`, `next.truncated` and `next.success` are read
where they are present. Images and videos are not read. A LeRobot episode has no observation after
its last action, which therefore leads nowhere.

`next.done` means terminated or truncated. With `next.truncated`, an episode is terminated where it
is done and not truncated. Without it (`done_only`), the lengths of the episodes decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mesocosm.data.ingest.readers import About, LogPiece, parquet
from mesocosm.data.ingest.readers.files import sorted_naturally
from mesocosm.errors import UsageError

INFO = "meta/info.json"
VERSION = "v3"
OBSERVATION = "observation"
STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
DONE, TRUNCATED, SUCCESS = "next.done", "next.truncated", "next.success"
NAMES = {"episode": "episode_index", "step": "frame_index", "action": "action"}
OPTIONAL = {"reward": "next.reward", "terminated": DONE, "truncated": TRUNCATED, "success": SUCCESS}
FILLED = {
    "reward": (0.0, "missing: no next.reward; 0 throughout"),
    "terminated": (False, "missing: no next.done; false throughout"),
    "truncated": (False, "missing: no next.truncated; false throughout"),
}

pieces = parquet.pieces


def data(folder: str) -> list[str]:
    """The folder's data files, in order. Raises UsageError for another version."""
    info = Path(folder) / INFO
    try:
        version = str(json.loads(info.read_text()).get("codebase_version"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{str(info)!r} cannot be read ({error}); give a whole LeRobot folder"
        ) from error
    if not version.startswith(VERSION):
        raise UsageError(
            f"{folder!r} must be a LeRobot folder of version {VERSION}, got {version}; convert it"
            " with LeRobot's converter"
        )
    paths = sorted_naturally(
        str(path) for path in (Path(folder) / "data").glob("chunk-*/file-*.parquet")
    )
    if not paths:
        raise UsageError(
            f"{folder!r} is a LeRobot folder without data/chunk-*/file-*.parquet; give a whole one"
        )
    return paths


def folder_of(path: str, names: Sequence[str]) -> str | None:
    """The LeRobot folder of a Parquet file with these columns, "" if it is not above the file.

    None if the columns are not LeRobot's.
    """
    if not {NAMES["episode"], NAMES["step"]} <= set(names):
        return None
    above = Path(path).parents
    return str(above[2]) if len(above) > 2 and (above[2] / INFO).exists() else ""


def about(path: str) -> About:
    """The columns of a data file, and what they mean."""
    names = parquet.head(path).column_names
    states = [name for name in (STATE, ENVIRONMENT) if name in names]
    observation = OBSERVATION if len(states) == 2 else (states or [STATE])[0]
    present = {standard: name for standard, name in OPTIONAL.items() if name in names}
    done_only = "terminated" in present and "truncated" not in present
    notes = {
        "terminated": f"{DONE} without {TRUNCATED}: the environment ended the episode",
        "success": "true of an episode where it is true of any of its steps",
    }
    if done_only:
        notes["terminated"] = (
            f"guess: {DONE} does not say why an episode ended; the episodes end at several"
            " lengths, so the environment ends them"
        )
    return About(
        columns={**NAMES, "observation": observation, **present},
        filled={name: how for name, (_, how) in FILLED.items() if name not in present},
        notes={name: note for name, note in notes.items() if name in present},
        # Of the observation, only the states are numbers of one shape.
        ignored={
            name: "not read"
            for name in names
            if name.startswith(f"{OBSERVATION}.") and name not in states
        },
        done_only=done_only,
        marks_success="success" in present,
    )


def head(path: str) -> pa.Table:
    return _completed(parquet.head(path), about(path).filled)


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    missing = [name for name in FILLED if name in columns]
    for table in parquet.read(piece, columns):
        yield _completed(table, missing)


def _completed(table: pa.Table, names: Iterable[str]) -> pa.Table:
    for name in names:
        table = table.append_column(name, pa.array(np.full(table.num_rows, FILLED[name][0])))
    if DONE in table.column_names and TRUNCATED in table.column_names:
        done, truncated = (table.column(name).cast(pa.bool_()) for name in (DONE, TRUNCATED))
        terminated = pc.and_not(done, truncated)
        table = table.set_column(table.column_names.index(DONE), DONE, terminated)
    return table
