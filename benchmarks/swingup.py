"""The control of bench_agents: dm_control's cartpole-swingup with every action repeated 8 times,
125 steps an episode, as PlaNet has it (Hafner et al., arXiv 1811.04551). TD-MPC2 finds that a world
model does not help on it. Needs the `bench` extra.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("MUJOCO_GL", "disable")

import gymnasium
import numpy as np
from dm_control import suite
from gymnasium.spaces import Box

REPEAT = 8


class swingup(gymnasium.Env[Any, Any]):
    """Observations: the cart's position, the pole's cosine and sine, and both velocities, [5]
    float64. A step's reward is in [0, 8].
    """

    observation_space = Box(-np.inf, np.inf, (5,), np.float64)
    action_space = Box(-1.0, 1.0, (1,), np.float64)
    spec = gymnasium.envs.registration.EnvSpec("cartpole-swingup", max_episode_steps=1000 // REPEAT)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.task = suite.load(
            "cartpole", "swingup", task_kwargs={"random": int(self.np_random.integers(2**31))}
        )
        return self._observed(self.task.reset()), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(REPEAT):
            time_step = self.task.step(action)
            total += float(time_step.reward)
            if time_step.last():
                break
        return self._observed(time_step), total, False, time_step.last(), {}

    @staticmethod
    def _observed(time_step: Any) -> Any:
        return np.concatenate(
            [time_step.observation["position"], time_step.observation["velocity"]]
        )
