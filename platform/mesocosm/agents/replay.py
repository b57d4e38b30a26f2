"""Replay buffers as columns, for off-policy learning inside a world."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """N transitions, as an agent sees them."""

    observation: Tensor  # [N, n] float32, normalized
    action: Tensor  # [N, a] float32, or [N] int64 for discrete actions
    reward: Tensor  # [N] float32
    following: Tensor  # [N, n] float32; any values where the discount is 0
    discount: Tensor  # [N] float32: gamma (gamma^duration with durations), 0 after a termination


class Replay:
    """A ring buffer of the last `capacity` transitions."""

    def __init__(self, capacity: int):
        self.capacity, self.size, self._next = capacity, 0, 0
        self._columns: Columns | None = None

    def add(self, rows: Columns) -> None:
        """Append transitions. The oldest ones make room."""
        count = len(rows.reward)
        rows = Columns(*(column[-self.capacity :] for column in rows))
        if self._columns is None:
            empty = (c.new_zeros(self.capacity, *c.shape[1:]) for c in rows)
            self._columns = Columns(*empty)
        stored = len(rows.reward)
        first = self._next + count - stored
        places = (torch.arange(stored) + first) % self.capacity
        for column, values in zip(self._columns, rows, strict=True):
            column[places] = values
        self._next = (first + stored) % self.capacity
        self.size = min(self.capacity, self.size + stored)

    @property
    def observations(self) -> Tensor:
        """The observations [N, n] of all transitions, without a copy."""
        assert self._columns is not None
        return self._columns.observation[: self.size]

    def sample(self, count: int) -> Columns:
        """`count` transitions, uniformly with replacement, by torch's global generator."""
        assert self._columns is not None, "sample from an empty replay buffer"
        rows = torch.randint(self.size, (count,))
        return Columns(*(column[rows] for column in self._columns))

    def state(self) -> dict[str, object]:
        """The state for `restore`, without the empty rows (a pickled view has all of them)."""
        columns = self._columns
        held = None if columns is None else tuple(c[: self.size].clone() for c in columns)
        return {"columns": held, "next": self._next}

    def restore(self, state: dict[str, object]) -> None:
        """Continue from the state of a buffer of the same capacity."""
        columns = state["columns"]
        self._columns, self.size, self._next = None, 0, 0
        if columns is not None:
            self.add(Columns(*columns))  # type: ignore[misc]
            self._next = int(state["next"])  # type: ignore[call-overload]


def mixed(real: Replay, imagined: Replay, real_share: float, count: int) -> Columns:
    """A batch with `real_share` of its rows from `real` and the others from `imagined`.

    An empty buffer leaves its share to the other.
    """
    number = round(real_share * count)
    if not imagined.size:
        number = count
    if not real.size:
        number = 0
    parts = [b.sample(n) for b, n in ((real, number), (imagined, count - number)) if n]
    if len(parts) == 1:
        return parts[0]
    return Columns(*map(torch.cat, zip(*parts, strict=True)))
