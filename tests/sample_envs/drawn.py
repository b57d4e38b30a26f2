"""A user's own environment that renders itself."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Drawn(gymnasium.Env):
    """A point that walks on a line. `trouble` names what its third step does."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None, trouble: str = ""):
        self.render_mode, self.trouble = render_mode, trouble

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t, self.x = 0, float(self.np_random.uniform(-0.5, 0.5))
        return np.array([self.x, 0.0], np.float32), {}

    def step(self, action: Any):
        self.t += 1
        self.x += 0.2 * float(action[0])
        if self.t == 3 and self.trouble == "crash":
            raise RuntimeError("the arm fell off")
        place = np.nan if self.t == 3 and self.trouble == "nan" else self.x
        return np.array([place, self.t], np.float32), -abs(self.x), self.t == 5, False, {}

    def render(self) -> Any:
        picture = np.full((20, 60, 3), 255, np.uint8)
        column = int(np.clip(30 + 20 * self.x, 0, 59))
        picture[:, column] = (200, 30, 30)
        return picture
