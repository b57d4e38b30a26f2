"""Minari's datasets, `minari:ID`, read and downloaded by the package `minari`.

Pieces are ranges of episodes. The spaces are those that the dataset states.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
from gymnasium import spaces

from mesocosm.data.ingest.frames import frame_array
from mesocosm.data.ingest.readers import BATCH_BYTES, BATCH_ROWS, PROBLEM, About, LogPiece
from mesocosm.datasets.images import is_image
from mesocosm.datasets.leaf import children
from mesocosm.datasets.parquet import arrow, without_images
from mesocosm.errors import UsageError
from mesocosm.store.files import make_folder, replace, sync_tree

PREFIX = "minari:"
PIECE_STEPS = 1 << 16


def folder(word: str, fetch: bool) -> str:
    """The folder of the dataset `minari:ID`.

    Args:
        fetch: Download a dataset that is not on this machine from Minari's hub (`MINARI_REMOTE`).

    Raises:
        UsageError: The package is missing, or the dataset is neither here nor on the hub.
    """
    try:
        from minari.storage.datasets_root_dir import get_dataset_path
        from minari.storage.remotes import DEFAULT_REMOTE
    except ImportError as error:
        raise UsageError(
            f"{word!r} needs the package minari, which is not installed ({error}); pip install"
            " 'minari[hdf5,hf]'"
        ) from error

    id, hub = word.removeprefix(PREFIX), os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE)
    path = Path(get_dataset_path(id)) / "data"
    if not path.is_dir():
        if not fetch:
            raise UsageError(
                f"{word!r} is not on this machine; leave --dry-run out to download it from {hub},"
                f" or run `minari download {id}`"
            )
        try:
            _fetch(id, Path(get_dataset_path()))
        except Exception as error:  # minari's own, the hub's client's, and the network's
            raise UsageError(
                f"{word!r} is not on this machine and cannot be downloaded from {hub}"
                f" ({' '.join(str(error).split())}); check the name and the network, or put it into"
                f" {str(path.parent)!r}"
            ) from error
    return os.path.abspath(path)


def _fetch(id: str, root: Path) -> None:
    """Download into a folder beside `root`, then rename: datasets in `root` are always whole."""
    import minari

    root.parent.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MINARI_DATASETS_PATH")
    with tempfile.TemporaryDirectory(prefix="minari-", dir=root.parent) as download:
        try:
            os.environ["MINARI_DATASETS_PATH"] = download
            with redirect_stdout(sys.stderr):
                minari.download_dataset(id)
        finally:
            os.environ.pop("MINARI_DATASETS_PATH")
            if before is not None:
                os.environ["MINARI_DATASETS_PATH"] = before
        # A combined dataset includes its parts.
        for metadata in sorted(Path(download).rglob("data/metadata.json")):
            source = metadata.parents[1]
            target = root / source.relative_to(download)
            make_folder(target.parent)
            if not target.exists():
                sync_tree(source)
                replace(source, target)


def about(path: str) -> About:
    """The dataset's own spaces, and its files."""
    dataset = _open(path)
    files = sorted(str(p) for p in Path(path).rglob("*") if p.is_file())
    return About(spaces=(dataset.observation_space, dataset.action_space), files=files)


def head(path: str) -> pa.Table:
    """The first readable episode with a step. Raises UsageError if there is none."""
    problem = None
    for begin, end in pieces(path):
        for table in _tables(path, begin, end):
            if "action" in table.column_names:
                return table
            if PROBLEM in table.column_names:
                problem = problem or table.column(PROBLEM)[0].as_py()
    raise UsageError(
        f"no episode of the Minari dataset in {path!r} can be read: {problem or 'it has none'}"
    )


def pieces(path: str) -> list[tuple[int, int]]:
    dataset = _open(path)
    episodes = int(dataset.total_episodes)
    each = max(1, episodes * PIECE_STEPS // max(int(dataset.total_steps), 1))
    return [(begin, min(begin + each, episodes)) for begin in range(0, episodes, each)]


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    tables: list[pa.Table] = []
    for table in _tables(piece.path, piece.begin, piece.end):
        names = [name for name in (*columns, PROBLEM) if name in table.column_names]
        tables.append(table.select(names))
        size = sum(table.nbytes for table in tables)
        if sum(map(len, tables)) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield pa.concat_tables(tables, promote_options="default")
            tables = []
    if tables:
        yield pa.concat_tables(tables, promote_options="default")


def _tables(path: str, begin: int, end: int) -> Iterator[pa.Table]:
    """One table per episode: T+1 rows, the last one an observation alone.

    An episode that cannot be read has rows with PROBLEM.
    """
    dataset = _open(path)
    for index in dataset.episode_indices[begin:end]:
        number, rows = int(index), 1
        try:
            (episode,) = dataset.iterate_episodes([index])
            rows = max(len(episode.rewards), 1)
            table = _table(episode, dataset)
        except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            # Of minari, h5py and Arrow.
            texts = [f"cannot be read ({' '.join(str(error).split())})"] + [None] * (rows - 1)
            table = pa.table({"episode": [number] * rows, "step": range(rows), PROBLEM: texts})
        yield table


def _table(episode: Any, dataset: Any) -> pa.Table:
    """Raises ValueError where T rewards do not come with T actions and T+1 observations."""
    length = len(episode.rewards)
    parts = {
        "observation": _observations(dataset.observation_space, episode.observations),
        "action": arrow(dataset.action_space, episode.actions),
        "reward": pa.array(np.asarray(episode.rewards)),
        "terminated": pa.array(np.asarray(episode.terminations)),
        "truncated": pa.array(np.asarray(episode.truncations)),
    }
    columns = {"episode": pa.array([int(episode.id)] * (length + 1))}
    columns["step"] = pa.array(range(length + 1))
    for name, values in parts.items():
        expected = length + (name == "observation")
        if len(values) != expected:
            raise ValueError(
                f"{name} must have {expected} entries for {length} rewards, got {len(values)}"
            )
        if name == "observation":
            columns[name] = values
        elif length:
            columns[name] = pa.concat_arrays([values, pa.nulls(1, values.type)])
    return pa.table(columns)


def _observations(space: gymnasium.Space[Any], batch: Any) -> pa.Array:
    """Observations as a nested Arrow array, whose images are the values of their frames."""
    if is_image(space):
        return frame_array(raw=[frame.tobytes() for frame in np.asarray(batch, space.dtype)])
    if isinstance(space, spaces.Dict | spaces.Tuple) and without_images(space) is not space:
        parts = [_observations(child, batch[key]) for key, child in children(space)]
        return pa.StructArray.from_arrays(parts, [str(key) for key, _ in children(space)])
    return arrow(space, batch)


def _open(path: str) -> Any:
    from minari import MinariDataset

    return MinariDataset(path)
