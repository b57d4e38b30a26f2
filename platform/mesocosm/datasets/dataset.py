"""Opens one or several datasets as one, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.datasets.images import ImageRows, image_names
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
from mesocosm.datasets.slots import IN_MEMORY, SlotRows
from mesocosm.datasets.space_json import space_from_json
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.texts import FILE, TEXTS, TextRows, read_texts, stored
from mesocosm.datasets.writer import DatasetWriter, write_dataset
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.store.cache import Files, Partial

__all__ = ["Chunk", "Dataset", "DatasetWriter", "Environment", "Manifest", "Split", "write_dataset"]

Array = NDArray[Any]
Split = Literal["train", "valid"]
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


class Dataset:
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
        self._files = [it if isinstance(it, Partial) else Files(Path(it)) for it in paths]
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
        self._rows = sum(shard.rows for shard in shards)
        self.shards: list[str] = [shard.name for shard in shards]
        """[S] names within their datasets; shards are numbered over all datasets"""
        self.shard_part: Array = np.repeat(np.arange(len(paths)), counts)
        """[S] which of `paths` a shard is of"""
        lengths = [_load(files.hold(LENGTHS_FILE)).astype(LENGTHS) for files in self._files]
        for some, before in zip(lengths, np.cumsum(counts) - counts, strict=True):
            some["shard"] += before
        self.lengths: Array = np.concatenate(lengths)
        """[n] `manifest.LENGTHS`, sorted by shard"""
        self._ends: Array = np.cumsum([shard.episodes for shard in shards])
        self._starts: Array = self._ends - [shard.episodes for shard in shards]
        self.options, self._positions = joined_options(self.manifests)
        self._table: Array | None = None
        # A view (`unique`) shares these.
        self._open: dict[int, tuple[Path, dict[str, Array]]] = {}
        """The folder and the mapped arrays of each shard that is held."""
        self._pinned: set[int] = set()

    def _unit(self, shard: int) -> tuple[Files, str]:
        return self._files[int(self.shard_part[shard])], f"shards/{self.shards[shard]}"

    def shard_bytes(self, shard: int) -> int:
        files, unit = self._unit(shard)
        return files.bytes(unit)

    @property
    def most(self) -> int | None:
        """Bytes of shards that may be on this machine; None: any number."""
        return min((files.most for files in self._files if files.most is not None), default=None)

    def turn(self, now: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """Hold only the shards `now`, which are read, and `ahead`, which are fetched meanwhile."""
        pinned = list(dict.fromkeys([*now, *ahead]))
        self._release((set(self._open) | self._pinned) - set(pinned))
        self._pinned.clear()
        self._pinned.update(pinned)
        self._fetch(pinned)

    def expect(self, shards: Array) -> None:
        """Begin to fetch and verify the next shards to be read, where there is room for all."""
        if self.most is None:
            self._fetch(shard for shard in np.unique(shards).tolist() if shard not in self._open)

    def _fetch(self, shards: Iterable[int]) -> None:
        for files, unit in map(self._unit, shards):
            files.ahead([unit])

    def _release(self, shards: Iterable[int]) -> None:
        for shard in list(shards):
            self._open.pop(shard, None)
            files, unit = self._unit(shard)
            files.release([unit])

    def array(self, shard: int, name: str) -> Array:
        """One of a shard's `manifest.ARRAYS`, `texts.TEXTS` or `image_names`, memory-mapped. Texts,
        categories with slots of texts, and frames are decoded where they are read. Raises
        ArtifactError where it is missing or damaged.
        """
        if name in self.image_names:
            return self.images(shard, name)  # type: ignore[return-value]
        codec = self.observation_codec if name.startswith("obs") else self.action_codec
        if name in TEXTS:
            return self.texts(shard, name)  # type: ignore[return-value]
        if not name.endswith("_cat") or not codec.text_leaves:
            return self.plain(shard, name)
        arrays, full_name = self._hold(shard)[1], f"{name} with slots"
        if full_name not in arrays:
            texts = self.texts(shard, name.replace("cat", "text"))
            slots = SlotRows(self.plain(shard, name), texts, codec.cardinalities, codec.slots)
            small = self._rows * codec.categories <= IN_MEMORY
            arrays[full_name] = slots.whole() if small else slots  # type: ignore[assignment]
        return arrays[full_name]

    def texts(self, shard: int, name: str) -> TextRows:
        """The texts of a shard's observations (`obs_text`) or actions (`act_text`)."""
        folder, arrays = self._hold(shard)
        if name not in arrays:
            count = len(self.observation_codec.text_leaves)
            columns: list[Any] = []
            if count or self.action_codec.text_leaves:
                columns = read_texts(folder / FILE)
            columns = columns[:count] if name == "obs_text" else columns[count:]
            rows = len(self.plain(shard, "reward"))
            arrays[name] = TextRows(columns, rows)  # type: ignore[assignment]
        return arrays[name]  # type: ignore[return-value]

    @cached_property
    def image_names(self) -> list[str]:
        """The names of the observation's images among the arrays."""
        return image_names(len(self.observation_codec.image_leaves))

    def images(self, shard: int, name: str) -> ImageRows:
        """The frames of one of `image_names` in a shard."""
        folder, arrays = self._hold(shard)
        if name not in arrays:
            leaf = self.observation_codec.image_leaves[self.image_names.index(name)]
            rows = len(self.plain(shard, "reward"))
            arrays[name] = ImageRows.open(folder, name, rows, leaf.space)  # type: ignore[assignment]
        return arrays[name]  # type: ignore[return-value]

    def plain(self, shard: int, name: str) -> Array:
        """A shard's array as it is stored: its categories hold no slots of texts."""
        folder, arrays = self._hold(shard)
        if name not in arrays:
            arrays[name] = _load(folder / f"{name}.npy", mapped=True)
        return arrays[name]

    def _hold(self, shard: int) -> tuple[Path, dict[str, Array]]:
        """A shard's folder, and its arrays that are mapped already."""
        if shard not in self._open:
            if self.most is not None and shard not in self._pinned:
                # Hold one unpinned shard at a time, so that random reads need no further room.
                self._release(set(self._open) - self._pinned)
            files, unit = self._unit(shard)
            self._open[shard] = files.hold(unit), {}
        return self._open[shard]

    def gather(self, name: str, shards: Array, rows: Array) -> Array:
        """As `gathered`, of one array."""
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
        return _load(files.hold(f"tables/{self.shards[shard]}.npy"), mapped=True)

    def shard_options(self, shard: int) -> tuple[Array, Array]:
        """Reset options of n episodes: [n, k] numbers, [n, k] positions in `ResetOption.values`."""
        if not self.options:
            count = int(self._ends[shard] - self._starts[shard])
            return np.zeros((count, 0)), np.zeros((count, 0), np.int64)
        files, _ = self._unit(shard)
        table = f"tables/{self.shards[shard]}"
        numbers = _load(files.hold(f"{table}.task_numbers.npy"))
        values = _load(files.hold(f"{table}.task_values.npy")).astype(np.int64)
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
        """Episode numbers of a split (None: all), ascending, [n] int64."""
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


def _load(path: Path, mapped: bool = False) -> Array:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        fix = "collect the data again, or restore it from a copy"
        raise ArtifactError(f"{str(path)!r} is missing or damaged ({error}); {fix}") from error
    return np.asarray(array)
