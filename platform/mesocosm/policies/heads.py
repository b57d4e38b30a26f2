"""Conversion between Gymnasium spaces and the arrays of a policy network, for training and export.

A network observes `gymnasium.spaces.utils.flatten` of an observation, batched. It acts in a *head
space*: a Discrete or MultiDiscrete from 0, or a one-dimensional float32 Box, [-1, 1] where the
action is bounded. With an action mask, one Discrete numbers all actions as the mask does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

from mesocosm.datasets.masks import MASK, has_mask
from mesocosm.errors import UsageError

MAX_VALUES = 1024
"""Most values of an integer Box component that is treated as a choice."""


def map_batch(function: Callable[..., Any], *batches: Any) -> Any:
    """Apply a function to the corresponding leaves of batches in Gymnasium's vector layout.

    A leaf is an array [B, ...] or a tuple of B strings.
    """
    first = batches[0]
    if isinstance(first, dict):
        return {key: map_batch(function, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, tuple) and not isinstance(first[0], str):
        return tuple(map_batch(function, *parts) for parts in zip(*batches, strict=True))
    return function(*batches)


def stack(space: gym.Space[Any], values: Sequence[Any]) -> Any:
    """The values of a space as one batch in vector layout."""
    return concatenate(space, values, create_empty_array(space, len(values)))


def batch_size(batch: Any) -> int:
    """The number of values B in a batch in vector layout."""
    while isinstance(batch, dict) or (isinstance(batch, tuple) and not isinstance(batch[0], str)):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(batch)


def _leaves(
    space: gym.Space[Any], name: str, batch: Any = None
) -> Iterator[tuple[str, gym.Space[Any], Any]]:
    """(name, space, values) of each leaf, in Gymnasium's order; the values of `batch`, if given."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        yield name, space, batch
        return
    children = space.spaces
    for key, child in children.items() if isinstance(children, dict) else enumerate(children):
        yield from _leaves(child, f"{name}.{key}", None if batch is None else batch[key])


def _build(space: gym.Space[Any], leaves: Iterator[Any]) -> Any:
    """A value of a space from its leaves' values."""
    if isinstance(space, spaces.Dict):
        return {key: _build(child, leaves) for key, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_build(child, leaves) for child in space.spaces)
    return next(leaves)


def flat_size(space: gym.Space[Any]) -> int:
    """Width of a flattened observation.

    Raises:
        UsageError: The space has no fixed width (Sequence, Graph, ...).
    """
    if not space.is_np_flattenable:
        raise UsageError(
            f"an agent cannot observe the space {space}; use Box, Discrete, MultiDiscrete,"
            " MultiBinary, Text, Dict or Tuple"
        )
    return int(spaces.utils.flatdim(space))


def flat_space(space: gym.Space[Any]) -> spaces.Box:
    """The network's observation space: unbounded, as imagined values may leave the real bounds."""
    return spaces.Box(-np.inf, np.inf, (flat_size(space),), np.float32)


def flatten_batch(space: gym.Space[Any], batch: Any) -> NDArray[np.float32]:
    """Flatten observations in vector layout to [B, flat_size(space)] float32.

    Each row equals `spaces.utils.flatten` of one observation.
    """
    columns: list[NDArray[Any]] = []
    for _, leaf, values in _leaves(space, "", batch):
        if isinstance(leaf, spaces.Box | spaces.MultiBinary):
            columns.append(np.reshape(values, (len(values), -1)))
        elif isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
            indices = (np.asarray(values) - leaf.start).reshape(len(values), -1)
            for column, n in zip(indices.T, _value_counts(leaf) or (), strict=True):
                columns.append(np.eye(n, dtype=np.float32)[column])
        else:
            rows: list[Any] = [spaces.utils.flatten(leaf, value) for value in values]
            columns.append(np.stack(rows))
    return np.concatenate(columns, axis=1, dtype=np.float32)


def mask_columns(space: gym.Space[Any]) -> tuple[int, int] | None:
    """The first column of the action mask in flattened observations and the one after its last;
    None without a mask.
    """
    start = 0
    for name, leaf, _ in _leaves(space, "") if has_mask(space) else ():
        if name == f".{MASK}":
            return start, start + flat_size(leaf)
        start += flat_size(leaf)
    return None


class ActionMap:
    """Conversion of head actions to actions of a space, batched in vector layout.

    The leaves must all be discrete (Discrete, MultiDiscrete, MultiBinary, integer Box of at most
    `MAX_VALUES` values a component) or all float Boxes. Other spaces raise UsageError.
    """

    counts: list[int] | None
    """The number of values of each discrete component; None for a continuous head."""
    head: gym.Space[Any]

    def __init__(self, space: gym.Space[Any], masked: bool = False):
        """`masked`: the observations have a mask of the actions, which are numbered by one
        Discrete.
        """
        self.space = space
        leaves = list(_leaves(space, "action"))
        self._leaves: list[Any] = [leaf for _, leaf, _ in leaves]
        counts = [_value_counts(leaf) for leaf in self._leaves]
        self._joint: list[int] | None = None
        if masked:
            assert None not in counts, space
            self._joint = [n for leaf_counts in counts for n in leaf_counts or ()]
            self.counts = [int(np.prod(self._joint))]
            self.head = spaces.Discrete(self.counts[0])
        elif None not in counts:
            self.counts = [n for leaf_counts in counts for n in leaf_counts or ()]
            single = isinstance(space, spaces.Discrete)
            self.head = (
                spaces.Discrete(self.counts[0]) if single else spaces.MultiDiscrete(self.counts)
            )
        elif all(_is_float(leaf) for leaf in self._leaves):
            self.counts = None
            bounds = [np.where(_bounded(leaf), 1.0, np.inf).ravel() for leaf in self._leaves]
            bound = np.concatenate(bounds, dtype=np.float32)
            self.head = spaces.Box(-bound, bound, dtype=np.float32)
        else:
            named = {name: leaf for name, leaf, _ in leaves}
            raise UsageError(
                "an agent cannot act in a space that mixes continuous with discrete parts, or"
                f" holds text or wide integers, got {named}"
            )

    def to_raw(self, actions: NDArray[Any]) -> Any:
        """Convert head actions [B] or [B, n] to a batch of actions.

        A bounded component is clipped to [-1, 1] and rescaled to its bounds. Others are clipped to
        the bounds that they have.
        """
        if self._joint is not None:
            actions = np.stack(np.unravel_index(actions.reshape(-1), self._joint), 1)
        sizes = [int(np.prod(leaf.shape)) for leaf in self._leaves]
        columns = np.split(actions.reshape(len(actions), -1), np.cumsum(sizes)[:-1], axis=1)
        raw = []
        for leaf, flat in zip(self._leaves, columns, strict=True):
            values = flat.reshape(len(flat), *leaf.shape)
            if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
                values = values + leaf.start
            elif _is_float(leaf):
                bounded = _bounded(leaf)
                low, high = (np.where(bounded, edge, 0.0) for edge in (leaf.low, leaf.high))
                scaled = low + (values.astype(np.float64) + 1.0) * (high - low) / 2.0
                values = np.clip(np.where(bounded, scaled, values), leaf.low, leaf.high)
            elif isinstance(leaf, spaces.Box):
                values = values + leaf.low
            raw.append(values.astype(leaf.dtype))
        return _build(self.space, iter(raw))

    def to_head(self, actions: Any) -> NDArray[Any]:
        """The inverse of `to_raw`: a batch of actions to head actions, float32 or int64."""
        columns: list[NDArray[Any]] = []
        for leaf, (_, _, values) in zip(
            self._leaves, _leaves(self.space, "action", actions), strict=True
        ):
            flat = np.asarray(values).reshape(len(values), -1)
            if isinstance(leaf, spaces.Discrete | spaces.MultiDiscrete):
                flat = flat - np.ravel(leaf.start)
            elif _is_float(leaf):
                bounded = _bounded(leaf).ravel()
                low, high = (np.where(bounded, x.ravel(), 0.0) for x in (leaf.low, leaf.high))
                scaled = 2.0 * (flat - low) / np.where(bounded, high - low, 1.0) - 1.0
                flat = np.where(bounded, scaled, flat)
            elif isinstance(leaf, spaces.Box):
                flat = flat - leaf.low.ravel()
            columns.append(flat)
        joined = np.concatenate(columns, axis=1)
        if isinstance(self.head, spaces.Box):
            return joined.astype(np.float32)
        head = joined.astype(np.int64)
        if self._joint is not None:
            return np.ravel_multi_index(tuple(head.T), self._joint).astype(np.int64)
        return head[:, 0] if isinstance(self.head, spaces.Discrete) else head


def _is_float(space: gym.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)


def _bounded(space: Any) -> NDArray[np.bool_]:
    return np.logical_and(space.bounded_below, space.bounded_above)


def _value_counts(space: gym.Space[Any]) -> list[int] | None:
    """Number of values of each component of a discrete space; None for other spaces."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in np.ravel(space.nvec)]
    if isinstance(space, spaces.MultiBinary):
        return [2] * int(np.prod(space.shape))
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
        counts = space.high.astype(np.int64) - space.low.astype(np.int64) + 1
        return [int(n) for n in counts.ravel()] if counts.max() <= MAX_VALUES else None
    return None
