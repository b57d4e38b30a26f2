"""Writes a dataset, episode by episode, in memory bounded by one shard.

manifest.json             what it is
lengths.npy               episodes of each length in each shard (`manifest.LENGTHS`)
tables/00000.npy          one record an episode of the shard (`manifest.EPISODES`)
tables/00000.task_numbers.npy, tables/00000.task_values.npy
                          [episodes, options] float64 and int32, where the task has reset options
shards/00000/*.npy        memory-mapped training arrays (`manifest.ARRAYS`)
shards/00000/texts.arrow  the texts of the spaces' Text leaves, where they have any (`texts`)
shards/00000/obs_image0.bin, obs_image0.idx.npy
                          the frames of the observation's images, where it has any (`images`)
episodes/00000.parquet    the same episodes for people and other tools (`parquet`)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mesocosm.datasets.episode import Episode
from mesocosm.datasets.images import FrameWriter, image_names
from mesocosm.datasets.manifest import (
    ARRAYS,
    EPISODES,
    LENGTHS_FILE,
    MANIFEST,
    OUTCOMES,
    SCHEMA,
    SPLITS,
    TEXT_SCHEMA,
    BehaviourCounts,
    Environment,
    EpisodeCounts,
    Manifest,
    ResetOption,
    Shard,
    lengths_of,
    sort_key,
)
from mesocosm.datasets.parquet import episodes_table
from mesocosm.datasets.permutation import key
from mesocosm.datasets.space_json import space_to_json
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.split import choose_splits, hashed_word
from mesocosm.datasets.texts import FILE, TEXTS, write_texts
from mesocosm.errors import MesocosmError

Array = NDArray[Any]
SHARD_ROWS = 1 << 20
SHARD_BYTES = 1 << 28
"""A shard is closed at whichever comes first, so that wide observations fit into memory too."""


def write_dataset(
    folder: Path, episodes: Iterable[Episode], *, dropped: int = 0, **facts: Any
) -> Manifest:
    """Write `episodes` (a list or a stream) into `folder`; `facts` are `DatasetWriter`'s."""
    writer = DatasetWriter(folder, **facts)
    for episode in episodes:
        writer.add(episode)
    return writer.close(dropped=dropped)


class DatasetWriter:
    """`add` episodes in a fixed order, then `close`. The same episodes give the same bytes.

    `split.choose_splits` holds episodes out, unless `add` gives each episode's split.
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
        self._folder, self._id, self._environment = folder, id, environment
        self._seed, self._valid_fraction = seed, valid_fraction
        observation = SpaceCodec(observation_space, "observation")
        action = SpaceCodec(action_space, "action")
        self._codecs = observation, action
        self._text_names = [leaf.name for codec in self._codecs for leaf in codec.text_leaves]
        self._images = image_names(len(observation.image_leaves))
        self._options = [name for name in environment.task if not observation.matching(name)]
        numbers, categories = observation.numbers + action.numbers, observation.categories
        row_bytes = 8 * (numbers + 4) + 4 * (categories + action.categories)
        self._shard_rows = min(shard_rows, SHARD_BYTES // row_bytes)
        self._buffer: list[dict[str, Array]] = []
        """The rows of the last episodes, which are in no shard yet."""
        self._rows = self._characters = 0
        self._shards: list[Shard] = []
        self._frames = self._new_frames()
        self._table: list[tuple[Any, ...]] = []
        self._tasks: list[dict[str, Any]] = []
        self._behaviours: dict[str, BehaviourCounts] = {}
        self._indices: set[int] = set()
        self._splits: list[int] = []
        self._durations = True
        self._empty = 0

    def _shard_folder(self) -> Path:
        """The folder of the shard that is not complete yet."""
        return self._folder / "shards" / f"{len(self._shards):05d}"

    def _new_frames(self) -> dict[str, FrameWriter]:
        folder = self._shard_folder()
        return {name: FrameWriter(folder / f"{name}.bin") for name in self._images}

    def add(
        self, episode: Episode, rows: dict[str, Any] | None = None, split: str | None = None
    ) -> None:
        """Add an episode.

        Args:
            rows: What `encode_episode` returns, where the episode is encoded already. The frames
                of an image may be an iterable of arrays too, which are read one after another.
            split: One of `SPLITS`, given for every episode or for none.

        Raises:
            MesocosmError: A value is not finite or not of its space.
        """
        if len(episode) == 0:
            self._empty += 1
            return
        if episode.index in self._indices:
            fix = "episode indices must be unique in a dataset"
            raise MesocosmError(f"{_where(episode)} comes twice; {fix}")
        if set(episode.task) != set(self._options):
            expected = f"the reset options {sorted(self._options)} of reality.task"
            got = sorted(episode.task)
            raise MesocosmError(f"{_where(episode)} must have {expected}, got {got}")
        rows = encode_episode(episode, *self._codecs) if rows is None else rows
        self._durations = self._durations and episode.durations is not None
        self._indices.add(episode.index)
        name = episode.behaviour
        behaviour = self._behaviours.setdefault(name, BehaviourCounts(name=name))
        behaviour.episodes += 1
        behaviour.transitions += len(episode)
        number = list(self._behaviours).index(name)
        outcome = OUTCOMES.index(episode.outcome)
        success = -1 if episode.success is None else int(episode.success)
        hashed = int(key(hashed_word(self._id), episode.index).view(np.int64)[0])
        place = episode.index, episode.seed, len(self._shards), self._rows, len(episode)
        self._table.append((*place, number, outcome, success, 0, episode.total_reward, hashed))
        if split is not None:
            self._splits.append(SPLITS.index(split))
        self._tasks.append({name: _plain(episode.task[name]) for name in self._options})
        for name in self._images:  # compressed at once, so that memory holds no raw frames
            frames = rows[name]
            for part in [frames] if isinstance(frames, np.ndarray) else frames:
                self._frames[name].add(part)
        self._buffer.append({name: rows[name] for name in (*ARRAYS, *TEXTS)})
        self._rows += len(episode) + 1
        self._characters += sum(len(text) for name in TEXTS for text in rows[name].flat)
        compressed = sum(frames.size for frames in self._frames.values())
        if self._rows >= self._shard_rows or max(self._characters, compressed) >= SHARD_BYTES:
            self._flush()

    @property
    def transitions(self) -> int:
        return sum(behaviour.transitions for behaviour in self._behaviours.values())

    @property
    def whole(self) -> bool:
        """True if all episodes are in shards."""
        return bool(self._shards) and not self._buffer

    def state(self) -> tuple[Array, dict[str, Any]]:
        """(`manifest.EPISODES` of the last shard, the rest that `restore` reads), while `whole`."""
        first = len(self._table) - self._shards[-1].episodes
        return np.array(self._table[first:], EPISODES), {
            "tasks": self._tasks[first:],
            "behaviours": [behaviour.model_dump() for behaviour in self._behaviours.values()],
            "shard": self._shards[-1].model_dump(),
            "durations": self._durations,
            "empty": self._empty,
        }

    def restore(self, table: Array, state: dict[str, Any]) -> None:
        """Continue after a shard whose files exist, with its `state`; call it shard by shard."""
        self._table += table.tolist()
        self._indices.update(table["index"].tolist())
        self._tasks += state["tasks"]
        self._behaviours = {row["name"]: BehaviourCounts(**row) for row in state["behaviours"]}
        self._shards.append(Shard(**state["shard"]))
        self._frames = self._new_frames()
        self._durations, self._empty = state["durations"], state["empty"]

    def _flush(self) -> None:
        count = len(self._buffer)
        if not count:
            return
        folder = self._shard_folder()
        name = folder.name
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            field: np.concatenate([rows[field] for rows in self._buffer])
            for field in (*ARRAYS, *TEXTS)
        }
        self._buffer.clear()
        for field in ARRAYS:
            np.save(folder / f"{field}.npy", arrays[field], allow_pickle=False)
        if self._text_names:
            texts = np.concatenate([arrays[field] for field in TEXTS], 1)
            write_texts(folder / FILE, self._text_names, texts)
        for frames in self._frames.values():
            frames.write_index()
        records = np.array(self._table[-count:], EPISODES)
        tasks = self._tasks[-count:]
        table = episodes_table(self._codecs, arrays, records, list(self._behaviours), tasks)
        (self._folder / "episodes").mkdir(exist_ok=True)
        pq.write_table(table, self._folder / "episodes" / f"{name}.parquet", compression="zstd")
        self._shards.append(Shard(name=name, rows=self._rows, episodes=count))
        self._frames = self._new_frames()
        self._rows = self._characters = 0

    def close(self, *, dropped: int = 0) -> Manifest:
        """Write the rest. Raises MesocosmError where no episode has a transition."""
        if not self._table:
            counts = f"{dropped} dropped, {self._empty} empty"
            raise MesocosmError(f"no episode has a single transition ({counts}); nothing to write")
        self._flush()
        table = np.array(self._table, EPISODES)
        table["split"] = self._splits or self._chosen_splits(table)
        np.save(self._folder / LENGTHS_FILE, lengths_of(table), allow_pickle=False)
        self._save_by_shard("", table)
        options = self._write_options()
        by_split = {name: table[table["split"] == i] for i, name in enumerate(SPLITS)}
        outcomes = np.bincount(table["outcome"], minlength=len(OUTCOMES)).tolist()
        manifest = Manifest(
            schema_version=TEXT_SCHEMA if self._text_names else SCHEMA,
            id=self._id,
            environment=self._environment,
            observation_space=space_to_json(self._codecs[0].space),
            action_space=space_to_json(self._codecs[1].space),
            seed=self._seed,
            valid_fraction=self._valid_fraction,
            counts=EpisodeCounts(
                episodes={name: len(rows) for name, rows in by_split.items()},
                transitions={name: int(rows["length"].sum()) for name, rows in by_split.items()},
                outcomes=dict(zip(OUTCOMES, outcomes, strict=True)),
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

    def _chosen_splits(self, table: Array) -> Array:
        names = list(self._behaviours)
        behaviours = [names[number] for number in table["behaviour"]]
        return choose_splits(self._seed, table["index"], behaviours, self._valid_fraction)

    def _write_options(self) -> list[ResetOption]:
        """An option with a float is a number, any other a category over the values seen."""
        options = []
        numbers = np.zeros((len(self._tasks), len(self._options)))
        values = np.zeros((len(self._tasks), len(self._options)), np.int32)
        for column, name in enumerate(self._options):
            raw = [task[name] for task in self._tasks]
            distinct = sorted(set(raw), key=sort_key)
            kinds = {type(value) for value in raw}  # of a set, 1.0 may have become the equal 1
            if float in kinds and kinds <= {float, int, bool} and np.isfinite(raw).all():
                numbers[:, column] = raw
                options.append(ResetOption(name=name))
                continue
            if float in kinds or len({type(value) for value in distinct}) > 1:
                got = f"got {distinct[0]!r} and {distinct[-1]!r}"
                expected = "finite numbers, or values of one kind"
                raise MesocosmError(f"the reset option {name!r} must have {expected}; {got}")
            position = {value: i for i, value in enumerate(distinct)}
            values[:, column] = [position[value] for value in raw]
            options.append(ResetOption(name=name, values=distinct))
        if self._options:
            self._save_by_shard(".task_numbers", numbers)
            self._save_by_shard(".task_values", values)
        return options

    def _save_by_shard(self, suffix: str, rows: Array) -> None:
        """Save [E, ...] into tables/, each shard's part into its own file."""
        (self._folder / "tables").mkdir(exist_ok=True)
        ends = np.cumsum([shard.episodes for shard in self._shards])
        for shard, part in zip(self._shards, np.split(rows, ends[:-1]), strict=True):
            path = self._folder / "tables" / f"{shard.name}{suffix}.npy"
            np.save(path, part, allow_pickle=False)


def encode_episode(
    episode: Episode, observation: SpaceCodec, action: SpaceCodec
) -> dict[str, Array]:
    """The rows of `manifest.ARRAYS` and `texts.TEXTS`, texts apart from the categories, and the
    frames of images. Raises MesocosmError where a value is not of its space.
    """
    where, length = _where(episode), len(episode)
    counts = len(episode.observations), len(episode.actions)
    if counts != (length + 1, length):
        expected = f"{length + 1} observations and {length} actions"
        got = f"got {counts[0]} and {counts[1]}"
        raise MesocosmError(f"{where} has {length} rewards, so it must have {expected}, {got}")
    rows: dict[str, Array] = {}
    for prefix, codec, values in (
        ("obs", observation, episode.observations),
        ("act", action, episode.actions),
    ):
        try:
            numbers, categories, texts, *images = codec.stored_list(values)
        except MesocosmError as error:
            raise MesocosmError(f"{where}: {error}") from error
        _check_finite(numbers, codec.labels(), where)
        rows[f"{prefix}_num"], rows[f"{prefix}_text"] = numbers, texts
        rows[f"{prefix}_cat"] = categories.astype(codec.plain_dtype)
        rows |= zip(image_names(len(images)), images, strict=True)
    rows["reward"] = np.asarray(episode.rewards, np.float64)
    _check_finite(rows["reward"][:, None], ["reward"], where)
    rows["terminated"] = episode.terminated
    rows["duration"] = np.full(length + 1, np.nan)
    if episode.durations is not None:
        rows["duration"] = np.asarray(episode.durations, np.float64)
        _check_finite(rows["duration"][:, None], ["duration"], where)
    for name, array in rows.items():
        if len(array) == length:  # no action follows the last observation
            rows[name] = np.concatenate([array, nothing(array)])
    rows["step"] = np.arange(length + 1, dtype=np.int32)
    return rows


def nothing(array: Array) -> Array:
    """One row like those of `array`, of zeros or of empty texts: the action after the last one."""
    fill = "" if array.dtype == object else 0
    return np.full_like(array, fill, shape=(1, *array.shape[1:]))


def _where(episode: Episode) -> str:
    return f"episode {episode.index} (behaviour {episode.behaviour!r})"


def _plain(value: Any) -> bool | int | float | str:
    scalar = isinstance(value, np.generic | np.ndarray) and value.size == 1
    plain = value.item() if scalar else value
    if not isinstance(plain, bool | int | float | str):
        got = f"{value!r} ({type(value).__name__})"
        raise MesocosmError(f"a reset option must be a number, a string or a boolean, got {got}")
    return plain


def _check_finite(values: Array, names: list[str], where: str) -> None:
    if np.isfinite(values).all():
        return
    step, column = np.argwhere(~np.isfinite(values))[0]
    problem = f"{where}, step {step}: {names[column]} is {values[step, column]}"
    raise MesocosmError(f"{problem}; drop the episode, or fix the environment")
