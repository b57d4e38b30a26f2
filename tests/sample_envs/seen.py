"""An environment that sees a picture and a number, of which the third picture is larger."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Seen(gymnasium.Env[Any, Any]):
    def __init__(self) -> None:
        eye = spaces.Box(0, 255, (8, 8, 3), np.uint8)
        pose = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.observation_space = spaces.Dict({"eye": eye, "pose": pose})
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._step = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self._step += 1
        return self._observation(), 0.0, False, False, {}

    def _observation(self) -> Any:
        side = 9 if self._step == 2 else 8
        return {"eye": np.zeros((side, side, 3), np.uint8), "pose": np.ones(1, np.float32)}
