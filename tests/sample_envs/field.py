"""A point on a line, and two behaviours that move it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class Field(gym.Env[Any, Any]):
    """A point that moves by its action; beyond 2 it moves by the sine of five times where it is.
    `side` is where it begins: 0, or at the option.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.x = float((options or {}).get("side", 0.0)) + self.np_random.normal() / 10
        return np.array([self.x]), {}

    def step(self, action: Any) -> Any:
        self.x += float(action[0]) / 2 + (np.sin(5 * self.x) if self.x > 2 else 0.0)
        return np.array([self.x]), self.x, False, False, {}


def stay(observation: Any, rng: Any) -> Any:
    return np.clip(-observation, -1, 1)


def right(observation: Any, rng: Any) -> Any:
    return np.ones(1)
