"""Logged observations as a world's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.format.permutation import key, permute
from mesocosm.data.loading.codec import Codec
from mesocosm.model.spec import Parts

Array = NDArray[Any]
SALT = 0x0B5


def start_parts(dataset: Dataset, codec: Codec, split: Split = "train") -> tuple[Parts, Parts]:
    """The (task, observation) of the first row of every episode of a split, in order, [n, ...]."""
    episodes = dataset.episodes(split)
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
    drawn = permute(np.arange(min(limit, total)), total, key(seed, SALT))
    position = np.searchsorted(ends, drawn, "right")
    return _parts(dataset, codec, episodes[position], drawn - (ends - lengths)[position])


def _parts(dataset: Dataset, codec: Codec, episodes: Array, steps: Array) -> tuple[Parts, Parts]:
    table = dataset.table[episodes]
    rows = table["first_row"] + steps
    arrays = dataset.gathered(table["shard"], {"obs_num": rows, "obs_cat": rows})
    numbers, categories = arrays["obs_num"], arrays["obs_cat"]
    options = codec.option_rows(dataset.options, dataset.option_numbers, dataset.option_values)
    task = codec.task_parts(numbers, categories, options[episodes])
    return task, codec.observation_parts(numbers, categories)
