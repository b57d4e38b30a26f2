"""Variants of Gymnasium's environments: `reality.env=mesocosm.envs.builtin:reacher`.

Other examples: `items` (a table of elements), `pixels` (images), `training`, `robotics`, `browser`
and `text`. Your own needs no change here, see docs/environments.md.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

TARGET = slice(4, 6)
"""The target's x and y, in metres, in the observation of Reacher-v5."""


class reacher(gymnasium.ObservationWrapper[dict[str, Any], Any, Any]):
    """Gymnasium's Reacher-v5 with the target as the task.

    Observations are {"arm": [8] float64, "target": [2] float64}. The target is constant in an
    episode: `reality.task: [target]` makes it the start of every trajectory, and the world learns
    to draw it.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(gymnasium.make("Reacher-v5", disable_env_checker=True, **kwargs))
        box = self.env.observation_space
        assert isinstance(box, spaces.Box)
        self.observation_space = spaces.Dict(
            {"arm": _unbounded(box.shape[0] - 2), "target": _unbounded(2)}
        )

    def observation(self, observation: Any) -> dict[str, Any]:
        return {"arm": np.delete(observation, TARGET), "target": observation[TARGET].copy()}


class halfcheetah(gymnasium.ActionWrapper[Any, Any, Any]):
    """Gymnasium's HalfCheetah-v5 with noisy actuators.

    Gaussian noise of standard deviation `noise` is added to each of the six torques, in [-1, 1], at
    every step. No observation shows it, and the logged action is the one without noise: so the next
    observation has a known entropy.
    """

    def __init__(self, noise: float = 0.1, **kwargs: Any):
        super().__init__(gymnasium.make("HalfCheetah-v5", disable_env_checker=True, **kwargs))
        self.noise = noise

    def action(self, action: Any) -> Any:
        noise = self.noise * self.np_random.standard_normal(np.shape(action))
        return np.clip(action + noise, -1.0, 1.0).astype(np.float32)


def _unbounded(size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), np.float64)
