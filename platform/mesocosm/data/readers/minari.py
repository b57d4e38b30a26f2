"""Minari's local datasets, `minari:ID`: the package `minari` reads them (`pip install 'mesocosm[minari]'`). Pieces are ranges of episodes.

Nothing is downloaded. The spaces are those that the dataset states.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa

from mesocosm.data.readers import BATCH_ROWS, Piece
from mesocosm.data.writer import arrow
from mesocosm.errors import UsageError

PREFIX = "minari:"
PIECE_STEPS = 1 << 16


def folder(word: str) -> str:
    """Where the dataset `minari:ID` lies. Raises UsageError where the package or the dataset is missing."""
    _package(word)
    from minari.storage.datasets_root_dir import get_dataset_path

    path = Path(get_dataset_path(word.removeprefix(PREFIX))) / "data"
    if not path.is_dir():
        raise UsageError(f"{word!r} is not on this machine ({str(path)!r} is no folder); fetch it by `minari download {word.removeprefix(PREFIX)}`")
    return os.path.abspath(path)


def files(path: str) -> list[Path]:
    """What the dataset is made of, for checksums."""
    return sorted(p for p in Path(path).rglob("*") if p.is_file())


def spaces(path: str) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    dataset = _open(path)
    return dataset.observation_space, dataset.action_space


def head(path: str) -> pa.Table:
    return next(_tables(path, 0, 1))


def pieces(path: str) -> list[tuple[int, int]]:
    dataset = _open(path)
    episodes = int(dataset.total_episodes)
    each = max(1, episodes * PIECE_STEPS // max(int(dataset.total_steps), 1))
    return [(begin, min(begin + each, episodes)) for begin in range(0, episodes, each)]


def read(piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    rows = 0
    for table in _tables(piece.path, piece.begin, piece.end):
        held.append(table.select([name for name in columns if name in table.column_names]))
        rows += table.num_rows
        if rows >= BATCH_ROWS:
            yield pa.concat_tables(held)
            held, rows = [], 0
    if held:
        yield pa.concat_tables(held)


def _tables(path: str, begin: int, end: int) -> Iterator[pa.Table]:
    """One an episode: T+1 rows, the last one an observation alone."""
    dataset = _open(path)
    for episode in dataset.iterate_episodes(list(dataset.episode_indices[begin:end])):
        length = len(episode.rewards)
        last = np.arange(length + 1) == length
        yield pa.table(
            {
                "episode": pa.array(np.full(length + 1, int(episode.id))),
                "step": pa.array(np.arange(length + 1)),
                "observation": arrow(dataset.observation_space, episode.observations),
                "action": arrow(dataset.action_space, _longer(episode.actions), last),
                **{
                    name: pa.array(_longer(np.asarray(values)), mask=last)
                    for name, values in (("reward", episode.rewards), ("terminated", episode.terminations), ("truncated", episode.truncations))
                },
            }
        )


def _longer(values: Any) -> Any:
    """A batch with its last value once more."""
    if isinstance(values, dict):
        return {key: _longer(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_longer(value) for value in values)
    return [*values, *values[-1:]] if isinstance(values, list) else np.concatenate([values, values[-1:]])


def _open(path: str) -> Any:
    _package(path)
    from minari import MinariDataset

    return MinariDataset(path)


def _package(what: str) -> None:
    try:
        import minari  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{what!r} needs the package minari, which is not installed ({error}); pip install 'minari[hdf5]'") from error
