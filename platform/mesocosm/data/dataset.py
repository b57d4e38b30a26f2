"""Opens one or several datasets as one, memory-mapped: opening reads the episode tables only, whatever the datasets' size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.episode import Episode, Outcome
from mesocosm.data.manifest import ARRAYS, EPISODES, OUTCOMES, SPLITS, Environment, Manifest, TaskOption
from mesocosm.data.permutation import key, permute
from mesocosm.data.spaces import SpaceCodec, space_from_json
from mesocosm.data.writer import DatasetWriter, sort_key, write_dataset
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.spec import Parts

if TYPE_CHECKING:
    from mesocosm.data.codec import Codec

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
    """The episodes of `paths` (folders of datasets) in order, numbered 0..E-1.

    Raises ArtifactError where a folder is no dataset or is damaged, UsageError where two are of different environments or spaces.
    """

    def __init__(self, paths: Sequence[str | Path]):
        if not paths:
            raise UsageError("no dataset was given; name at least one in data.datasets")
        self.paths = [Path(path) for path in paths]
        self.manifests = [Manifest.read(path) for path in self.paths]
        first = self.manifests[0]
        for path, other in zip(self.paths[1:], self.manifests[1:], strict=True):
            for field, a, b, fix in _facts(first, other):
                if a != b:
                    raise UsageError(f"datasets {str(self.paths[0])!r} and {str(path)!r} differ in {field}: {a} and {b}; {fix}")
        ids = [manifest.id for manifest in self.manifests]
        if len(set(ids)) < len(ids):
            raise UsageError(f"the same dataset is given twice: {', '.join(ids)}; name each once")
        self.environment: Environment = first.environment
        self.observation_codec = SpaceCodec(space_from_json(first.observation_space), "observation")
        self.action_codec = SpaceCodec(space_from_json(first.action_space), "action")
        self.observation_space = self.observation_codec.space
        self.action_space = self.action_codec.space
        self.durations = all(manifest.durations for manifest in self.manifests)
        self._folders: list[Path] = []
        self._open: dict[tuple[int, str], Array] = {}
        tables = []
        for path, manifest in zip(self.paths, self.manifests, strict=True):
            table = _load(path / "episodes.npy").astype(EPISODES)
            table["shard"] += len(self._folders)
            self._folders += [path / "shards" / shard.name for shard in manifest.shards]
            tables.append(table)
        self.table: Array = np.concatenate(tables)
        """[E] records of `manifest.EPISODES`; `shard` counts over all datasets"""
        self.part: Array = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        """[E] which of `paths` an episode is from"""
        self.options, self.option_numbers, self.option_values = self._read_options()

    def _read_options(self) -> tuple[list[TaskOption], Array, Array]:
        """The reset options of the task: what they are, [E, k] numbers, and [E, k] positions in `TaskOption.values`."""
        options = []
        names = [option.name for option in self.manifests[0].task_options]
        count = len(self.table)
        numbers, values = np.zeros((count, len(names))), np.zeros((count, len(names)), np.int64)
        if not names:
            return [], numbers, values
        for part, path in enumerate(self.paths):
            numbers[self.part == part] = _load(path / "task_numbers.npy")
            values[self.part == part] = _load(path / "task_values.npy")
        for column, name in enumerate(names):
            seen = [manifest.task_options[column].values for manifest in self.manifests]
            if any(v is None for v in seen) and not all(v is None for v in seen):
                raise UsageError(f"the reset option {name!r} is a number in one dataset and a choice in another; collect both alike")
            if seen[0] is None:
                options.append(TaskOption(name=name))
                continue
            union = sorted({value for some in seen for value in some or ()}, key=sort_key)
            position = {value: i for i, value in enumerate(union)}
            for part, some in enumerate(seen):
                positions = np.array([position[value] for value in some or ()], np.int64)
                rows = self.part == part
                values[rows, column] = positions[values[rows, column]]
            options.append(TaskOption(name=name, values=union))
        return options, numbers, values

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def ids(self) -> list[str]:
        return [manifest.id for manifest in self.manifests]

    @property
    def transitions(self) -> int:
        """All transitions, of both splits."""
        return int(self.table["length"].sum())

    def episodes(self, split: Split | None = None) -> Array:
        """Episode numbers of a split (None: all), ascending, [n] int64."""
        return np.arange(len(self.table)) if split is None else np.flatnonzero(self.table["split"] == SPLITS.index(split))

    def count(self, split: Split | None = None) -> int:
        """Transitions of a split (None: all)."""
        return int(self.table["length"][self.episodes(split)].sum())

    def unique(self, transitions: int, seed: int) -> Dataset:
        """The same files with exactly so many transitions in the training split: whole episodes in an order that `seed` draws, the last one
        cut short. A smaller view of a seed lies within its larger ones; validation is the same. Raises UsageError where there are fewer."""
        train = self.episodes("train")
        if not 1 <= transitions <= self.count("train"):
            raise UsageError(f"{transitions} unique transitions of {', '.join(self.ids)}, which has {self.count('train')} to train on; ask for 1 to that many")
        order = train[permute(np.arange(len(train)), len(train), key(seed, UNIQUE))]
        ends = np.cumsum(self.table["length"][order])
        kept = int(np.searchsorted(ends, transitions)) + 1
        view = copy(self)
        view.table = self.table.copy()
        view.table["split"][order[kept:]] = UNUSED
        if (over := int(ends[kept - 1]) - transitions) > 0:
            view.table["length"][order[kept - 1]] -= over
            view.table["outcome"][order[kept - 1]] = OUTCOMES.index("unfinished")
        return view

    # -- rows ----------------------------------------------------------------------------------------------------

    def array(self, shard: int, name: str) -> Array:
        """A shard's memory-mapped array. Raises ArtifactError where it is missing or damaged."""
        found = self._open.get((shard, name))
        if found is None:
            found = self._open[shard, name] = _load(self._folders[shard] / f"{name}.npy", mapped=True)
        return found

    def gather(self, name: str, shards: Array, rows: Array) -> Array:
        """Rows of one array: `shards` [K], `rows` [K, ...] within them -> [K, ..., columns]. One read a shard, no loop over rows."""
        first = int(shards[0]) if len(shards) else 0
        if len(self._folders) == 1 or (shards == first).all():
            return self.array(first, name).take(rows, axis=0)
        distinct, inverse = np.unique(shards, return_inverse=True)
        out = None
        for position, shard in enumerate(distinct):
            here = inverse == position
            values = self.array(int(shard), name).take(rows[here], axis=0)
            if out is None:
                out = np.empty((*rows.shape, *values.shape[rows.ndim :]), values.dtype)
            out[here] = values.astype(out.dtype, copy=False)
        assert out is not None
        return out

    def chunks(self, split: Split | None = None) -> Iterator[Chunk]:
        """The split's whole episodes in order, about 64k rows at a time."""
        numbers = self.episodes(split)
        rows = self.table["length"][numbers] + 1
        groups = (np.cumsum(rows) - rows) // CHUNK_ROWS
        for episodes in np.split(numbers, np.flatnonzero(np.diff(groups)) + 1) if len(numbers) else []:
            lengths = self.table["length"][episodes] + 1
            ends = np.cumsum(lengths)
            at = np.arange(ends[-1]) + np.repeat(self.table["first_row"][episodes] - (ends - lengths), lengths)
            shards = np.repeat(self.table["shard"][episodes], lengths)
            last = np.zeros(len(at), bool)
            last[ends - 1] = True
            yield Chunk(episodes, {name: self.gather(name, shards, at) for name in ARRAYS}, last)

    # -- episodes ------------------------------------------------------------------------------------------------

    def episode(self, number: int) -> Episode:
        """Episode `number` as it was collected: raw values of the spaces."""
        record = self.table[number]
        rows = slice(int(record["first_row"]), int(record["first_row"] + record["length"] + 1))
        data = {name: self.array(int(record["shard"]), name)[rows] for name in ARRAYS}
        manifest = self.manifests[int(self.part[number])]
        durations = data["duration"][:-1]
        return Episode(
            index=int(record["index"]),
            seed=int(record["seed"]),
            behaviour=manifest.behaviours[int(record["behaviour"])].name,
            observations=self.observation_codec.unbatch(self.observation_codec.decode(data["obs_num"], data["obs_cat"])),
            actions=self.action_codec.unbatch(self.action_codec.decode(data["act_num"][:-1], data["act_cat"][:-1])),
            rewards=np.array(data["reward"][:-1]),
            outcome=cast(Outcome, OUTCOMES[int(record["outcome"])]),
            durations=None if np.isnan(durations).any() else np.array(durations),
            task=self.task(number),
            success=None if record["success"] < 0 else bool(record["success"]),
        )

    def task(self, number: int) -> dict[str, bool | int | float | str]:
        """The reset options of episode `number`."""
        return {
            option.name: float(self.option_numbers[number, i]) if option.values is None else option.values[int(self.option_values[number, i])]
            for i, option in enumerate(self.options)
        }

    def iter_episodes(self, split: Split | None = None) -> Iterator[Episode]:
        for number in self.episodes(split):
            yield self.episode(int(number))

    # -- starts --------------------------------------------------------------------------------------------------

    def start_parts(self, codec: Codec, split: Split = "train") -> tuple[Parts, Parts]:
        """(task, observation) of the first row of every episode of a split, in order, [n, ...]."""
        episodes = self.episodes(split)
        return self._parts(codec, episodes, np.zeros(len(episodes), np.int64))

    def observation_parts(self, codec: Codec, split: Split, limit: int, seed: int) -> tuple[Parts, Parts]:
        """(task, observation) of at most `limit` logged observations that an action followed, drawn without replacement, [n, ...]."""
        episodes = self.episodes(split)
        ends = np.cumsum(self.table["length"][episodes])
        total = int(ends[-1]) if len(ends) else 0
        if not total:
            return self._parts(codec, episodes, episodes)
        drawn = permute(np.arange(min(limit, total)), total, key(seed, 0x0B5))
        position = np.searchsorted(ends, drawn, "right")
        steps = drawn - (ends - self.table["length"][episodes])[position]
        return self._parts(codec, episodes[position], steps)

    def _parts(self, codec: Codec, episodes: Array, steps: Array) -> tuple[Parts, Parts]:
        shards, rows = self.table["shard"][episodes], self.table["first_row"][episodes] + steps
        numbers, categories = self.gather("obs_num", shards, rows), self.gather("obs_cat", shards, rows)
        options = codec.option_rows(self.options, self.option_numbers, self.option_values)
        return codec.task_parts(numbers, categories, options[episodes]), codec.observation_parts(numbers, categories)


def _facts(a: Manifest, b: Manifest) -> Iterator[tuple[str, Any, Any, str]]:
    """What must be equal, by name, and what to do where it is not."""
    one = "train on datasets of one environment"
    for field in ("id", "kwargs", "task", "max_episode_steps"):
        yield f"environment {field}", getattr(a.environment, field), getattr(b.environment, field), one
    for field in ("observation_space", "action_space"):
        yield field, getattr(a, field), getattr(b, field), one
    if a.environment.version and b.environment.version:  # "" is not known
        yield "environment version", a.environment.version, b.environment.version, "collect the older one again, or use one of them alone"


def _load(path: Path, mapped: bool = False) -> Array:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{str(path)!r} is missing or damaged ({error}); collect the data again, or restore it from a copy") from error
    return np.asarray(array)
