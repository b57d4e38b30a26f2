"""Measures episodes where their shards lie, memory-mapped: in this process, or in tasks of Ray Data
that are told which episodes, not given them.

Episodes are cut into the same pieces and the results put together in the same order whoever
measures, so that the results are the same too.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.config import RayConfig
from mesocosm.data.format.dataset import Dataset
from mesocosm.store.artifacts import Storage

Array = NDArray[Any]
ROWS, EPISODES = 1 << 16, 2048
"""A piece is closed at whichever comes first: what a task holds at a time."""
MANY = 1 << 28
"""Bytes of data from which on all CPUs are used, unless `workers` says otherwise."""


@dataclass(frozen=True)
class Piece:
    """Episodes, by where they lie: each array [e]."""

    shards: Array
    first: Array
    length: Array
    """Transitions; the episode has one row more"""

    def at(self, steps: Array) -> Array:
        """Rows within the shards of `steps` [e, k]."""
        return np.asarray(self.first[:, None] + steps)


class Rows:
    """The T+1 rows of each episode of a piece, one episode after the other: R rows."""

    def __init__(self, dataset: Dataset, piece: Piece):
        self._dataset = dataset
        rows = piece.length + 1
        ends = np.cumsum(rows)
        self.starts: Array = ends - rows
        """[e] the row at which an episode begins"""
        self.lengths: Array = piece.length
        self.last: Array = np.zeros(int(ends[-1]), bool)
        """[R] an observation that no action follows"""
        self.last[ends - 1] = True
        self._at = np.arange(len(self.last)) + np.repeat(piece.first - self.starts, rows)
        self._shards = np.repeat(piece.shards, rows)

    def __getitem__(self, name: str) -> Array:
        """[R, ...] of one of `manifest.ARRAYS`"""
        return self._dataset.gather(name, self._shards, self._at)


Measure = Callable[[Dataset, Piece], dict[str, Array]]
"""What is measured of a piece, by name; the pieces' arrays are joined along their first axis. It is
sent to other processes: a function of a module.
"""


@dataclass(frozen=True)
class Scan:
    dataset: Dataset
    root: str
    """`storage.root`, where a worker on another machine finds the datasets"""
    ids: tuple[str, ...]
    workers: int
    """Tasks of Ray Data at a time; 0 measures in this process"""
    ray: RayConfig
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with pieces measured, and how many there are."""

    def __call__(self, measure: Measure, episodes: Array, lengths: Array) -> dict[str, Array]:
        """`measure` of episodes [n] of `dataset`, of which the first `lengths` [n] transitions
        count, n at least 1.
        """
        made = list(pieces(self.dataset, episodes, lengths))
        found = []
        for result in self._results(measure, made):
            found.append(result)
            self.progress(len(found), len(made))
        return {name: np.concatenate([result[name] for result in found]) for name in found[0]}

    def _results(self, measure: Measure, made: Sequence[Piece]) -> Iterator[dict[str, Array]]:
        if not self.workers:
            for piece in made:
                yield measure(self.dataset, piece)
            return
        import logging

        import ray
        import ray.data  # sets up its own logging, so it comes before the level

        from mesocosm.cluster import ray_session

        ray_session.ensure(self.ray)
        ray_session.preflight(cpus=self.workers, what=f"workers={self.workers}")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        shared = ray.put((measure, made, self.root, self.ids, tuple(map(str, self.dataset.paths))))

        def run(rows: dict[str, Array]) -> dict[str, Array]:
            measure, made, root, ids, paths = ray.get(shared)
            dataset = opened(root, ids, paths)
            out = np.empty(len(rows["id"]), object)
            out[:] = [
                pickle.dumps(measure(dataset, made[number]), protocol=5) for number in rows["id"]
            ]
            return {"result": out}

        with ray.data.DataContext.current(context):
            data = ray.data.range(len(made), override_num_blocks=len(made))
            results = data.map_batches(
                run,
                batch_size=1,
                batch_format="numpy",
                compute=ray.data.TaskPoolStrategy(size=min(self.workers, len(made))),
            )
            for row in results.iter_rows():
                yield pickle.loads(
                    row["result"]
                )  # of `run` above, in this very job: nothing that was read from a file


@functools.cache
def opened(root: str, ids: tuple[str, ...], paths: tuple[str, ...]) -> Dataset:
    """In a worker, once a process: the datasets as they lie here, fetched and verified first where
    storage is remote.
    """
    storage = Storage(root)
    return Dataset(
        [storage.artifact("datasets", id).path for id in ids] if storage.remote else paths
    )


def pieces(dataset: Dataset, episodes: Array, lengths: Array) -> Iterator[Piece]:
    table = dataset.table
    ends = np.cumsum(lengths + 1)
    start = 0
    while start < len(episodes):
        base = int(ends[start - 1]) if start else 0
        stop = min(
            max(int(np.searchsorted(ends, base + ROWS, "right")), start + 1), start + EPISODES
        )
        some = episodes[start:stop]
        yield Piece(
            table["shard"][some].astype(np.int64),
            table["first_row"][some].astype(np.int64),
            lengths[start:stop].astype(np.int64),
        )
        start = stop


def size(dataset: Dataset) -> int:
    """Bytes of the shards."""
    return sum(
        os.stat(file).st_size for path in dataset.paths for file in path.glob("shards/*/*.npy")
    )
