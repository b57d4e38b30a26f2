"""Robot arms that move objects. They need the extra `robotics`.

The tasks of gymnasium-robotics need no wrapper: `reality.env=gymnasium_robotics:FetchPush-v4` has
its goal in the observation. `MetaWorld` gives Meta-World's tasks that form.
"""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled

from mesocosm.envs.api import package_versions
from mesocosm.errors import UsageError, nearest

Observation = dict[str, Any]
SCALE = 10.0
"""Meta-World's largest reward of a step."""


class MetaWorld(gymnasium.Env[Observation, Any]):
    """A task of Meta-World (https://meta-world.github.io) with its goal in the observation.

    Observations, float64: {hand [4]: position in metres and opening in [0, 1]; object [7]: position
    and quaternion; motion [11]: the change of both since the simulator's step before; goal [3]}.
    Actions: [4] in [-1, 1], three times 0.01 m of hand per simulator's step, and the effort to
    close. The reward is the task's own, in [0, 1]; an episode never terminates. The seed of a reset
    draws the object's place and the goal; `info` has `success`.

    Args:
        task: The name of a task with one object, such as "reach", "push" or "drawer-open".
        repeat: Simulator's steps (12.5 ms each) that an action lasts.

    Raises:
        UsageError: There is no such task.
        DependencyNotInstalled: Meta-World is missing.
    """

    metadata = {"render_modes": []}

    @classmethod
    def program_versions(cls) -> list[str]:
        """The versions of programs that are a part of the environment's version."""
        return package_versions("metaworld", "mujoco")

    def __init__(self, task: str = "reach", repeat: int = 5):
        try:
            tasks = importlib.import_module("metaworld").ALL_V3_ENVIRONMENTS
        except ImportError as error:
            fix = "pip install 'mesocosm[robotics]'"
            raise DependencyNotInstalled(f"Meta-World is missing; {fix}") from error
        if f"{task}-v3" not in tasks:
            names = [name.removesuffix("-v3") for name in tasks]
            raise UsageError(
                f"reality.kwargs.task must be a task of Meta-World, got {task!r}"
                f"{nearest(task, names)}"
            )
        if repeat < 1:
            raise UsageError(f"reality.kwargs.repeat must be >= 1, got {repeat}")
        self._repeat = repeat
        self._env: Any = tasks[f"{task}-v3"]()
        self._env._partially_observable = False  # the goal is in the observation,
        self._env.__dict__.pop("sawyer_observation_space", None)  # whose bounds it is clipped to
        self._env._freeze_rand_vec = False  # a reset draws a task ...
        self._env.seeded_rand_vec = True  # ... by the seed
        self._env._set_task_called = True
        self._env.max_path_length = np.inf  # the time limit is the platform's
        self.observation_space = spaces.Dict(
            {
                name: spaces.Box(-np.inf, np.inf, (size,), np.float64)
                for name, size in (("hand", 4), ("object", 7), ("motion", 11), ("goal", 3))
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._env.seed(int(self.np_random.integers(2**31)))
        observation, _ = self._env.reset()
        return _parts(observation), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self._repeat):
            observation, reward, _, _, info = self._env.step(np.asarray(action, np.float32))
            total += float(reward)
        reward = total / self._repeat / SCALE
        return _parts(observation), reward, False, False, {"success": bool(info["success"])}

    def close(self) -> None:
        """End the simulator."""
        self._env.close()


def _parts(observation: Any) -> Observation:
    """Meta-World's 39 numbers: 18 of now, 18 of the step before, and the goal."""
    now, before = observation[:11], observation[18:29]
    return {
        "hand": now[:4].copy(),
        "object": now[4:].copy(),
        "motion": now - before,
        "goal": observation[36:].copy(),
    }
