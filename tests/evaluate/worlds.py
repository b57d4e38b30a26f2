"""An environment of known dynamics, and worlds of known error in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from factories import fit_world
from torch import Tensor

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.episode import run_episode
from mesocosm.model.carry import StepOut
from mesocosm.model.config import ModelConfig
from mesocosm.model.net import WindowLosses
from mesocosm.model.tensors import Parts, Windows
from mesocosm.model.world import World
from mesocosm.policies.policy import RandomPolicy

ACTIONS = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)
OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)


class Walk(gym.Env[Any, Any]):
    """o' = o + a in two dimensions, with noise of standard deviation `noise`. Reward o'[0]; ends
    when o'[0] > 2, or after `limit` steps.
    """

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def __init__(self, limit: int = 30, constant: bool = False, noise: float = 0.0):
        self.limit, self.constant, self.noise = limit, constant, noise

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state, self.t = self.np_random.normal(size=2), 0
        return self.state.copy(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        if not self.constant:
            noise = self.noise * self.np_random.normal(size=2)
            self.state = self.state + np.asarray(action) + noise
        ended, cut = bool(self.state[0] > 2), self.t >= self.limit
        return self.state.copy(), float(self.state[0]), ended, cut, {}


def dataset(
    folder: Path,
    episodes: list[Episode],
    environment: Environment,
    spaces: tuple[Any, Any] = (OBSERVATIONS, ACTIONS),
    valid_fraction: float = 0.5,
) -> Dataset:
    write_dataset(
        folder,
        episodes,
        id=folder.name,
        environment=environment,
        observation_space=spaces[0],
        action_space=spaces[1],
        seed=0,
        valid_fraction=valid_fraction,
    )
    return Dataset([folder])


def episodes_of(env: gym.Env[Any, Any], policy: Any, count: int, seed: int = 0) -> list[Episode]:
    """`count` real episodes of `policy`, which explores."""

    def act(observation: Any, rng: np.random.Generator) -> Any:
        return policy.act_one(observation, True, rng)

    common: dict[str, Any] = {"max_steps": None, "config": RealityConfig(env="walk")}
    return [
        run_episode(env, act, k=k, seed=seed, behaviour="random", **common) for k in range(count)
    ]


def collect(folder: Path, episodes: int, valid_fraction: float = 0.3, **kwargs: Any) -> Dataset:
    environment = Environment(id="worlds:Walk", max_episode_steps=kwargs.get("limit", 30))
    done = episodes_of(Walk(**kwargs), RandomPolicy(ACTIONS), episodes)
    return dataset(folder, done, environment, valid_fraction=valid_fraction)


def untrained_world(data: Dataset, **model: Any) -> World:
    """A world of a real family whose base is fitted and whose networks are not trained."""
    return fit_world(data, ModelConfig(size="10k", members=2, base_steps=0, **model))


@dataclass
class State:
    observation: Parts


class KnownWorld:
    """The true dynamics of `Walk`, off by `bias` a step in the first dimension and by fresh noise
    of `noise` at every look (raw units).
    """

    def __init__(self, codec: Codec, bias: float = 0.0, noise: float = 0.0):
        self.codec, self.bias, self.noise = codec.to_json(), bias, noise
        self.fitted = codec
        self.spec, self.device = codec.spec, torch.device("cpu")
        self.config = SimpleNamespace(members=2, context=4)
        self.net = SimpleNamespace(memory=0)
        self.generator = torch.Generator().manual_seed(0)
        self.steps = 0

    def losses(self, windows: Windows) -> WindowLosses:
        nothing = torch.zeros(len(windows.mask))
        return WindowLosses(nothing.sum(), {"dynamics": nothing}, windows.mask.sum())

    def begin(self, task: Parts, observation: Parts, member: Tensor) -> State:
        return State(observation)

    def step(self, carry: State, action: Parts, keys: Tensor) -> tuple[State, StepOut]:
        self.steps += len(keys)
        raw = self.fitted.decode_observation(carry.observation)
        raw = raw + self.fitted.decode_action(action) + np.array([self.bias, 0.0])
        draws = torch.randn(raw.shape, generator=self.generator, dtype=torch.float64).numpy()
        noisy = raw + self.noise * draws
        seen = torch.from_numpy(noisy[:, 0])
        p = (seen > 2).float()
        zeros = torch.zeros(len(keys))
        out = StepOut(
            self.fitted.observation(noisy), seen.float(), p > 0.5, p, zeros, zeros, p.isnan()
        )
        return State(self.fitted.observation(raw)), out


def slow(observation: Any, rng: Any) -> Any:
    """A scripted policy of `Walk`."""
    return np.array([0.1, 0.0])
