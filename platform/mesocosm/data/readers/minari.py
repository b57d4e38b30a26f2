"""Minari's datasets, `minari:ID`: the package `minari` reads them, and fetches what is not on this machine (`pip install 'mesocosm[minari]'`). Pieces
are ranges of episodes. The spaces are those that the dataset states.
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

from mesocosm.data.readers import BATCH_ROWS, Piece
from mesocosm.data.writer import arrow
from mesocosm.durable import make_folder, replace, sync_tree
from mesocosm.errors import UsageError

PREFIX = "minari:"
PIECE_STEPS = 1 << 16


def folder(word: str, fetch: bool) -> str:
    """Where the dataset `minari:ID` lies; with `fetch` it is fetched from Minari's hub (`MINARI_REMOTE`) where it is not on this machine.

    Raises UsageError where the package is missing, or the dataset is neither here nor to be had.
    """
    _package(word)
    from minari.storage.datasets_root_dir import get_dataset_path
    from minari.storage.remotes import DEFAULT_REMOTE

    id, hub = word.removeprefix(PREFIX), os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE)
    path = Path(get_dataset_path(id)) / "data"
    if not path.is_dir():
        if not fetch:
            raise UsageError(
                f"{word!r} is not on this machine; without --dry-run it is fetched from {hub}, and `minari download {id}` fetches it to look first"
            )
        try:
            _fetch(id, Path(get_dataset_path()))
        except Exception as error:  # minari's own, the hub's client's, and the network's
            said = " ".join(str(error).split())
            raise UsageError(
                f"{word!r} is neither on this machine nor to be had from {hub} ({said}); check the name and the network, or put it into {str(path.parent)!r}"
            ) from error
    return os.path.abspath(path)


def _fetch(id: str, root: Path) -> None:
    """Into a folder beside `root`, and from there by a rename each: what is in `root` is whole."""
    import minari

    root.parent.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MINARI_DATASETS_PATH")
    with tempfile.TemporaryDirectory(prefix="minari-", dir=root.parent) as arriving:
        try:
            os.environ["MINARI_DATASETS_PATH"] = arriving
            with redirect_stdout(sys.stderr):
                minari.download_dataset(id)
        finally:
            os.environ.pop("MINARI_DATASETS_PATH")
            if before is not None:
                os.environ["MINARI_DATASETS_PATH"] = before
        for data in sorted(Path(arriving).rglob("data/metadata.json")):  # of a combined dataset its parts, too
            came, to = data.parents[1], root / data.parents[1].relative_to(arriving)
            make_folder(to.parent)
            if not to.exists():
                sync_tree(came)
                replace(came, to)


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
        raise UsageError(f"{what!r} needs the package minari, which is not installed ({error}); pip install 'minari[hdf5,hf]'") from error
