"""Episodes as arrays, and what is said of how they ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Outcome = Literal["terminated", "truncated", "unfinished"]
"""terminated: the environment ended it; truncated: a time limit did; unfinished: the budget of
steps ran out.
"""


@dataclass
class Episode:
    """One episode of T transitions. Observations and actions are raw values of their Gymnasium
    spaces.
    """

    index: int
    """k: the episode is a function of (reality config, seed, k)"""
    seed: int
    """what `env.reset(seed=...)` was given"""
    behaviour: str
    observations: list[Any]
    """T+1 raw observations"""
    actions: list[Any]
    """T raw actions"""
    rewards: NDArray[np.float64]
    """[T]"""
    outcome: Outcome
    durations: NDArray[np.float64] | None = None
    """[T] seconds from `info["duration"]`, where the environment gives it at every step"""
    task: dict[str, Any] = field(default_factory=dict)
    """reset options of this episode, where `reality.task` names reset options"""
    success: bool | None = None
    """by `reality.success`; None where it is not set"""

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def terminated(self) -> NDArray[np.bool_]:
        """[T], true only at a terminal transition."""
        flags = np.zeros(len(self), dtype=np.bool_)
        if self.outcome == "terminated" and len(self):
            flags[-1] = True
        return flags

    @property
    def total_reward(self) -> float:
        return float(self.rewards.sum())
