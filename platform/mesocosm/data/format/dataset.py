"""Opens one or several datasets as one, memory-mapped: opening reads what is said of the shards,
not of the episodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.format.episode import Episode, Outcome
from mesocosm.data.format.manifest import (
    ARRAYS,
    EPISODES,
    LENGTHS,
    LENGTHS_FILE,
    MANIFEST,
    OUTCOMES,
    SPLITS,
    Environment,
    Manifest,
    TaskOption,
    lengths_of,
)
from mesocosm.data.format.permutation import key, permute
from mesocosm.data.format.space_json import space_from_json
from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.data.format.writer import DatasetWriter, sort_key, write_dataset
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.store.cache import Files, Partial, Whole

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
    """The episodes of `paths` (folders of datasets, or artifacts of which only what is touched is
    fetched and verified) in order, numbered 0..E-1.

    Opening reads the manifests and `lengths.npy` (of schema 1, which has none, the table of all
    episodes). `table`, `part`, the options and what needs them (`episodes`, `chunks`, `unique`,
    ...) hold all episodes, some 60 bytes each; training reads them shard by shard (`records`).
    Raises ArtifactError where a folder is no dataset or is damaged, UsageError where two are of
    different environments or spaces.
    """

    def __init__(self, paths: Sequence[str | Path | Partial]):
        if not paths:
            raise UsageError("no dataset was given; name at least one in data.datasets")
        self._files: list[Files] = [
            path if isinstance(path, Partial) else Whole(Path(path)) for path in paths
        ]
        self.paths = [files.path for files in self._files]
        for files in self._files:
            files.ahead([MANIFEST, LENGTHS_FILE])
        self.manifests = [Manifest.read(files.hold(MANIFEST).parent) for files in self._files]
        first = self.manifests[0]
        for path, other in zip(self.paths[1:], self.manifests[1:], strict=True):
            for field, a, b, fix in _facts(first, other):
                if a != b:
                    raise UsageError(
                        f"datasets {str(self.paths[0])!r} and {str(path)!r} differ in {field}: {a}"
                        f" and {b}; {fix}"
                    )
        ids = [manifest.id for manifest in self.manifests]
        if len(set(ids)) < len(ids):
            raise UsageError(f"the same dataset is given twice: {', '.join(ids)}; name each once")
        self.environment: Environment = first.environment
        self.observation_codec = SpaceCodec(space_from_json(first.observation_space), "observation")
        self.action_codec = SpaceCodec(space_from_json(first.action_space), "action")
        self.observation_space = self.observation_codec.space
        self.action_space = self.action_codec.space
        self.durations = all(manifest.durations for manifest in self.manifests)
        self._open: dict[int, dict[str, Array]] = {}
        self._folders: dict[int, Path] = {}
        """Where the shards lie that are held."""
        self._coming: set[int] = set()
        self._pinned: set[int] = set()
        counts = [len(manifest.shards) for manifest in self.manifests]
        self.shards: list[str] = [
            shard.name for manifest in self.manifests for shard in manifest.shards
        ]
        """[S] names within their datasets; shards are numbered over all datasets"""
        self.shard_part: Array = np.repeat(np.arange(len(paths)), counts)
        """[S] which of `paths` a shard is of"""
        self._old: dict[int, Array] = {}
        lengths, episodes = [], []
        for part, (manifest, before) in enumerate(
            zip(self.manifests, np.cumsum(counts) - counts, strict=True)
        ):
            if manifest.schema_version == 1:
                table = self._old[part] = _load(self._files[part].hold("episodes.npy")).astype(
                    EPISODES
                )
                found = lengths_of(table)
                episodes += np.bincount(table["shard"], minlength=counts[part]).tolist()
            else:
                found = _load(self._files[part].hold(LENGTHS_FILE)).astype(LENGTHS)
                episodes += [shard.episodes for shard in manifest.shards]
            found["shard"] += before
            lengths.append(found)
        self.lengths: Array = np.concatenate(lengths)
        """[n] `manifest.LENGTHS`, sorted by shard"""
        self._ends: Array = np.cumsum(episodes, dtype=np.int64)
        self._starts: Array = self._ends - np.array(episodes, np.int64)
        self.options, self._positions = self._read_options()
        self._view: Array | None = None
        self._whole: dict[str, Array] = {}

    def _read_options(self) -> tuple[list[TaskOption], list[list[Array | None]]]:
        """The reset options of the task, and of each dataset and option where its values are among
        those of all (None: a number).
        """
        options = []
        positions: list[list[Array | None]] = [[] for _ in self.manifests]
        for column, name in enumerate(option.name for option in self.manifests[0].task_options):
            seen = [manifest.task_options[column].values for manifest in self.manifests]
            if any(v is None for v in seen) and not all(v is None for v in seen):
                raise UsageError(
                    f"the reset option {name!r} is a number in one dataset and a choice in another;"
                    " collect both alike"
                )
            union = (
                None
                if seen[0] is None
                else sorted({value for some in seen for value in some or ()}, key=sort_key)
            )
            position = {value: i for i, value in enumerate(union or ())}
            for part, some in enumerate(seen):
                positions[part].append(
                    None
                    if some is None
                    else np.array([position[value] for value in some], np.int64)
                )
            options.append(TaskOption(name=name, values=union))
        return options, positions

    # -- shards
    # --------------------------------------------------------------------------------------------------

    def shard_bytes(self, shard: int) -> int:
        return self._files[int(self.shard_part[shard])].bytes(f"shards/{self.shards[shard]}")

    @property
    def most(self) -> int | None:
        """Bytes of shards that may lie on this machine; None: any."""
        return min((files.most for files in self._files if files.most is not None), default=None)

    def turn(self, now: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """Let go of all shards but these: `now` are read, `ahead` come next and are fetched
        meanwhile, in threads.
        """
        now, ahead = list(now), list(ahead)
        self._pinned.clear()
        self._pinned.update(now, ahead)
        self._let_go(set(self._open) - {*now, *ahead} | (self._coming - {*now, *ahead}))
        for shard in (*now, *ahead):
            self._coming.add(shard)
            self._files[int(self.shard_part[shard])].ahead([f"shards/{self.shards[shard]}"])

    def expect(self, shards: Array) -> None:
        """Begin to fetch and verify what will be read next, where there is room for all of it."""
        if self.most is None:
            for shard in np.unique(shards).tolist():
                if shard not in self._open:
                    self._files[int(self.shard_part[shard])].ahead([f"shards/{self.shards[shard]}"])

    def _let_go(self, shards: Iterable[int]) -> None:
        for shard in list(shards):
            self._open.pop(shard, None)
            self._folders.pop(shard, None)
            self._coming.discard(shard)
            self._files[int(self.shard_part[shard])].release([f"shards/{self.shards[shard]}"])

    def array(self, shard: int, name: str) -> Array:
        """A shard's memory-mapped array. Raises ArtifactError where it is missing or damaged."""
        arrays = self._open.get(shard)
        if arrays is None:
            if (
                self.most is not None and shard not in self._pinned
            ):  # one at a time: reading here and there goes on, if slowly, and needs no room
                self._let_go(set(self._open) - self._pinned)
            arrays = self._open[shard] = {}
        if (found := arrays.get(name)) is None:
            if shard not in self._folders:
                files = self._files[int(self.shard_part[shard])]
                self._folders[shard] = files.hold(f"shards/{self.shards[shard]}")
            found = arrays[name] = _load(self._folders[shard] / f"{name}.npy", mapped=True)
        return found

    def gather(self, name: str, shards: Array, rows: Array) -> Array:
        """Rows of one array: `shards` [K], `rows` [K, ...] within them -> [K, ..., columns]."""
        return self.gathered(shards, {name: rows})[name]

    def gathered(self, shards: Array, wanted: Mapping[str, Array]) -> dict[str, Array]:
        """Rows of arrays by name: `shards` [K], and each array's rows within them, [K, ...] -> [K,
        ..., columns]. Shard after shard, so that each is held once.
        """
        if len(self.shards) == 1 or len(shards) == 0 or (shards == shards[0]).all():
            shard = int(shards[0]) if len(shards) else 0
            return {
                name: self.array(shard, name).take(rows, axis=0) for name, rows in wanted.items()
            }
        self.expect(shards)
        out: dict[str, Array] = {}
        distinct = {id(rows): rows for rows in wanted.values()}
        for shard, here in grouped(shards):
            at = {number: rows[here] for number, rows in distinct.items()}
            for name, rows in wanted.items():
                values = self.array(shard, name).take(at[id(rows)], axis=0)
                if name not in out:
                    out[name] = np.empty((*rows.shape, *values.shape[rows.ndim :]), values.dtype)
                out[name][here] = values
        return out

    # -- episodes, as records
    # ------------------------------------------------------------------------------------

    def records(self, shard: int) -> Array:
        """A shard's [n] `manifest.EPISODES`, in order; their field `shard` counts within the
        dataset.
        """
        if self._view is not None:
            return self._view[self._starts[shard] : self._ends[shard]]
        part = int(self.shard_part[shard])
        if part in self._old:
            return self._old[part][self._within(shard)]
        return _load(self._files[part].hold(f"tables/{self.shards[shard]}.npy"), mapped=True)

    def _within(self, shard: int) -> slice:
        """Of the episodes of its dataset, those of a shard."""
        before = self._starts[np.searchsorted(self.shard_part, self.shard_part[shard])]
        return slice(int(self._starts[shard] - before), int(self._ends[shard] - before))

    def shard_options(self, shard: int) -> tuple[Array, Array]:
        """The reset options of a shard's n episodes: [n, k] numbers, and [n, k] positions in
        `TaskOption.values`.
        """
        part, count = int(self.shard_part[shard]), int(self._ends[shard] - self._starts[shard])
        if not self.options:
            return np.zeros((count, 0)), np.zeros((count, 0), np.int64)
        hold = self._files[part].hold
        if part in self._old:
            numbers, values = (
                _load(hold(f"task_{what}.npy"), mapped=True)[self._within(shard)]
                for what in ("numbers", "values")
            )
        else:
            numbers, values = (
                _load(hold(f"tables/{self.shards[shard]}.task_{what}.npy"))
                for what in ("numbers", "values")
            )
        values = values.astype(np.int64)
        for column, positions in enumerate(self._positions[part]):
            if positions is not None:
                values[:, column] = positions[values[:, column]]
        return np.asarray(numbers), values

    @property
    def table(self) -> Array:
        """[E] records of `manifest.EPISODES`; `shard` counts over all datasets"""
        if self._view is not None:
            return self._view
        if (found := self._whole.get("table")) is None:
            for name, part in zip(self.shards, self.shard_part, strict=True):
                if part not in self._old:
                    self._files[part].ahead([f"tables/{name}.npy"])
            found = np.concatenate(
                [self.records(shard) for shard in range(len(self.shards))]
            ).astype(EPISODES)
            found["shard"] = np.repeat(np.arange(len(self.shards)), self._ends - self._starts)
            self._whole["table"] = found
        return found

    @property
    def part(self) -> Array:
        """[E] which of `paths` an episode is from"""
        if "part" not in self._whole:
            self._whole["part"] = np.repeat(self.shard_part, self._ends - self._starts)
        return self._whole["part"]

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
            numbers, values = zip(
                *(self.shard_options(shard) for shard in range(len(self.shards))), strict=True
            )
            self._whole |= {"numbers": np.concatenate(numbers), "values": np.concatenate(values)}
        return self._whole

    # -- what there is
    # -------------------------------------------------------------------------------------------

    @property
    def ids(self) -> list[str]:
        return [manifest.id for manifest in self.manifests]

    @property
    def transitions(self) -> int:
        """All transitions, of both splits."""
        return int((self.lengths["length"] * self.lengths["episodes"]).sum())

    def episodes(self, split: Split | None = None) -> Array:
        """Episode numbers of a split (None: all), ascending, [n] int64."""
        return (
            np.arange(len(self.table))
            if split is None
            else np.flatnonzero(self.table["split"] == SPLITS.index(split))
        )

    def count(self, split: Split | None = None) -> int:
        """Transitions of a split (None: all)."""
        some = self._of(split)
        return int((some["length"] * some["episodes"]).sum())

    def size(self, split: Split) -> int:
        """Episodes of a split."""
        return int(self._of(split)["episodes"].sum())

    def _of(self, split: Split | None) -> Array:
        return (
            self.lengths
            if split is None
            else self.lengths[self.lengths["split"] == SPLITS.index(split)]
        )

    def unique(self, transitions: int, seed: int) -> Dataset:
        """The same files with exactly so many transitions in the training split: whole episodes in
        an order that `seed` draws, the last one cut short. A smaller view of a seed lies within its
        larger ones; validation is the same. Raises UsageError where there are fewer.
        """
        train = self.episodes("train")
        if not 1 <= transitions <= self.count("train"):
            raise UsageError(
                f"{transitions} unique transitions of {', '.join(self.ids)}, which has"
                f" {self.count('train')} to train on; ask for 1 to that many"
            )
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

    # -- rows
    # ----------------------------------------------------------------------------------------------------

    def chunks(self, split: Split | None = None) -> Iterator[Chunk]:
        """The split's whole episodes in order, about 64k rows at a time."""
        numbers = self.episodes(split)
        rows = self.table["length"][numbers] + 1
        groups = (np.cumsum(rows) - rows) // CHUNK_ROWS
        for episodes in (
            np.split(numbers, np.flatnonzero(np.diff(groups)) + 1) if len(numbers) else []
        ):
            lengths = self.table["length"][episodes] + 1
            ends = np.cumsum(lengths)
            at = np.arange(ends[-1]) + np.repeat(
                self.table["first_row"][episodes] - (ends - lengths), lengths
            )
            shards = np.repeat(self.table["shard"][episodes], lengths)
            last = np.zeros(len(at), bool)
            last[ends - 1] = True
            yield Chunk(episodes, self.gathered(shards, dict.fromkeys(ARRAYS, at)), last)
        self.turn(())

    # -- episodes
    # ------------------------------------------------------------------------------------------------

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
            observations=self.observation_codec.unbatch(
                self.observation_codec.decode(data["obs_num"], data["obs_cat"])
            ),
            actions=self.action_codec.unbatch(
                self.action_codec.decode(data["act_num"][:-1], data["act_cat"][:-1])
            ),
            rewards=np.array(data["reward"][:-1]),
            outcome=cast(Outcome, OUTCOMES[int(record["outcome"])]),
            durations=None if np.isnan(durations).any() else np.array(durations),
            task=self.task(number),
            success=None if record["success"] < 0 else bool(record["success"]),
        )

    def task(self, number: int) -> dict[str, bool | int | float | str]:
        """The reset options of episode `number`."""
        return {
            option.name: (
                float(self.option_numbers[number, i])
                if option.values is None
                else option.values[int(self.option_values[number, i])]
            )
            for i, option in enumerate(self.options)
        }

    def iter_episodes(self, split: Split | None = None) -> Iterator[Episode]:
        for number in self.episodes(split):
            yield self.episode(int(number))


def grouped(shards: Array) -> Iterator[tuple[int, Array | slice]]:
    """Each distinct value of [K] and where it stands."""
    order = np.argsort(shards, kind="stable")
    ordered = shards[order]
    starts = np.flatnonzero(np.r_[len(shards) > 0, ordered[1:] != ordered[:-1]])
    if len(starts) == 1:
        yield int(shards[0]), slice(None)
        return
    for start, end in zip(starts, np.r_[starts[1:], len(shards)][: len(starts)], strict=True):
        yield int(ordered[start]), order[start:end]


def _facts(a: Manifest, b: Manifest) -> Iterator[tuple[str, Any, Any, str]]:
    """What must be equal, by name, and what to do where it is not."""
    one = "train on datasets of one environment"
    for field in ("id", "kwargs", "task", "max_episode_steps"):
        yield (
            f"environment {field}",
            getattr(a.environment, field),
            getattr(b.environment, field),
            one,
        )
    for field in ("observation_space", "action_space"):
        yield field, getattr(a, field), getattr(b, field), one
    if a.environment.version and b.environment.version:  # "" is not known
        yield (
            "environment version",
            a.environment.version,
            b.environment.version,
            "collect the older one again, or use one of them alone",
        )


def _load(path: Path, mapped: bool = False) -> Array:
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{str(path)!r} is missing or damaged ({error}); collect the data again, or restore it"
            " from a copy"
        ) from error
    return np.asarray(array)
