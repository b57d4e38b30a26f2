"""Tasks of the DeepMind Control Suite as Gymnasium environments, each action applied twice, as in
the published curves (`reality.env=dmc:Control reality.kwargs.task=finger-spin`). Needs the `bench`
extra.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("MUJOCO_GL", "disable")

import gymnasium
import numpy as np
from dm_control import suite
from gymnasium.spaces import Box
from gymnasium.utils import seeding

REPEAT = 2
"""Environment steps of a decision."""
DOMAINS = {"cup": "ball_in_cup"}
"""Domains whose name in the published curves is not the suite's."""


class Control(gymnasium.Env[Any, Any]):
    """A task by its name in the published curves, such as `cartpole-swingup` or `cup-catch`.

    Observations are the suite's entries in its order, flattened and concatenated, [n] float64. A
    decision's reward is the sum over its two environment steps, in [0, 2]. Episodes have 1000
    environment steps, 500 decisions, and end early only where the suite's own task does.

    Args:
        task: DOMAIN-TASK, with "-" only between them.
    """

    def __init__(self, task: str):
        domain, _, name = task.partition("-")
        self._random = np.random.RandomState()
        self._env = suite.load(DOMAINS.get(domain, domain), name, {"random": self._random})
        size = sum(int(np.prod(part.shape)) for part in self._env.observation_spec().values())
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float64)
        bounds = self._env.action_spec()
        self.action_space = Box(
            bounds.minimum.astype(np.float32), bounds.maximum.astype(np.float32), dtype=np.float32
        )
        self.spec = gymnasium.envs.registration.EnvSpec(
            f"dmc/{task}", max_episode_steps=1000 // REPEAT
        )
        self._np_random, self._np_random_seed = seeding.np_random()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._random.seed(int(self.np_random.integers(2**31)))
        return _flat(self._env.reset()), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(REPEAT):
            time_step = self._env.step(action)
            total += float(time_step.reward)
            if time_step.last():
                break
        ended = time_step.last()
        terminated = ended and time_step.discount == 0.0
        return _flat(time_step), total, terminated, ended and not terminated, {}

    def close(self) -> None:
        self._env.close()


def _flat(time_step: Any) -> Any:
    return np.concatenate(
        [np.ravel(value) for value in time_step.observation.values()], dtype=np.float64
    )
