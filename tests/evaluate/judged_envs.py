"""Environments that fail, or that hold every kind of value, and a policy that balances a pole."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np


class Balance:
    """A hand-made CartPole policy: push towards where the pole falls."""

    observation_space = gym.make("CartPole-v1").observation_space
    action_space = gym.spaces.Discrete(2)

    def act(self, observations: Any, explore: bool = False, rng: Any = None) -> Any:
        return (observations @ np.array([0.0, 0.0, 1.0, 0.5]) > 0).astype(np.int64)

    def act_one(self, observation: Any, explore: bool = False, rng: Any = None) -> Any:
        return self.act(np.asarray(observation)[None])[0]


class Faulty(gym.Env[Any, Any]):
    """Ends after five steps; every second episode crashes, hangs or gives NaN at its third."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    episodes = 0

    def __init__(self, fault: str, every: int = 2):
        self.fault, self.every = fault, every

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.t = 0
        type(self).episodes += 1
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        value = 0.0
        if self.t == 3 and type(self).episodes % self.every == 0:
            if self.fault == "crash":
                raise RuntimeError("the arm fell off")
            if self.fault == "hang":
                time.sleep(60)
            value = np.nan
        return np.array([value], np.float32), 1.0, self.t == 5, False, {}


class Varied(gym.Env[Any, Any]):
    """Six steps of every kind of value that a world can hold."""

    observation_space = gym.spaces.Dict(
        wide=gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        narrow=gym.spaces.Box(-np.inf, np.inf, (), np.float32),
        count=gym.spaces.Box(0, 2**50, (2, 2), np.int64),
        lit=gym.spaces.Box(0, 1, (3,), np.bool_),
        mode=gym.spaces.Discrete(3, start=1),
        many=gym.spaces.MultiDiscrete([2, 5]),
        bits=gym.spaces.MultiBinary(4),
        word=gym.spaces.Text(3, min_length=0, charset="ab"),
    )
    action_space = gym.spaces.Tuple([gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))])

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t, self.slope = 0, options["slope"]
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        reward = self.slope * float(action[1].sum()) + float(action[0])
        duration = {"duration": 0.1 * self.t}
        return self.observation_space.sample(), reward, False, self.t == 6, duration


class Outside(Varied):
    """Gives a mode outside its space in the second episode."""

    episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        type(self).episodes += 1
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        if type(self).episodes == 2:
            observation["mode"] = np.int64(9)
        return observation, *rest
