"""Counted episodes, whose every value says where it stands, and the windows of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.model.tensors import Parts, Windows

BOX = spaces.Box(-(10**6), 10**6, (2,), np.int64)
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 40, 4, 4, 6]
Step = tuple[int, ...]
"""(episode, step)"""


def counted_episode(
    index: int, length: int, outcome: Outcome = "terminated", **rest: Any
) -> Episode:
    """Observation t of episode k is [k, t], its action t % 3, its reward t + 0.5: exact through any
    codec.
    """
    return Episode(
        index=index,
        seed=1000 + index,
        behaviour=rest.pop("behaviour", "random"),
        observations=[np.array([index, t], np.int64) for t in range(length + 1)],
        actions=[np.int64(t % 3) for t in range(length)],
        rewards=np.arange(length) + 0.5,
        outcome=outcome,
        **rest,
    )


def write_counted(folder: Path, episodes: Sequence[Episode], id: str = "d", **facts: Any) -> Path:
    """Write a dataset of counted episodes into `folder/id`."""
    defaults: dict[str, Any] = {
        "environment": Environment(id="Counted-v0", task=facts.pop("task", [])),
        "observation_space": BOX,
        "action_space": spaces.Discrete(3),
        "seed": 0,
    }
    write_dataset(folder / id, episodes, id=id, **(defaults | facts))
    return folder / id


def tags(codec: Codec, parts: Parts) -> np.ndarray[Any, Any]:
    """[..., 2]: the (episode, step) of counted observations."""
    flat = parts.numbers.reshape(-1, 2)
    none = torch.zeros(len(flat), 0, dtype=torch.int64)
    return codec.decode_observation(Parts(flat, none)).reshape(*parts.numbers.shape)


def steps_of(codec: Codec, windows: Windows) -> list[list[Step]]:
    """The transitions of each window."""
    rows = tags(codec, windows.observation)[:, :-1]
    masks = windows.mask.numpy()
    return [list(map(tuple, row[mask].tolist())) for row, mask in zip(rows, masks, strict=True)]


def transitions(codec: Codec, windows: Windows) -> list[Step]:
    return [step for window in steps_of(codec, windows) for step in window]


def every_transition(
    dataset: Dataset, split: Any = "train", part: int | None = None
) -> Counter[Step]:
    """The transitions of a split, of one of the datasets or of all."""
    return Counter(
        (int(dataset.table["index"][episode]), step)
        for episode in dataset.episodes(split)
        if part in (None, dataset.part[episode])
        for step in range(int(dataset.table["length"][episode]))
    )


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a batch."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = [] if value is None else vars(value).values()
    return [tensor for item in items for tensor in tensors(item)]


def same(a: Windows, *parts: Windows) -> bool:
    """True if the parts, one after the other, are the batch `a`."""
    joined = [torch.cat(some) for some in zip(*map(tensors, parts), strict=True)]
    return all(torch.equal(x, y) for x, y in zip(tensors(a), joined, strict=True))
