"""Errands of different pace: one that is quick and pays little, one that is slow and pays most, and
one that is slower and pays less.

By what an errand pays, and by a discount a step, `SLOW` is best. With gamma = 0.8 for a unit of
time `QUICK` for ever is worth 5, `SLOW` 2.97 and `SLOWER` 1.68.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

PRIZE = np.array([1.0, 2.0, 1.5])
DURATION = np.array([1.0, 5.0, 10.0])
QUICK, SLOW, SLOWER = range(3)


class Pace(gymnasium.Env[Any, Any]):
    """One state; an episode is cut after `errands` of them. `told`: whether infos have the
    duration.
    """

    def __init__(self, errands: int = 8, told: bool = True):
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(3)
        self.errands, self.told = errands, told

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.done = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.done += 1
        info = {"duration": float(DURATION[action])} if self.told else {}
        return np.ones(1, np.float32), float(PRIZE[action]), False, self.done >= self.errands, info


gymnasium.register("Pace-v0", entry_point=Pace)
