"""The tasks of a served world: episodes that begin as the world draws them, or as its data did."""

from __future__ import annotations

import threading
from typing import Any

from mesocosm.data.loading.text_batch import AnyBatchCodec, TextBatchCodec, start_texts
from mesocosm.data.loading.windows import spread_episodes, start_parts
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.serve.check import shown
from mesocosm.serve.protocol import AnyStarts, batch_rows
from mesocosm.store.artifacts import Storage

GENERATED, LOGGED = "generated", "logged"
COUNT = 1 << 31
"""Generated tasks: one for each seed below it"""
MAX_LOGGED = 10_000
"""Logged starts that a world's tasks have at most, spread evenly over its data"""
MAX_LISTED = 1000
"""Tasks of one list"""


class UnknownTask(UsageError):
    """The world has no such split, or the split has no such index."""


class Tasks:
    """Tasks by split and index. Safe to call from several threads.

    Task i of `generated` is the episode of the seed i. Task i of `logged` begins like the i-th
    training episode of the world's data, which are read when they are first asked for.

    Args:
        storage: The storage of the world's data, or None without data.
        world: The world's id.
        codec: Of the world.
    """

    def __init__(self, storage: Storage | None, world: str, codec: AnyBatchCodec):
        self._storage, self._world, self._codec = storage, world, codec
        self._lock = threading.Lock()
        self._loaded: tuple[Dataset, AnyStarts] | None = None

    def splits(self) -> list[str]:
        """The names of the splits: `logged` only where the world's data are in the storage."""
        return [GENERATED, LOGGED] if self._datasets() else [GENERATED]

    def count(self, split: str) -> int:
        """The number of tasks of a split. Raises UnknownTask where it does not exist."""
        self._check(split)
        return COUNT if split == GENERATED else batch_rows(self._starts()[1][1])

    def start(self, split: str, index: int) -> AnyStarts | None:
        """(task, observation), parts [1, ...], that a task begins with; None: the world draws it.

        Raises:
            UnknownTask: The task does not exist.
        """
        count = self.count(split)
        if not 0 <= index < count:
            raise UnknownTask(f"index must be from 0 to {count - 1} in {split!r}, got {index}")
        if split == GENERATED:
            return None
        task, observation = self._starts()[1]
        return task[[index]], observation[[index]]

    def episode(self, index: int) -> Episode:
        """The logged episode whose beginning is task `index` of `logged`. Raises UnknownTask."""
        self.start(LOGGED, index)
        dataset = self._starts()[0]
        return dataset.episode(int(spread_episodes(dataset, "train", MAX_LOGGED)[index]))

    def listed(self, split: str, start: int | None, stop: int | None) -> list[dict[str, Any]]:
        """The tasks from `start` to `stop` as a slice has them, of which the first MAX_LISTED. Each
        is the arguments of a reset.
        """
        rows = range(self.count(split))[start:stop][:MAX_LISTED]
        return [{"split": split, "index": index} for index in rows]

    def _check(self, split: str) -> None:
        names = self.splits()
        if split in names:
            return
        fix = f"got {shown(split)}{nearest(str(split), names)}"
        if split == LOGGED:
            fix = "got 'logged', whose data the storage of this server does not have"
        raise UnknownTask(f"split must be one of {', '.join(names)}, {fix}")

    def _datasets(self) -> list[str]:
        """The ids of the datasets that the world was trained on and that the storage has."""
        if self._storage is None:
            return []
        try:
            world = self._storage.artifact("worlds", self._world)
            names = world.meta.get("inputs", {}).get("datasets", [])
            return [self._storage.artifact("datasets", name).id for name in names]
        except MesocosmError:
            return []

    def _starts(self) -> tuple[Dataset, AnyStarts]:
        """The data, and the starts of its training episodes."""
        with self._lock:
            if self._loaded is None:
                storage, codec = self._storage, self._codec
                assert storage is not None
                names = self._datasets()
                dataset = Dataset([storage.artifact("datasets", name).path for name in names])
                starts: AnyStarts
                if isinstance(codec, TextBatchCodec):
                    starts = start_texts(dataset, codec.codec, "train", MAX_LOGGED)
                else:
                    starts = start_parts(dataset, codec, "train", MAX_LOGGED)
                self._loaded = dataset, starts
            return self._loaded
