"""A world for Stable-Baselines3, which has a vector interface of its own. Needs the `sb3` extra.

from stable_baselines3 import PPO
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.sb3 import WorldVecEnv

env = WorldVecEnv(WorldVectorEnv(64, "<world id>", horizon=200, autoreset_mode="SameStep"))
PPO("MlpPolicy", env).learn(100_000)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from mesocosm.errors import UsageError
from mesocosm.serve.client import WorldVectorEnv

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise UsageError(
        "stable_baselines3 is not installed; install it with `pip install -e '.[sb3]'` in a"
        " checkout"
    ) from error


class WorldVecEnv(VecEnv):
    """A SAME_STEP `WorldVectorEnv` as a VecEnv: an ended environment's info has
    "terminal_observation" and "TimeLimit.truncated".
    """

    def __init__(self, env: WorldVectorEnv):
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise UsageError(
                f"autoreset_mode={env.autoreset_mode.value!r}: Stable-Baselines3 resets in the same"
                " step; use 'SameStep'"
            )
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        observation, _ = self.env.reset(seed=self._seeds[0])
        self._reset_seeds()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        return observation

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        observation, reward, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        names = [
            name
            for name in infos
            if not name.startswith("_") and name not in ("final_obs", "final_info")
        ]
        told: list[dict[str, Any]] = [
            {name: infos[name][i] for name in names} for i in range(self.num_envs)
        ]
        for i in np.flatnonzero(done):
            told[i] = {name: infos["final_info"][name][i] for name in names}
            told[i] |= {
                "terminal_observation": infos["final_obs"][i],
                "TimeLimit.truncated": bool(truncated[i]),
            }
        return observation, reward.astype(np.float32), done, told

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise UsageError(
            f"set_attr({attr_name!r}): a world's environments have no attributes of their own; give"
            " it to WorldVectorEnv"
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        raise UsageError(
            f"env_method({method_name!r}): a world's environments are no objects of their own; call"
            " it on WorldVectorEnv"
        )

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        return [None] * self.num_envs
