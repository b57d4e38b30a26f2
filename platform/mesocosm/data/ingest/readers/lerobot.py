"""LeRobot folders of versions 2 and 3: `meta/info.json`, and Parquet files below `data/`.

`observation.state`, `observation.environment_state` and `action` are read, `episode_index` and
`frame_index` number them. `next.reward`, `next.done`, `next.truncated` and `next.success` are read
where they are present. So are cameras: pictures within the Parquet files, and videos
(`lerobot_cameras`). A LeRobot episode has no observation after its last action, which therefore
leads nowhere.

`next.done` means terminated or truncated. With `next.truncated`, an episode is terminated where it
is done and not truncated. Without it (`done_only`), the lengths of the episodes decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mesocosm.data.ingest.readers import PROBLEM, About, LogPiece, parquet
from mesocosm.data.ingest.readers.files import sorted_naturally
from mesocosm.data.ingest.readers.lerobot_cameras import INFO, Cameras, read_info
from mesocosm.errors import UsageError

VERSIONS = {"v2": "episode_*.parquet", "v3": "file-*.parquet"}
"""The versions that are read, and their files in data/chunk-*."""
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
    version = str(read_info(folder).get("codebase_version"))
    pattern = VERSIONS.get(version[:2])
    if pattern is None:
        raise UsageError(
            f"{folder!r} must be a LeRobot folder of version {' or '.join(VERSIONS)}, got"
            f" {version}; convert it with LeRobot's converter"
        )
    paths = sorted_naturally(str(path) for path in (Path(folder) / "data").glob("chunk-*/*"))
    paths = [path for path in paths if Path(path).match(pattern)]
    if not paths:
        raise UsageError(
            f"{folder!r} is a LeRobot folder without data/chunk-*/{pattern}; give a whole one"
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
    names, cameras = parquet.head(path).column_names, Cameras(path)
    shown = [name for name in cameras.keys if name.startswith(f"{OBSERVATION}.")]
    parts = [*(name for name in (STATE, ENVIRONMENT) if name in names), *shown]
    observation = OBSERVATION if len(parts) > 1 else (parts or [STATE])[0]
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
        # Of the observation, only the states and cameras are arrays of one shape.
        ignored={
            name: "not read"
            for name in names
            if name.startswith(f"{OBSERVATION}.") and name not in parts
        },
        done_only=done_only,
        marks_success="success" in present,
        files=[path, *cameras.files()] if cameras.keys else None,
    )


def head(path: str) -> pa.Table:
    cameras = Cameras(path)
    table, _ = cameras.add(parquet.head(path), cameras.videos)
    return _completed(table, about(path).filled)


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    missing = [name for name in FILLED if name in columns]
    cameras = Cameras(piece.path)
    videos = [key for key in cameras.videos if key in columns]
    needed = [name for name in cameras.needed(videos) if name not in columns]
    for table in parquet.read(piece, [*columns, *needed]):
        table, problems = cameras.add(table, videos)
        yield _completed(table.drop_columns(needed), missing, problems)


def _completed(table: pa.Table, names: Iterable[str], problems: pa.Array | None = None) -> pa.Table:
    for name in names:
        table = table.append_column(name, pa.array(np.full(table.num_rows, FILLED[name][0])))
    if DONE in table.column_names and TRUNCATED in table.column_names:
        done, truncated = (table.column(name).cast(pa.bool_()) for name in (DONE, TRUNCATED))
        terminated = pc.and_not(done, truncated)
        table = table.set_column(table.column_names.index(DONE), DONE, terminated)
    return table if problems is None else table.append_column(PROBLEM, problems)
