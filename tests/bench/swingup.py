"""The control of bench_agents: dm_control's cartpole-swingup with every action repeated 8 times, 125 steps an episode, as PlaNet has it
(Hafner et al., arXiv 1811.04551). TD-MPC2 finds that a world model does not help on it. Needs the `bench` extra."""

from __future__ import annotations

from typing import Any

import gymnasium
import shimmy  # noqa: F401 - registers dm_control's tasks

REPEAT = 8


class Repeated(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Every action is taken REPEAT times, and its rewards are summed."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(REPEAT):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def swingup() -> gymnasium.Env[Any, Any]:
    env = gymnasium.make("dm_control/cartpole-swingup-v0", disable_env_checker=True)
    return gymnasium.wrappers.TimeLimit(Repeated(env), 1000 // REPEAT)
