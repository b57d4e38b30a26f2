"""A world as a Stable-Baselines3 `VecEnv`. Needs the `sb3` extra.

from stable_baselines3 import PPO
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.serve.sb3 import WorldVecEnv

env = WorldVecEnv(WorldVectorEnv(64, "ID", horizon=200, autoreset_mode="SameStep"))
PPO("MlpPolicy", env).learn(100_000)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from mesocosm.errors import UsageError
from mesocosm.serve.world_env import WorldVectorEnv

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise UsageError(
        "stable_baselines3 is not installed; run `pip install -e '.[sb3]'` in a checkout"
    ) from error


class WorldVecEnv(VecEnv):
    """A SAME_STEP `WorldVectorEnv` as a VecEnv.

    The info of an ended environment has "terminal_observation" and "TimeLimit.truncated".
    """

    def __init__(self, env: WorldVectorEnv):
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            mode = env.autoreset_mode.value
            raise UsageError(f"autoreset_mode must be 'SameStep' in WorldVecEnv, got {mode!r}")
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
        names = [n for n in infos if not n.startswith("_") and n not in ("final_obs", "final_info")]
        env_infos: list[dict[str, Any]] = []
        for i, ended in enumerate(done):
            source = infos["final_info"] if ended else infos
            env_infos.append({name: source[name][i] for name in names})
            if ended:
                cut = bool(truncated[i])
                final = {"terminal_observation": infos["final_obs"][i]}
                env_infos[i] |= final | {"TimeLimit.truncated": cut}
        return observation, reward.astype(np.float32), done, env_infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise UsageError(f"set_attr({attr_name!r}) is not supported; set it on WorldVectorEnv")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        raise UsageError(f"env_method({method_name!r}) is not supported; call WorldVectorEnv")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))
