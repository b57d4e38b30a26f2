"""Raw rows -> windows as training reads them, and logged observations as parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.index import Index
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.permutation import key, permute
from mesocosm.datasets.places import grouped
from mesocosm.datasets.slots import SlotRows
from mesocosm.datasets.split import Split
from mesocosm.model.tensors import Events, Parts, Windows

Array = NDArray[Any]
Batch = TypeVar("Batch", Windows, Events)
OBSERVATIONS = 0x0B5
"""Salt of the draw of logged observations."""


def windows(dataset: Dataset, codec: Codec, places: Array, window: int) -> Windows:
    """The windows of `window` transitions that lie at `places` [K] (`index.place_type`)."""
    data = raw_rows(dataset, codec, places, window)
    numbers, categories = data["obs_num"], data["obs_cat"]
    inside = np.arange(window) < places["count"][:, None]
    mask, zero = torch.from_numpy(inside), torch.zeros(())
    duration = torch.zeros(mask.shape)
    if codec.spec.durations:
        duration = torch.where(mask, codec.duration(data["duration"]), zero)
    return Windows(
        observation=codec.observation_parts(numbers, categories),
        action=codec.action_parts(data["act_num"], data["act_cat"]),
        task=codec.task_parts(numbers[:, 0], categories[:, 0], places["options"]),
        reward=torch.where(mask, codec.reward(data["reward"]), zero),
        terminated=torch.from_numpy((data["terminated"] & inside).astype(np.float32)),
        duration=duration,
        mask=mask,
        start=torch.from_numpy((places["start"] == 0) & (places["count"] > 0)),
        episode=torch.from_numpy(places["hash"].copy()),
    )


def batches(whole: Batch, count: int) -> list[Batch]:
    """Split [count * B, ...] into `count` views of B windows or events."""
    size = len(whole.episode) // count
    columns: dict[str, Iterable[Any]] = {}
    for name, value in vars(whole).items():
        if isinstance(value, Parts):
            columns[name] = map(Parts, value.numbers.split(size), value.categories.split(size))
        elif value is not None:
            columns[name] = value.split(size)
    rows = zip(*columns.values(), strict=True)
    return [type(whole)(**dict(zip(columns, row, strict=True))) for row in rows]


def raw_rows(dataset: Dataset, codec: Codec, places: Array, window: int) -> dict[str, Array]:
    """The raw rows of windows, [K, W+1, ...] of observations and [K, W, ...] of the rest.

    Rows after a window's end repeat its last observation and its last action, so that nothing later
    leaks in.
    """
    sizes = {"obs_num": window + 1, "obs_cat": window + 1}
    sizes |= dict.fromkeys(("act_num", "act_cat", "reward", "terminated"), window)
    if codec.spec.durations:
        sizes["duration"] = window
    shards = places["shard"]
    dataset.expect(shards)
    data: dict[str, Array] = {}
    for shard, here in grouped(shards):
        first, count = (places["first_row"] + places["start"])[here], places["count"][here]
        short = np.flatnonzero(count < window)
        for name, size in sizes.items():
            array = dataset.array(shard, name)
            rows = runs(array, first, size)
            if len(short) and array.nbytes:
                last = np.maximum(count[short] - 1 + size - window, 0)
                steps = np.minimum(np.arange(size), last[:, None])
                rows[short] = array.take(first[short, None] + steps, axis=0)
            if len(rows) == len(places):
                data[name] = rows
                continue
            if name not in data:
                data[name] = np.empty((len(places), *rows.shape[1:]), rows.dtype)
            data[name][here] = rows
    return data


def runs(array: Array, first: Index, size: int) -> Array:
    """The `size` rows from each of `first` [k] on, or the last `size` where there are fewer.

    Each run is copied as one block of bytes, in half the time of copying row by row.

    Returns:
        [k, size, ...].
    """
    shape = (len(first), size, *array.shape[1:])
    if not array.nbytes:
        return np.empty(shape, array.dtype)
    if len(array) < size:
        return array.take(np.minimum(first[:, None] + np.arange(size), len(array) - 1), axis=0)
    if isinstance(array, SlotRows):
        return array.take(np.minimum(first, len(array) - size)[:, None] + np.arange(size))
    block = np.dtype((np.void, size * array.strides[0]))
    every = np.ndarray((len(array) - size + 1,), block, array, strides=array.strides[:1])
    return every[np.minimum(first, len(every) - 1)].view(array.dtype).reshape(shape)


def coded(dataset: Dataset, codec: Codec) -> Dataset:
    """A dataset in which images are also the codes of the codec's tokenizers."""
    tokenizers = codec.observation_codec.tokenizers
    if not tokenizers or dataset.observation_codec.tokenizers:
        return dataset
    return dataset.tokenized(tokenizers)


def spread_episodes(dataset: Dataset, split: Split, limit: int | None) -> Array:
    """The numbers of the episodes of a split, in order: at most `limit`, spread evenly."""
    episodes = dataset.episodes(split)
    if limit is None or len(episodes) <= limit:
        return episodes
    return episodes[np.arange(limit) * len(episodes) // limit]


def start_parts(
    dataset: Dataset, codec: Codec, split: Split = "train", limit: int | None = None
) -> tuple[Parts, Parts]:
    """The (task, observation) of the first row of the episodes of a split, in order, [n, ...]: of
    at most `limit` episodes, spread evenly.
    """
    episodes = spread_episodes(dataset, split, limit)
    return _parts(dataset, codec, episodes, np.zeros(len(episodes), np.int64))


def observation_parts(
    dataset: Dataset, codec: Codec, split: Split, limit: int, seed: int
) -> tuple[Parts, Parts]:
    """The (task, observation) of at most `limit` logged observations that an action follows, drawn
    without replacement, [n, ...].
    """
    episodes = dataset.episodes(split)
    lengths = dataset.table["length"][episodes]
    ends, total = np.cumsum(lengths), int(lengths.sum())
    if not total:
        return _parts(dataset, codec, episodes, episodes)
    drawn = permute(np.arange(min(limit, total)), total, key(seed, OBSERVATIONS))
    position = np.searchsorted(ends, drawn, "right")
    return _parts(dataset, codec, episodes[position], drawn - (ends - lengths)[position])


def _parts(dataset: Dataset, codec: Codec, episodes: Array, steps: Array) -> tuple[Parts, Parts]:
    dataset = coded(dataset, codec)
    table = dataset.table[episodes]
    rows = table["first_row"] + steps
    arrays = dataset.gathered(table["shard"], {"obs_num": rows, "obs_cat": rows})
    numbers, categories = arrays["obs_num"], arrays["obs_cat"]
    options = codec.option_rows(dataset.options, dataset.option_numbers, dataset.option_values)
    task = codec.task_parts(numbers, categories, options[episodes])
    return task, codec.observation_parts(numbers, categories)
