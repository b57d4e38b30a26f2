"""Writes a dataset, episode by episode, in memory bounded by one shard.

    manifest.json                      what it is
    lengths.npy                        how many episodes of each length each shard has (`manifest.LENGTHS`)
    tables/00000.npy                   one record an episode of the shard (`manifest.EPISODES`)
    tables/00000.task_numbers.npy, tables/00000.task_values.npy
                                       [episodes, options] float64 and int32, where the task is made
                                       of reset options
    shards/00000/*.npy                 memory-mapped training arrays (`manifest.ARRAYS`)
    episodes/00000.parquet             the same episodes for people and other tools, one file a shard

The Parquet schema, one row an observation (T+1 rows an episode of T transitions), in order of
episode and step:

    episode      int64           which episode (`Episode.index`)
    step         int32           0..T
    observation  the space       Box, MultiDiscrete, MultiBinary: nested lists of the space's dtype (a scalar where the shape is ());
                                 Discrete: int64, counted from its start; Text: string; Dict:
                                 struct; Tuple: struct of "0", "1", ...
    action       the space       null in an episode's last row, as are the next four
    reward       double
    terminated   bool            the environment ended the episode here
    truncated    bool            a time limit ended it here; an episode whose end has neither is unfinished
    duration     double          seconds; the column is there only where the environment gives durations
    behaviour    string          who acted
    seed         int64           of `env.reset`
    success      bool            of the episode; null where not said
    task         struct          the reset options of the episode; there only where the task has any
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.format.episode import Episode
from mesocosm.data.format.manifest import (
    ARRAYS,
    EPISODES,
    LENGTHS_FILE,
    MANIFEST,
    OUTCOMES,
    SCHEMA,
    SPLITS,
    Behaviour,
    Counts,
    Environment,
    Manifest,
    Shard,
    TaskOption,
    lengths_of,
)
from mesocosm.data.format.permutation import key
from mesocosm.data.format.space_json import space_to_json
from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.errors import MesocosmError

Array = NDArray[Any]
ENOUGH = 5
"""A dataset of so many episodes always holds one out for validation."""
SHARD_ROWS = 1 << 20
SHARD_BYTES = 1 << 28
"""A shard is closed at whichever comes first, so that the writer's memory is bounded for wide
observations too.
"""


def write_dataset(
    folder: Path, episodes: Iterable[Episode], *, dropped: int = 0, **facts: Any
) -> Manifest:
    """Write `episodes` (a list or a stream) into `folder`; `facts` are `DatasetWriter`'s."""
    writer = DatasetWriter(folder, **facts)
    for episode in episodes:
        writer.add(episode)
    return writer.close(dropped=dropped)


class DatasetWriter:
    """`add` episodes in a fixed order, then `close`. The same episodes in the same order give the
    same bytes.

    The split is by a hash of (seed, episode index, behaviour): each episode is held out with the
    probability `valid_fraction`. At least one is held out where there are ENOUGH episodes (fewer
    may be the whole of a short later round: one of two would be half of what was bought), none
    where the fraction is 0, and never the last one to train on. Where `add` was told each episode's
    split, that is the split. Raises UsageError at once where a space is not supported.
    """

    def __init__(
        self,
        folder: Path,
        *,
        id: str,
        environment: Environment,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
        valid_fraction: float = 0.1,
        shard_rows: int = SHARD_ROWS,
    ):
        self._folder = folder
        self._id, self._environment, self._seed, self._valid_fraction = (
            id,
            environment,
            seed,
            valid_fraction,
        )
        self._observation = SpaceCodec(observation_space, "observation")
        self._action = SpaceCodec(action_space, "action")
        self._options = [name for name in environment.task if not self._observation.matching(name)]
        row_bytes = 8 * (self._observation.numbers + self._action.numbers + 4) + 4 * (
            self._observation.categories + self._action.categories
        )
        self._shard_rows = min(shard_rows, SHARD_BYTES // row_bytes)
        self._buffer: list[dict[str, Array]] = []
        self._pending: list[int] = []
        self._rows = 0
        self._shards: list[Shard] = []
        self._table: list[tuple[Any, ...]] = []
        self._tasks: list[dict[str, Any]] = []
        self._success: list[bool | None] = []
        self._behaviours: dict[str, Behaviour] = {}
        self._indices: set[int] = set()
        self._given: list[int] = []
        self._durations = True
        self._empty = 0

    def add(
        self, episode: Episode, rows: dict[str, Array] | None = None, split: str | None = None
    ) -> None:
        """`rows`: the episode as `encode_episode` gives it, where it is encoded already; its
        observations and actions are then not looked at. `split`: of `SPLITS`, given for every
        episode or for none.

        Raises MesocosmError naming episode and step where a value is not finite or not of its
        space.
        """
        if len(episode) == 0:
            self._empty += 1
            return
        if episode.index in self._indices:
            raise MesocosmError(
                f"{_where(episode)} comes twice; episode indices must be unique in a dataset"
            )
        if set(episode.task) != set(self._options):
            raise MesocosmError(
                f"{_where(episode)} has the reset options {sorted(episode.task)} where reality.task"
                f" names {sorted(self._options)}"
            )
        rows = encode_episode(episode, self._observation, self._action) if rows is None else rows
        self._durations = self._durations and episode.durations is not None
        self._indices.add(episode.index)
        behaviour = self._behaviours.setdefault(
            episode.behaviour, Behaviour(name=episode.behaviour)
        )
        behaviour.episodes += 1
        behaviour.transitions += len(episode)
        success = -1 if episode.success is None else int(episode.success)
        position = list(self._behaviours).index(episode.behaviour)
        outcome, total = OUTCOMES.index(episode.outcome), episode.total_reward
        hashed = int(key(_word(self._id), episode.index).view(np.int64)[0])
        self._pending.append(len(self._table))
        self._table.append(
            (
                episode.index,
                episode.seed,
                len(self._shards),
                self._rows,
                len(episode),
                position,
                outcome,
                success,
                0,
                total,
                hashed,
            )
        )
        if split is not None:
            self._given.append(SPLITS.index(split))
        self._tasks.append({name: _plain(episode.task[name]) for name in self._options})
        self._buffer.append(rows)
        self._rows += len(episode) + 1
        if self._rows >= self._shard_rows:
            self._flush()

    @property
    def transitions(self) -> int:
        """Of the episodes that were added."""
        return sum(behaviour.transitions for behaviour in self._behaviours.values())

    @property
    def whole(self) -> bool:
        """Whether all that was added is in shards."""
        return bool(self._shards) and not self._buffer

    def state(self) -> tuple[Array, dict[str, Any]]:
        """(`manifest.EPISODES` of the last shard, what else `restore` wants), while `whole`."""
        first = bisect_left(self._table, len(self._shards) - 1, key=lambda row: row[2])
        return np.array(self._table[first:], EPISODES), {
            "tasks": self._tasks[first:],
            "behaviours": [behaviour.model_dump() for behaviour in self._behaviours.values()],
            "shard": self._shards[-1].model_dump(),
            "durations": self._durations,
            "empty": self._empty,
        }

    def restore(self, table: Array, state: dict[str, Any]) -> None:
        """Of each shard in order, what `state` gave after it: the shard's files are there."""
        self._table += table.tolist()
        self._indices.update(table["index"].tolist())
        self._tasks += state["tasks"]
        self._behaviours = {row["name"]: Behaviour(**row) for row in state["behaviours"]}
        self._shards.append(Shard(**state["shard"]))
        self._durations, self._empty = state["durations"], state["empty"]

    def _flush(self) -> None:
        if not self._buffer:
            return
        name = f"{len(self._shards):05d}"
        folder = self._folder / "shards" / name
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {field: np.concatenate([rows[field] for rows in self._buffer]) for field in ARRAYS}
        self._buffer.clear()
        for field, array in arrays.items():
            np.save(folder / f"{field}.npy", array, allow_pickle=False)
        (self._folder / "episodes").mkdir(exist_ok=True)
        pq.write_table(
            self._parquet(arrays), self._folder / "episodes" / f"{name}.parquet", compression="zstd"
        )
        self._shards.append(Shard(name=name, rows=self._rows, episodes=len(self._pending)))
        self._pending.clear()
        self._rows = 0

    def _parquet(self, arrays: dict[str, Array]) -> pa.Table:
        records = np.array([self._table[i] for i in self._pending], EPISODES)
        repeats = records["length"] + 1
        last = np.zeros(len(arrays["step"]), bool)
        last[np.cumsum(repeats) - 1] = True
        truncated = np.zeros(len(last), bool)
        ended = records["outcome"] == OUTCOMES.index("truncated")
        truncated[(np.cumsum(repeats) - 2)[ended]] = True
        names = np.array(list(self._behaviours))
        columns: dict[str, pa.Array] = {
            "episode": pa.array(np.repeat(records["index"], repeats)),
            "step": pa.array(arrays["step"]),
            "observation": arrow(
                self._observation.space,
                self._observation.decode(arrays["obs_num"], arrays["obs_cat"]),
            ),
            "action": arrow(
                self._action.space, self._action.decode(arrays["act_num"], arrays["act_cat"]), last
            ),
            "reward": pa.array(arrays["reward"], mask=last),
            "terminated": pa.array(arrays["terminated"], mask=last),
            "truncated": pa.array(truncated, mask=last),
            "behaviour": pa.array(np.repeat(names[records["behaviour"]], repeats), pa.string()),
            "seed": pa.array(np.repeat(records["seed"], repeats)),
            "success": pa.array(
                np.repeat(records["success"] == 1, repeats),
                mask=np.repeat(records["success"] < 0, repeats),
            ),
        }
        if not np.isnan(arrays["duration"]).all():
            columns["duration"] = pa.array(
                arrays["duration"], mask=last | np.isnan(arrays["duration"])
            )
        if self._options:
            tasks = pa.array([self._tasks[i] for i in self._pending])
            columns["task"] = tasks.take(pa.array(np.repeat(np.arange(len(records)), repeats)))
        return pa.table(columns)

    def close(self, *, dropped: int = 0) -> Manifest:
        """Write what is left, the episode table and the manifest. `dropped`: episodes that crashed
        or hung, for the counts.
        """
        if not self._table:
            raise MesocosmError(
                f"no episode has a single transition ({dropped} dropped, {self._empty} empty);"
                " nothing to write"
            )
        self._flush()
        table = np.array(self._table, EPISODES)
        table["split"] = self._split(table)
        np.save(self._folder / LENGTHS_FILE, lengths_of(table), allow_pickle=False)
        self._save_by_shard("", table)
        options = self._write_options()
        by_split = {name: table[table["split"] == i] for i, name in enumerate(SPLITS)}
        manifest = Manifest(
            schema_version=SCHEMA,
            id=self._id,
            environment=self._environment,
            observation_space=space_to_json(self._observation.space),
            action_space=space_to_json(self._action.space),
            seed=self._seed,
            valid_fraction=self._valid_fraction,
            counts=Counts(
                episodes={name: len(rows) for name, rows in by_split.items()},
                transitions={name: int(rows["length"].sum()) for name, rows in by_split.items()},
                outcomes={
                    name: int((table["outcome"] == i).sum()) for i, name in enumerate(OUTCOMES)
                },
                dropped=dropped,
                empty=self._empty,
            ),
            behaviours=list(self._behaviours.values()),
            durations=self._durations,
            task_options=options,
            shards=self._shards,
        )
        (self._folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))
        return manifest

    def _split(self, table: Array) -> Array:
        if self._given:
            assert len(self._given) == len(table)
            return np.array(self._given, np.uint8)
        names = np.array([_word(name) for name in self._behaviours], np.uint64)
        hashes = key(self._seed, table["index"], names[table["behaviour"]])
        valid = hashes.astype(np.float64) / 2.0**64 < self._valid_fraction
        if self._valid_fraction > 0 and len(table) >= ENOUGH and not valid.any():
            valid[hashes.argmin()] = True
        if valid.all():
            valid[hashes.argmax()] = False
        return valid.astype(np.uint8)

    def _write_options(self) -> list[TaskOption]:
        """Floats are numbers (so are the integers beside them); anything else is a category over
        the values seen.
        """
        options = []
        numbers = np.zeros((len(self._tasks), len(self._options)))
        values = np.zeros((len(self._tasks), len(self._options)), np.int32)
        for column, name in enumerate(self._options):
            raw = [task[name] for task in self._tasks]
            if any(isinstance(value, float) for value in raw):
                if not all(isinstance(value, float | int) and np.isfinite(value) for value in raw):
                    raise MesocosmError(
                        f"the reset option {name!r} mixes finite numbers with other values; give"
                        " one kind"
                    )
                numbers[:, column] = raw
                options.append(TaskOption(name=name))
                continue
            distinct = sorted(set(raw), key=sort_key)
            if len({type(value) for value in distinct}) > 1:
                raise MesocosmError(
                    f"the reset option {name!r} has values of several kinds, such as"
                    f" {distinct[0]!r} and {distinct[-1]!r}; give one kind"
                )
            position = {value: i for i, value in enumerate(distinct)}
            values[:, column] = [position[value] for value in raw]
            options.append(TaskOption(name=name, values=distinct))
        if self._options:
            self._save_by_shard(".task_numbers", numbers)
            self._save_by_shard(".task_values", values)
        return options

    def _save_by_shard(self, what: str, rows: Array) -> None:
        """[E, ...] into tables/, each shard's part into a file of its own."""
        (self._folder / "tables").mkdir(exist_ok=True)
        ends = np.cumsum([shard.episodes for shard in self._shards])
        for shard, part in zip(self._shards, np.split(rows, ends[:-1]), strict=True):
            np.save(self._folder / "tables" / f"{shard.name}{what}.npy", part, allow_pickle=False)


def encode_episode(
    episode: Episode, observation: SpaceCodec, action: SpaceCodec
) -> dict[str, Array]:
    """The rows of `manifest.ARRAYS` of one episode. Raises MesocosmError naming the episode where a
    value is not finite or not of its space.
    """
    where, length = _where(episode), len(episode)
    if len(episode.observations) != length + 1 or len(episode.actions) != length:
        counts = f"{len(episode.observations)} observations and {len(episode.actions)} actions"
        raise MesocosmError(
            f"{where} has {length} rewards but {counts}; T rewards need T+1 observations and T"
            " actions"
        )
    rows: dict[str, Array] = {}
    last = np.zeros((1,), np.float64)
    for prefix, codec, values in (
        ("obs", observation, episode.observations),
        ("act", action, episode.actions),
    ):
        try:
            numbers, categories = codec.encode_list(values)
        except MesocosmError as error:
            raise MesocosmError(f"{where}: {error}") from error
        _refuse_nonfinite(numbers, codec.labels(), where)
        widest = np.min_scalar_type(max(codec.cardinalities, default=1) - 1)
        if prefix == "act":
            numbers, categories = (
                np.concatenate([a, np.zeros((1, a.shape[1]), a.dtype)])
                for a in (numbers, categories)
            )
        rows[f"{prefix}_num"], rows[f"{prefix}_cat"] = numbers, categories.astype(widest)
    rewards = np.asarray(episode.rewards, np.float64)
    _refuse_nonfinite(rewards[:, None], ["reward"], where)
    rows["reward"] = np.concatenate([rewards, last])
    rows["terminated"] = np.concatenate([episode.terminated, last.astype(bool)])
    rows["duration"] = np.full(length + 1, np.nan)
    if episode.durations is not None:
        durations = np.asarray(episode.durations, np.float64)
        _refuse_nonfinite(durations[:, None], ["duration"], where)
        rows["duration"] = np.concatenate([durations, last])
    rows["step"] = np.arange(length + 1, dtype=np.int32)
    return rows


def _where(episode: Episode) -> str:
    return f"episode {episode.index} (behaviour {episode.behaviour!r})"


def sort_key(value: Any) -> tuple[str, Any]:
    """Sorts values of several kinds."""
    return type(value).__name__, value


def _word(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _plain(value: Any) -> bool | int | float | str:
    plain = (
        value.item()
        if isinstance(value, np.generic | np.ndarray) and np.size(value) == 1
        else value
    )
    if not isinstance(plain, bool | int | float | str):
        raise MesocosmError(
            f"the reset option value {value!r} is a {type(value).__name__}; a task is made of"
            " numbers, strings and booleans"
        )
    return plain


def _refuse_nonfinite(values: Array, names: list[str], where: str) -> None:
    if np.isfinite(values).all():
        return
    step, column = np.argwhere(~np.isfinite(values))[0]
    raise MesocosmError(
        f"{where}, step {step}: {names[column]} is {values[step, column]}; drop the episode, or fix"
        " the environment"
    )


def arrow(space: gymnasium.Space[Any], batch: Any, null: Array | None = None) -> pa.Array:
    """A batch (vector layout) as a nested Arrow array; `null` [B] marks missing rows."""
    mask = None if null is None else pa.array(null)
    if isinstance(space, spaces.Dict | spaces.Tuple):
        children = (
            list(space.spaces.items())
            if isinstance(space, spaces.Dict)
            else [(str(i), child) for i, child in enumerate(space.spaces)]
        )
        items = batch.values() if isinstance(space, spaces.Dict) else batch
        arrays = [arrow(child, item) for (_, child), item in zip(children, items, strict=True)]
        return pa.StructArray.from_arrays(arrays, [name for name, _ in children], mask=mask)
    if isinstance(space, spaces.Text):
        return pa.array(
            [None if null is not None and null[i] else text for i, text in enumerate(batch)],
            pa.string(),
        )
    array = np.asarray(batch)
    if array.ndim == 1:
        return pa.array(array, mask=null)
    nested = pa.array(array.reshape(-1))
    for axis in range(array.ndim - 1, 0, -1):
        outer = int(np.prod(array.shape[:axis]))
        offsets = pa.array(np.arange(outer + 1, dtype=np.int32) * array.shape[axis])
        nested = pa.ListArray.from_arrays(offsets, nested, mask=mask if axis == 1 else None)
    return nested
