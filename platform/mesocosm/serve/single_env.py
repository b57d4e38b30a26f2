"""A world as a single Gymnasium environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector.utils import iterate

from mesocosm.errors import UsageError
from mesocosm.model.any_world import AnyWorld
from mesocosm.policies.heads import stack
from mesocosm.serve.world_env import WorldVectorEnv


class WorldEnv(gymnasium.Env[Any, Any]):
    """One imagined environment, with the arguments of `WorldVectorEnv` except `num_envs` and
    `autoreset_mode`.
    """

    def __init__(self, world: str | Path | AnyWorld = "", **arguments: Any):
        for name in {"num_envs", "autoreset_mode"} & arguments.keys():
            fix = f"got {name}={arguments[name]!r}; use gymnasium.make_vec"
            raise UsageError(f"{name} is not an argument of a single environment, {fix}")
        self._vector = WorldVectorEnv(1, world, **arguments)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space
        self.metadata = {"render_modes": []}
        self._over = False

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        observation, infos = self._vector.reset(seed=seed, options=options)
        self._over = False
        return self._first(observation), infos

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._over:
            raise ResetNeeded("the episode is over: call reset() before step()")
        batch = stack(self.action_space, [action])
        observation, reward, terminated, truncated, infos = self._vector.step(batch)
        self._over = bool(terminated[0] or truncated[0])
        info = {name: infos[name][0] for name in infos if not name.startswith("_")}
        # Gymnasium's vectors make objects of NumPy's bool.
        info |= {name: bool(flag) for name, flag in info.items() if isinstance(flag, np.bool_)}
        ends = bool(terminated[0]), bool(truncated[0])
        return self._first(observation), float(reward[0]), *ends, info

    def _first(self, batch: Any) -> Any:
        return next(iter(iterate(self._vector.observation_space, batch)))

    def close(self) -> None:
        self._vector.close()
