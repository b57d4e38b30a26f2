"""Episodes as arrays, and how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["terminated", "truncated", "unfinished"]
"""Ended by the environment, by a time limit, or by the budget of steps."""


@dataclass
class Episode:
    """One episode of T transitions; observations and actions are raw values of their spaces."""

    index: int
    """k: the episode is a function of (reality config, seed, k)"""
    seed: int
    """The seed of `env.reset(seed=...)`"""
    behaviour: str
    observations: list[Any]  # T+1
    actions: list[Any]  # T
    rewards: NDArray[np.float64]  # [T]
    outcome: Outcome
    durations: NDArray[np.float64] | None = None
    """[T] seconds from `info["duration"]`, where the environment gives it at every step"""
    task: dict[str, Any] = field(default_factory=dict)
    """Reset options of this episode, where `reality.task` names reset options"""
    success: bool | None = None
    """Success by `reality.success`; None if that is not set."""

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def terminated(self) -> NDArray[np.bool_]:
        """[T], true only at a terminal transition."""
        last = np.arange(len(self)) == len(self) - 1
        return last & (self.outcome == "terminated")

    @property
    def total_reward(self) -> float:
        return float(self.rewards.sum())
