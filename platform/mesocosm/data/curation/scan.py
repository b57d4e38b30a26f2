"""Measures episodes from the memory-mapped shards, in this process or in tasks of Ray Data.

Tasks receive the numbers of episodes and read the shards. Pieces and the order of results do not
depend on where they are measured, so the results do not either.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.config import RayConfig
from mesocosm.data.parallel import ordered
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.places import episode_rows
from mesocosm.store.artifacts import Storage

Array = NDArray[Any]
ROWS, EPISODES = 1 << 16, 2048
"""A piece is closed at whichever comes first; a task holds one piece."""


@dataclass(frozen=True)
class EpisodePiece:
    """The places of episodes: each array [e]."""

    shards: Array
    first: Array
    """First row within the shard"""
    length: Array
    """Transitions; the episode has one row more"""

    @staticmethod
    def of(dataset: Dataset, episodes: Array, lengths: Array) -> EpisodePiece:
        table = dataset.table[episodes]
        columns = table["shard"], table["first_row"], lengths
        return EpisodePiece(*(column.astype(np.int64) for column in columns))


class Rows:
    """The T+1 rows of each episode of a piece, one episode after the other: R rows."""

    def __init__(self, dataset: Dataset, piece: EpisodePiece):
        self._dataset = dataset
        self._at, ends = episode_rows(piece.first, piece.length)
        self._shards = np.repeat(piece.shards, piece.length + 1)
        self.lengths: Array = piece.length
        self.starts: Array = ends - piece.length - 1
        """[e] the row at which an episode begins"""
        self.last: Array = np.zeros(len(self._at), bool)
        """[R] an observation that no action follows"""
        self.last[ends - 1] = True

    def __getitem__(self, name: str) -> Array:
        """[R, ...] of one of `manifest.ARRAYS`."""
        return self._dataset.gather(name, self._shards, self._at)


Measure = Callable[[Dataset, EpisodePiece], dict[str, Array]]
"""Measures a piece, by name. The pieces' arrays are joined along their first axis."""


@dataclass(frozen=True)
class Scan:
    """Measures episodes of `dataset`."""

    dataset: Dataset
    root: str
    """`storage.root`, where a worker on another machine reads the datasets."""
    workers: int
    """Tasks of Ray Data at a time; 0 measures in this process."""
    ray: RayConfig
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with the pieces measured so far, and all of them."""

    def __call__(self, measure: Measure, episodes: Array, lengths: Array) -> dict[str, Array]:
        """Measure episodes.

        Args:
            measure: A function of a module, so that it can be sent to other processes.
            episodes: [n] of `dataset`, at least one.
            lengths: [n] the transitions of each that count.
        """
        pieces = list(_pieces(self.dataset, episodes, lengths))
        ids, paths = tuple(self.dataset.ids), tuple(map(str, self.dataset.paths))
        root, here = self.root, None if self.workers else self.dataset

        def measured(piece: EpisodePiece) -> Iterator[dict[str, Array]]:
            yield measure(_opened(root, ids, paths) if here is None else here, piece)

        results = []
        for result in ordered(measured, pieces, self.workers, self.ray):
            results.append(result)
            self.progress(len(results), len(pieces))
        return {name: np.concatenate([r[name] for r in results]) for name in results[0]}


@functools.cache
def _opened(root: str, ids: tuple[str, ...], paths: tuple[str, ...]) -> Dataset:
    """In a worker, once a process: the datasets, fetched and verified where storage is remote."""
    storage = Storage(root)
    if storage.remote:
        return Dataset([storage.artifact("datasets", id).path for id in ids])
    return Dataset(paths)


def _pieces(dataset: Dataset, episodes: Array, lengths: Array) -> Iterator[EpisodePiece]:
    ends = np.cumsum(lengths + 1)
    start = 0
    while start < len(episodes):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + ROWS, "right")), start + 1)
        some = slice(start, min(stop, start + EPISODES))
        yield EpisodePiece.of(dataset, episodes[some], lengths[some])
        start = some.stop


def size(dataset: Dataset) -> int:
    """Bytes of the shards."""
    files = [file for path in dataset.paths for file in path.glob("shards/*/*")]
    return sum(os.stat(file).st_size for file in files)
