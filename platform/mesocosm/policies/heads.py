"""Any Gymnasium space as what a network takes and gives: a flat float32 observation in, and one
simple action out.

A network sees `gymnasium.spaces.utils.flatten` of an observation, batched. It acts in a *head
space*, one of Discrete (from 0), MultiDiscrete (from 0) or a one-dimensional float32 Box, [-1, 1]
where the action is bounded, and `ActionMap` takes such actions to the environment's own space. The
same code runs around the environment in training and in front of the exported policy's network.
Imports no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.errors import UsageError


def flat_size(space: gym.Space[Any]) -> int:
    """Width of a flattened observation. Raises UsageError for a space of no fixed width (Sequence,
    Graph, ...).
    """
    if not space.is_np_flattenable:
        raise UsageError(
            f"an agent cannot observe a space {space}; use Box, Discrete, MultiDiscrete,"
            " MultiBinary, Text, Dict or Tuple"
        )
    return int(spaces.utils.flatdim(space))


def flat_space(space: gym.Space[Any]) -> spaces.Box:
    """What the network is told it observes. Unbounded: imagined observations may leave the real
    ones' bounds.
    """
    return spaces.Box(-np.inf, np.inf, (flat_size(space),), np.float32)


def flatten_batch(space: gym.Space[Any], batch: Any) -> NDArray[np.float32]:
    """Observations in Gymnasium's vector layout -> [B, flat_size(space)] float32, each row
    `spaces.utils.flatten` of one.
    """
    return np.concatenate(list(_columns(space, batch)), axis=1, dtype=np.float32)


def _columns(space: gym.Space[Any], batch: Any) -> Iterator[NDArray[Any]]:
    if isinstance(space, spaces.Dict):
        for key, child in space.spaces.items():
            yield from _columns(child, batch[key])
    elif isinstance(space, spaces.Tuple):
        for child, part in zip(space.spaces, batch, strict=True):
            yield from _columns(child, part)
    elif isinstance(space, spaces.Box | spaces.MultiBinary):
        values = np.asarray(batch)
        yield values.reshape(len(values), -1)
    elif isinstance(space, spaces.Discrete):
        yield _one_hot(np.asarray(batch).reshape(-1) - space.start, int(space.n))
    elif isinstance(space, spaces.MultiDiscrete):
        nvec = np.asarray(space.nvec).reshape(-1)
        indices = (np.asarray(batch) - space.start).reshape(-1, len(nvec))
        for column, n in enumerate(nvec):
            yield _one_hot(indices[:, column], int(n))
    else:
        yield np.stack([np.asarray(spaces.utils.flatten(space, value)) for value in batch])


def _one_hot(indices: NDArray[Any], n: int) -> NDArray[np.float32]:
    return np.eye(n, dtype=np.float32)[indices]


def one_batch(value: Any) -> Any:
    """A single raw value of a space as a batch of one, in vector layout."""
    if isinstance(value, Mapping):
        return {key: one_batch(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(one_batch(item) for item in value)
    return (value,) if isinstance(value, str) else np.asarray(value)[None]


def first(space: gym.Space[Any], batch: Any) -> Any:
    """The first of a batch in vector layout, as a raw value of `space`."""
    if isinstance(space, spaces.Dict):
        return {key: first(child, batch[key]) for key, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(first(child, part) for child, part in zip(space.spaces, batch, strict=True))
    return batch[0]


class ActionMap:
    """From head-space actions to raw actions of `space`, batched in vector layout.

    Leaves must be all discrete (Discrete, MultiDiscrete, MultiBinary, integer Box of up to 1024
    values a component) or all float Boxes; anything else raises UsageError.
    """

    def __init__(self, space: gym.Space[Any]):
        self.space = space
        self._leaves = list(_leaves(space, "action"))
        discrete = [_choices(leaf) for _, leaf in self._leaves]
        if all(choices is not None for choices in discrete):
            self.counts: list[int] | None = [
                int(n) for choices in discrete if choices is not None for n in choices
            ]
            single = isinstance(space, spaces.Discrete)
            self.head: gym.Space[Any] = (
                spaces.Discrete(self.counts[0]) if single else spaces.MultiDiscrete(self.counts)
            )
        elif all(
            isinstance(leaf, spaces.Box) and np.issubdtype(leaf.dtype, np.floating)
            for _, leaf in self._leaves
        ):
            self.counts = None
            bound = np.concatenate(
                [np.where(_bounded(leaf), 1.0, np.inf).reshape(-1) for _, leaf in self._leaves]
            ).astype(np.float32)
            self.head = spaces.Box(-bound, bound, dtype=np.float32)
        else:
            named = ", ".join(f"{name}: {leaf}" for name, leaf in self._leaves)
            raise UsageError(
                "an agent cannot act in a space that mixes continuous with discrete parts, or"
                f" holds text or wide integers ({named})"
            )

    def to_raw(self, actions: NDArray[Any]) -> Any:
        """Head-space actions [B] or [B, n] -> a batch of raw actions.

        A bounded component is clipped to [-1, 1] and rescaled to its bounds; others are clipped to
        the bounds that they have.
        """
        columns = actions.reshape(len(actions), -1)
        raw, rest = self._build(self.space, columns)
        assert rest.shape[1] == 0
        return raw

    def _build(self, space: gym.Space[Any], columns: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
        if isinstance(space, spaces.Dict):
            built = {}
            for key, child in space.spaces.items():
                built[key], columns = self._build(child, columns)
            return built, columns
        if isinstance(space, spaces.Tuple):
            items = []
            for child in space.spaces:
                item, columns = self._build(child, columns)
                items.append(item)
            return tuple(items), columns
        shape = space.shape
        assert shape is not None
        size = int(np.prod(shape, dtype=np.int64))
        values = columns[:, :size].reshape(len(columns), *shape)
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            values = values + space.start
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
            values = values + space.low
        elif isinstance(space, spaces.Box):
            bounded = _bounded(space)
            low, high = (np.where(bounded, edge, 0.0) for edge in (space.low, space.high))
            values = np.clip(
                np.where(
                    bounded, low + (values.astype(np.float64) + 1.0) * (high - low) / 2.0, values
                ),
                space.low,
                space.high,
            )
        return values.astype(space.dtype), columns[:, size:]


def _bounded(space: Any) -> NDArray[np.bool_]:
    return np.logical_and(space.bounded_below, space.bounded_above)


def _leaves(space: gym.Space[Any], name: str) -> Iterator[tuple[str, gym.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for key, child in space.spaces.items():
            yield from _leaves(child, f"{name}.{key}")
    elif isinstance(space, spaces.Tuple):
        for index, child in enumerate(space.spaces):
            yield from _leaves(child, f"{name}[{index}]")
    else:
        yield name, space


def _choices(space: gym.Space[Any]) -> Sequence[int] | None:
    """The number of values of each component of a discrete space; None for any other."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in np.asarray(space.nvec).reshape(-1)]
    if isinstance(space, spaces.MultiBinary):
        return [2] * int(np.prod(space.shape, dtype=np.int64))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
        counts = space.high.astype(np.int64) - space.low.astype(np.int64) + 1
        return [int(n) for n in counts.reshape(-1)] if counts.max() <= 1024 else None
    return None
