"""Opens one or several datasets as one, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.datasets.manifest import (
    ARRAYS,
    EPISODES,
    LENGTHS,
    LENGTHS_FILE,
    MANIFEST,
    OUTCOMES,
    SPLITS,
    Environment,
    Manifest,
    check_alike,
    joined_options,
    lengths_of,
)
from mesocosm.datasets.permutation import key, permute
from mesocosm.datasets.places import episode_rows, grouped
from mesocosm.datasets.shards import ShardArrays, load_array
from mesocosm.datasets.space_json import space_from_json
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.split import Split
from mesocosm.datasets.texts import TEXTS, stored
from mesocosm.datasets.writer import DatasetWriter, write_dataset
from mesocosm.errors import UsageError
from mesocosm.store.cache import Files, Partial

__all__ = ["Chunk", "Dataset", "DatasetWriter", "Environment", "Manifest", "write_dataset"]

Array = NDArray[Any]
CHUNK_ROWS = 1 << 16
UNUSED = 255
"""`split` of an episode that a view leaves out."""
UNIQUE = 0x5B5
"""Salt of the order in which a view takes episodes."""


@dataclass(frozen=True)
class Chunk:
    """Whole episodes in memory, one after the other: R rows, raw."""

    episodes: Array
    """[E] episode numbers"""
    arrays: dict[str, Array]
    """`manifest.ARRAYS` by name, each [R, ...]"""
    last: Array
    """[R] bool: an episode's last observation; the other rows are transitions"""


class Dataset(ShardArrays):
    """The episodes of `paths` in order, numbered 0..E-1: folders of datasets, or artifacts of which
    only the units in use are fetched and verified.

    Opening reads the manifests and `lengths.npy`. `table`, `part`, the options and their users load
    all episodes, some 60 bytes each; training reads them shard by shard (`records`).

    Raises:
        ArtifactError: A folder is no dataset or is damaged.
        UsageError: Two datasets are of different environments or spaces.
    """

    def __init__(self, paths: Sequence[str | Path | Partial]):
        if not paths:
            raise UsageError("data.datasets must name at least one dataset, got none")
        super().__init__([it if isinstance(it, Partial) else Files(Path(it)) for it in paths])
        self.paths = [files.path for files in self._files]
        for files in self._files:
            files.ahead([MANIFEST, LENGTHS_FILE])
        self.manifests = [Manifest.read(files.hold(MANIFEST).parent) for files in self._files]
        check_alike(self.paths, self.manifests)
        first = self.manifests[0]
        self.environment: Environment = first.environment
        self.observation_codec = SpaceCodec(space_from_json(first.observation_space), "observation")
        self.action_codec = SpaceCodec(space_from_json(first.action_space), "action")
        self.observation_space = self.observation_codec.space
        self.action_space = self.action_codec.space
        self.durations = all(manifest.durations for manifest in self.manifests)
        shards = [shard for manifest in self.manifests for shard in manifest.shards]
        counts = [len(manifest.shards) for manifest in self.manifests]
        self.rows_of_all = sum(shard.rows for shard in shards)
        self.shards: list[str] = [shard.name for shard in shards]
        """[S] names within their datasets; shards are numbered over all datasets"""
        self.shard_part: Array = np.repeat(np.arange(len(paths)), counts)
        """[S] which of `paths` a shard is of"""
        lengths = [load_array(files.hold(LENGTHS_FILE)).astype(LENGTHS) for files in self._files]
        for some, before in zip(lengths, np.cumsum(counts) - counts, strict=True):
            some["shard"] += before
        self.lengths: Array = np.concatenate(lengths)
        """[n] `manifest.LENGTHS`, sorted by shard"""
        self._ends: Array = np.cumsum([shard.episodes for shard in shards])
        self._starts: Array = self._ends - [shard.episodes for shard in shards]
        self.options, self._positions = joined_options(self.manifests)
        self._table: Array | None = None

    def gather(self, name: str, shards: Array, rows: Array) -> Array:
        """Like `gathered`, for one array."""
        return self.gathered(shards, {name: rows})[name]

    def gathered(self, shards: Array, rows: Mapping[str, Array]) -> dict[str, Array]:
        """Rows of several arrays, each shard held once: `shards` [K], and by array `rows` [K, ...]
        within them -> [K, ..., columns].
        """
        groups = list(grouped(shards)) or [(0, slice(None))]
        if len(groups) == 1:
            shard = groups[0][0]
            return {name: self.array(shard, name).take(at, axis=0) for name, at in rows.items()}
        self.expect(shards)
        out: dict[str, Array] = {}
        distinct = {id(at): at for at in rows.values()}
        for shard, positions in groups:
            chosen = {number: at[positions] for number, at in distinct.items()}
            for name, at in rows.items():
                values = self.array(shard, name).take(chosen[id(at)], axis=0)
                if name not in out:
                    out[name] = np.empty((*at.shape, *values.shape[at.ndim :]), values.dtype)
                out[name][positions] = values
        return out

    def records(self, shard: int) -> Array:
        """A shard's [n] `manifest.EPISODES`, in order; use any field but `shard`."""
        if self._table is not None:
            return self._table[self._starts[shard] : self._ends[shard]]
        files, _ = self._unit(shard)
        return load_array(files.hold(f"tables/{self.shards[shard]}.npy"), mapped=True)

    def shard_options(self, shard: int) -> tuple[Array, Array]:
        """Reset options of n episodes: [n, k] numbers, [n, k] positions in `ResetOption.values`."""
        if not self.options:
            count = int(self._ends[shard] - self._starts[shard])
            return np.zeros((count, 0)), np.zeros((count, 0), np.int64)
        files, _ = self._unit(shard)
        table = f"tables/{self.shards[shard]}"
        numbers = load_array(files.hold(f"{table}.task_numbers.npy"))
        values = load_array(files.hold(f"{table}.task_values.npy")).astype(np.int64)
        for column, positions in enumerate(self._positions[int(self.shard_part[shard])]):
            if positions is not None:
                values[:, column] = positions[values[:, column]]
        return numbers, values

    @property
    def table(self) -> Array:
        """[E] records of `manifest.EPISODES`; `shard` counts over all datasets."""
        if self._table is None:
            shards = range(len(self.shards))
            for shard in shards:
                self._unit(shard)[0].ahead([f"tables/{self.shards[shard]}.npy"])
            table = np.concatenate([self.records(shard) for shard in shards]).astype(EPISODES)
            table["shard"] = np.repeat(shards, self._ends - self._starts)
            self._table = table
        return self._table

    @cached_property
    def part(self) -> Array:
        """[E] which of `paths` an episode is from."""
        return np.repeat(self.shard_part, self._ends - self._starts)

    @cached_property
    def option_numbers(self) -> Array:
        """[E, k] the numbers among the reset options."""
        return np.concatenate([self.shard_options(shard)[0] for shard in range(len(self.shards))])

    @cached_property
    def option_values(self) -> Array:
        """[E, k] positions in `ResetOption.values`."""
        return np.concatenate([self.shard_options(shard)[1] for shard in range(len(self.shards))])

    @property
    def ids(self) -> list[str]:
        return [manifest.id for manifest in self.manifests]

    @property
    def transitions(self) -> int:
        return self.count()

    def episodes(self, split: Split | None = None) -> Array:
        """The episode numbers of a split (None: all), ascending, [n] int64."""
        if split is None:
            return np.arange(len(self.table))
        return np.flatnonzero(self.table["split"] == SPLITS.index(split))

    def count(self, split: Split | None = None) -> int:
        """Transitions of a split (None: all)."""
        lengths = self._lengths(split)
        return int((lengths["length"] * lengths["episodes"]).sum())

    def size(self, split: Split) -> int:
        """Episodes of a split."""
        return int(self._lengths(split)["episodes"].sum())

    def _lengths(self, split: Split | None) -> Array:
        if split is None:
            return self.lengths
        return self.lengths[self.lengths["split"] == SPLITS.index(split)]

    def unique(self, transitions: int, seed: int) -> Dataset:
        """A view with exactly this many transitions to train on: whole episodes in an order drawn
        by `seed`, the last one cut short. A smaller view of a seed lies within its larger ones;
        validation is the same. Raises UsageError where there are fewer transitions.
        """
        train = self.episodes("train")
        if not 1 <= transitions <= self.count("train"):
            limit = f"1 to {self.count('train')}, as many as {', '.join(self.ids)} has to train on"
            raise UsageError(f"the unique transitions must be {limit}, got {transitions}")
        order = train[permute(np.arange(len(train)), len(train), key(seed, UNIQUE))]
        ends = np.cumsum(self.table["length"][order])
        last = int(np.searchsorted(ends, transitions))
        table = self.table.copy()
        table["split"][order[last + 1 :]] = UNUSED
        if ends[last] > transitions:
            table["length"][order[last]] -= ends[last] - transitions
            table["outcome"][order[last]] = OUTCOMES.index("unfinished")
        view = copy(self)
        view._table, view.lengths = table, lengths_of(table)
        return view

    def chunks(self, split: Split | None = None) -> Iterator[Chunk]:
        """The split's whole episodes in order, about 64k rows at a time."""
        numbers = self.episodes(split)
        rows = self.table["length"][numbers] + 1
        bounds = np.flatnonzero(np.diff((np.cumsum(rows) - rows) // CHUNK_ROWS)) + 1
        for episodes in np.split(numbers, bounds) if len(numbers) else ():
            table = self.table[episodes]
            at, ends = episode_rows(table["first_row"], table["length"])
            last = np.zeros(len(at), bool)
            last[ends - 1] = True
            shards = np.repeat(table["shard"], table["length"] + 1)
            yield Chunk(episodes, self.gathered(shards, dict.fromkeys(ARRAYS, at)), last)
        self.turn(())

    def episode(self, number: int) -> Episode:
        """Episode `number` as it was collected: raw values of the spaces."""
        record = self.table[number]
        data = self.rows(number, int(record["length"]))
        observations = self.observation_codec.decode_stored(*stored(data, "obs"))
        actions = self.action_codec.decode_stored(*stored(data, "act", -1))
        durations = np.array(data["duration"][:-1])
        behaviours = self.manifests[int(self.part[number])].behaviours
        return Episode(
            index=int(record["index"]),
            seed=int(record["seed"]),
            behaviour=behaviours[int(record["behaviour"])].name,
            observations=self.observation_codec.unbatch(observations),
            actions=self.action_codec.unbatch(actions),
            rewards=np.array(data["reward"][:-1]),
            outcome=cast(Outcome, OUTCOMES[int(record["outcome"])]),
            durations=None if np.isnan(durations).any() else durations,
            task=self.task(number),
            success=None if record["success"] < 0 else bool(record["success"]),
        )

    def rows(self, number: int, length: int) -> dict[str, Array]:
        """The rows of the first `length` transitions of episode `number`, as they are stored:
        copies of `manifest.ARRAYS`, `texts.TEXTS` and the frames of `image_names`.
        """
        record = self.table[number]
        shard, first = int(record["shard"]), int(record["first_row"])
        rows = slice(first, first + length + 1)
        data = {name: np.array(self.plain(shard, name)[rows]) for name in ARRAYS}
        data |= {name: self.texts(shard, name)[rows] for name in TEXTS}
        return data | {name: self.images(shard, name)[rows] for name in self.image_names}

    def task(self, number: int) -> dict[str, bool | int | float | str]:
        """The reset options of episode `number`."""
        return {
            option.name: float(self.option_numbers[number, i])
            if option.values is None
            else option.values[int(self.option_values[number, i])]
            for i, option in enumerate(self.options)
        }

    def iter_episodes(self, split: Split | None = None) -> Iterator[Episode]:
        for number in self.episodes(split):
            yield self.episode(int(number))
