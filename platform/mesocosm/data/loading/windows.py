"""Raw rows -> windows as training reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.data.format.dataset import Dataset, grouped
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.index import FIRST_ROW, HASH, Found, Index
from mesocosm.model.spec import Events, Parts, Windows

Array = NDArray[Any]
Tensors = TypeVar("Tensors", Windows, Events)


@dataclass(frozen=True)
class Place:
    """Where K windows lie."""

    found: Found
    """[K] episodes"""
    first: Index
    """[K] first transition within the episode"""
    length: Index
    """[K] transitions, 1..W (0: padding)"""

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, here: Index | slice) -> Place:
        return Place(
            Found(*(value[here] for value in vars(self.found).values())),
            self.first[here],
            self.length[here],
        )


def windows(dataset: Dataset, codec: Codec, place: Place, window: int) -> Windows:
    """The K windows of `place`."""
    whole: Windows | None = None
    for here, data in raw_rows(dataset, codec, place, window):
        part = _windows(codec, place[here], data, window)
        if len(part.mask) == len(place):
            return part
        if whole is None:
            whole = _each(part, lambda tensor: tensor.new_empty((len(place), *tensor.shape[1:])))
        for into, tensor in zip(_tensors(whole), _tensors(part), strict=True):
            into.numpy()[here] = tensor.numpy()
    assert whole is not None
    return whole


def batches(whole: Tensors, count: int) -> list[Tensors]:
    """[count * B, ...] -> `count` views of B windows or events."""
    columns = [tensor.unflatten(0, (count, -1)).unbind() for tensor in _tensors(whole)]
    found = []
    for row in zip(*columns, strict=True):
        tensors = iter(row)
        found.append(_each(whole, lambda _: next(tensors)))  # noqa: B023, it is called at once
    return found


def _each(old: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    """The same of other tensors; None stays."""

    def parts(of: Parts) -> Parts:
        return Parts(change(of.numbers), change(of.categories))

    changed: dict[str, Any] = {
        name: parts(value) if isinstance(value, Parts) else change(value)
        for name, value in vars(old).items()
        if value is not None
    }
    return type(old)(**changed)


def _tensors(whole: Windows | Events) -> list[Tensor]:
    parts = [value for value in vars(whole).values() if value is not None]
    return [
        tensor
        for part in parts
        for tensor in ((part.numbers, part.categories) if isinstance(part, Parts) else (part,))
    ]


def raw_rows(
    dataset: Dataset, codec: Codec, place: Place, window: int
) -> Iterator[tuple[Index | slice, dict[str, Array]]]:
    """Each shard's windows of `place`, and their raw rows by array, [k, W+1, ...] of observations
    and [k, W, ...] of the rest. Rows after a window's end repeat its last observation, and their
    actions its last action: nothing later leaks in.
    """
    names = (
        "act_num",
        "act_cat",
        "reward",
        "terminated",
        *(["duration"] if codec.spec.durations else []),
    )
    more = {"obs_num": 1, "obs_cat": 1} | dict.fromkeys(names, 0)
    dataset.expect(place.found.shards)
    for shard, here in grouped(place.found.shards):
        first, length = place.found.facts[here, FIRST_ROW] + place.first[here], place.length[here]
        short = np.flatnonzero(length < window)
        tails = {
            m: first[short, None]
            + np.minimum(np.arange(window + m), np.maximum(length[short] - 1 + m, 0)[:, None])
            for m in (0, 1)
        }
        data = {}
        for name, m in more.items():
            array = dataset.array(shard, name)
            data[name] = runs(array, first, window + m)
            if len(short) and array.nbytes:
                data[name][short] = array.take(tails[m], axis=0)
        yield here, data


def runs(array: Array, first: Index, size: int) -> Array:
    """[N, ...] -> [k, size, ...], the `size` rows from each of `first` [k] on, or the last `size`
    where there are fewer. Each is copied as the bytes that it is, which takes half the time that
    row after row does.
    """
    shape = (len(first), size, *array.shape[1:])
    if not array.nbytes:
        return np.empty(shape, array.dtype)
    if len(array) < size:
        return array.take(np.minimum(first[:, None] + np.arange(size), len(array) - 1), axis=0)
    every = np.ndarray(
        (len(array) - size + 1,),
        np.dtype((np.void, size * array.strides[0])),
        array,
        strides=array.strides[:1],
    )
    return every[np.minimum(first, len(every) - 1)].view(array.dtype).reshape(shape)


def _windows(codec: Codec, place: Place, data: dict[str, Array], window: int) -> Windows:
    numbers, categories = data["obs_num"], data["obs_cat"]
    mask = np.arange(window) < place.length[:, None]
    there, zero = torch.from_numpy(mask), torch.zeros(())
    return Windows(
        observation=codec.observation_parts(numbers, categories),
        action=codec.action_parts(data["act_num"], data["act_cat"]),
        task=codec.task_parts(numbers[:, 0], categories[:, 0], place.found.options),
        reward=torch.where(there, codec.reward(data["reward"]), zero),
        terminated=torch.from_numpy((data["terminated"] & mask).astype(np.float32)),
        duration=torch.where(there, codec.duration(data["duration"]), zero)
        if codec.spec.durations
        else torch.zeros(mask.shape),
        mask=there,
        start=torch.from_numpy((place.first == 0) & (place.length > 0)),
        episode=torch.from_numpy(place.found.facts[:, HASH].copy()),
    )
