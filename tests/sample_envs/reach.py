"""A point that must reach a target: a Dict observation, whose `target` is the task."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Reach(gymnasium.Env[dict[str, Any], Any]):
    def __init__(self) -> None:
        box = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = spaces.Dict(
            {"position": spaces.Box(-5.0, 5.0, (2,), np.float32), "target": box}
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.target = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.position = np.zeros(2, np.float32)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.position = np.clip(self.position + 0.2 * np.asarray(action, np.float32), -5, 5).astype(
            np.float32
        )
        distance = float(np.linalg.norm(self.position - self.target))
        return self._observe(), -distance, distance < 0.1, False, {}

    def _observe(self) -> dict[str, Any]:
        return {"position": self.position.copy(), "target": self.target.copy()}


gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=30)
