"""Opens one or several datasets as one, memory-mapped: opening reads what is said of the shards, not of the episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.episode import Episode, Outcome
from mesocosm.data.manifest import ARRAYS, EPISODES, LENGTHS, LENGTHS_FILE, MANIFEST, OUTCOMES, SPLITS, Environment, Manifest, TaskOption, lengths_of
from mesocosm.data.permutation import key, permute
from mesocosm.data.spaces import SpaceCodec, space_from_json
from mesocosm.data.writer import DatasetWriter, sort_key, write_dataset
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.spec import Parts
from mesocosm.partial import Partial

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
    """The episodes of `paths` (folders of datasets, or artifacts of which only what is touched is fetched) in order, numbered 0..E-1.

    Opening reads the manifests and `lengths.npy`. `table`, `part`, the options and what needs them (`episodes`, `chunks`, `unique`, ...) hold all
    episodes, some 60 bytes each; training reads them shard by shard (`records`).
    Raises ArtifactError where a folder is no dataset or is damaged, UsageError where two are of different environments or spaces.
    """

    def __init__(self, paths: Sequence[str | Path | Partial]):
        if not paths:
            raise UsageError("no dataset was given; name at least one in data.datasets")
        self._files = [path if isinstance(path, Partial) else None for path in paths]
        self.paths = [path.path if isinstance(path, Partial) else Path(path) for path in paths]
        self._ahead(lambda _: [MANIFEST, LENGTHS_FILE])
        self.manifests = [Manifest.read(self._file(part, MANIFEST).parent) for part in range(len(paths))]
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
        self._open: dict[tuple[int, str], Array] = {}
        counts = [len(manifest.shards) for manifest in self.manifests]
        self.shards: list[str] = [shard.name for manifest in self.manifests for shard in manifest.shards]
        """[S] names within their datasets; shards are numbered over all datasets"""
        self.shard_part: Array = np.repeat(np.arange(len(paths)), counts)
        """[S] which of `paths` a shard is of"""
        episodes = np.array([shard.episodes for manifest in self.manifests for shard in manifest.shards], np.int64)
        self._ends: Array = np.cumsum(episodes)
        self._starts: Array = self._ends - episodes
        lengths = []
        for part, before in enumerate(np.cumsum(counts) - counts):
            found = _load(self._file(part, LENGTHS_FILE)).astype(LENGTHS)
            found["shard"] += before
            lengths.append(found)
        self.lengths: Array = np.concatenate(lengths)
        """[n] `manifest.LENGTHS`, sorted by shard"""
        self.options, self._positions = self._read_options()
        self._view: Array | None = None
        self._whole: dict[str, Array] = {}

    def _read_options(self) -> tuple[list[TaskOption], list[list[Array | None]]]:
        """The reset options of the task, and of each dataset and option where its values are among those of all (None: a number)."""
        options = []
        positions: list[list[Array | None]] = [[] for _ in self.manifests]
        for column, name in enumerate(option.name for option in self.manifests[0].task_options):
            seen = [manifest.task_options[column].values for manifest in self.manifests]
            if any(v is None for v in seen) and not all(v is None for v in seen):
                raise UsageError(f"the reset option {name!r} is a number in one dataset and a choice in another; collect both alike")
            union = None if seen[0] is None else sorted({value for some in seen for value in some or ()}, key=sort_key)
            position = {value: i for i, value in enumerate(union or ())}
            for part, some in enumerate(seen):
                positions[part].append(None if some is None else np.array([position[value] for value in some], np.int64))
            options.append(TaskOption(name=name, values=union))
        return options, positions

    # -- files ---------------------------------------------------------------------------------------------------

    def _file(self, part: int, name: str) -> Path:
        files = self._files[part]
        return self.paths[part] / name if files is None else files.file(name)

    def _ahead(self, names: Callable[[int], Iterable[str]]) -> None:
        for part, files in enumerate(self._files):
            if files is not None:
                files.ahead(names(part))

    def _arrays_of(self, shards: Iterable[int], part: int) -> list[str]:
        return [f"shards/{self.shards[shard]}/{name}.npy" for shard in shards if self.shard_part[shard] == part for name in ARRAYS]

    def turn(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Leave all other shards and use `now`; `ahead` come next and are fetched meanwhile."""
        left = {shard for shard, _ in self._open} - {*now, *ahead}
        self._open = {at: array for at, array in self._open.items() if at[0] not in left}
        for part, files in enumerate(self._files):
            if files is not None:
                files.forget(self._arrays_of(left, part))
                files.ahead([*self._arrays_of(now, part), *self._arrays_of(ahead, part)])

    def check(self) -> None:
        """Raise ArtifactError for what was found to be damaged by now."""
        for files in self._files:
            if files is not None:
                files.check()

    def confirm(self) -> Dataset:
        """Wait until all that was read is verified. Raises ArtifactError where something is damaged."""
        for files in self._files:
            if files is not None:
                files.confirm()
        return self

    # -- episodes, as records ------------------------------------------------------------------------------------

    def records(self, shard: int) -> Array:
        """A shard's [n] `manifest.EPISODES`, in order; their field `shard` counts within the dataset."""
        if self._view is not None:
            return self._view[self._starts[shard] : self._ends[shard]]
        return _load(self._file(int(self.shard_part[shard]), f"tables/{self.shards[shard]}.npy"), mapped=True)

    def shard_options(self, shard: int) -> tuple[Array, Array]:
        """The reset options of a shard's n episodes: [n, k] numbers, and [n, k] positions in `TaskOption.values`."""
        part, count = int(self.shard_part[shard]), int(self._ends[shard] - self._starts[shard])
        if not self.options:
            return np.zeros((count, 0)), np.zeros((count, 0), np.int64)
        name = f"tables/{self.shards[shard]}"
        numbers, values = (_load(self._file(part, f"{name}.task_{what}.npy")) for what in ("numbers", "values"))
        values = values.astype(np.int64)
        for column, positions in enumerate(self._positions[part]):
            if positions is not None:
                values[:, column] = positions[values[:, column]]
        return numbers, values

    @property
    def table(self) -> Array:
        """[E] records of `manifest.EPISODES`; `shard` counts over all datasets"""
        if self._view is not None:
            return self._view
        if (found := self._whole.get("table")) is None:
            self._ahead(lambda part: [f"tables/{name}.npy" for name, of in zip(self.shards, self.shard_part, strict=True) if of == part])
            found = np.concatenate([self.records(shard) for shard in range(len(self.shards))]).astype(EPISODES)
            found["shard"] = np.repeat(np.arange(len(self.shards)), self._ends - self._starts)
            self._whole["table"] = found
        return found

    @property
    def part(self) -> Array:
        """[E] which of `paths` an episode is from"""
        return np.repeat(self.shard_part, self._ends - self._starts)

    @property
    def option_numbers(self) -> Array:
        """[E, k] the numbers among the reset options"""
        return self._all_options()["numbers"]

    @property
    def option_values(self) -> Array:
        """[E, k] positions in `TaskOption.values`"""
        return self._all_options()["values"]

    def _all_options(self) -> dict[str, Array]:
        if "numbers" not in self._whole:
            numbers, values = zip(*(self.shard_options(shard) for shard in range(len(self.shards))), strict=True)
            self._whole |= {"numbers": np.concatenate(numbers), "values": np.concatenate(values)}
        return self._whole

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def ids(self) -> list[str]:
        return [manifest.id for manifest in self.manifests]

    @property
    def transitions(self) -> int:
        """All transitions, of both splits."""
        return int((self.lengths["length"] * self.lengths["episodes"]).sum())

    def episodes(self, split: Split | None = None) -> Array:
        """Episode numbers of a split (None: all), ascending, [n] int64."""
        return np.arange(len(self.table)) if split is None else np.flatnonzero(self.table["split"] == SPLITS.index(split))

    def count(self, split: Split | None = None) -> int:
        """Transitions of a split (None: all)."""
        some = self._of(split)
        return int((some["length"] * some["episodes"]).sum())

    def size(self, split: Split) -> int:
        """Episodes of a split."""
        return int(self._of(split)["episodes"].sum())

    def _of(self, split: Split | None) -> Array:
        return self.lengths if split is None else self.lengths[self.lengths["split"] == SPLITS.index(split)]

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
        view._view = table = self.table.copy()
        table["split"][order[kept:]] = UNUSED
        if (over := int(ends[kept - 1]) - transitions) > 0:
            table["length"][order[kept - 1]] -= over
            table["outcome"][order[kept - 1]] = OUTCOMES.index("unfinished")
        view.lengths = lengths_of(table)
        return view

    # -- rows ----------------------------------------------------------------------------------------------------

    def array(self, shard: int, name: str) -> Array:
        """A shard's memory-mapped array. Raises ArtifactError where it is missing or damaged."""
        found = self._open.get((shard, name))
        if found is None:
            part = int(self.shard_part[shard])
            self._ahead(lambda other: self._arrays_of([shard], other))
            found = self._open[shard, name] = _load(self._file(part, f"shards/{self.shards[shard]}/{name}.npy"), mapped=True)
        return found

    def gather(self, name: str, shards: Array, rows: Array) -> Array:
        """Rows of one array: `shards` [K], `rows` [K, ...] within them -> [K, ..., columns]. One read a shard, no loop over rows."""
        first = int(shards[0]) if len(shards) else 0
        if len(self.shards) == 1 or (shards == first).all():
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
        task = {
            option.name: float(self.option_numbers[number, i]) if option.values is None else option.values[int(self.option_values[number, i])]
            for i, option in enumerate(self.options)
        }
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
            task=task,
            success=None if record["success"] < 0 else bool(record["success"]),
        )

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
