"""A small CartPole dataset and sweeps on it; `laws`, the synthetic tables, lies beside the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm import config
from mesocosm.data.dataset import Dataset, Environment, write_dataset
from mesocosm.data.episode import Episode
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.storage import Storage

sys.path.insert(0, str(Path(__file__).parent))

DATASET = "cart"
SMALL = (
    "model.members=1",
    "model.context=8",
    "model.base_steps=50",
    "grid.sizes=[10k,30k]",
    "grid.data=[300,600]",
    "train.batch=8",
    "train.events=12",
    "train.warmup=1",
    "train.precision=fp32",
    "train.validate_windows=64",
)


def _cart_episodes(transitions: int) -> list[Episode]:
    """Random CartPole-v1 episodes, at least so many transitions; they terminate."""
    env = gymnasium.make("CartPole-v1")
    episodes: list[Episode] = []
    while sum(map(len, episodes)) < transitions:
        k = len(episodes)
        env.action_space.seed(k)
        observations, actions, rewards, done = [env.reset(seed=k)[0]], [], [], False
        while not done:
            actions.append(env.action_space.sample())
            observation, reward, done, _, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(float(reward))
        episodes.append(Episode(k, k, "random", observations, actions, np.array(rewards), "terminated"))
    return episodes


def _cart_root(folder: Path, transitions: int = 400, **options: Any) -> str:
    """A storage root that holds the dataset `cart`."""
    env = gymnasium.make("CartPole-v1")
    storage = Storage(str(folder / "root"))
    facts: dict[str, Any] = {"environment": Environment(id="CartPole-v1"), "observation_space": env.observation_space, "action_space": env.action_space}
    facts |= options
    storage.make("datasets", DATASET, {}, lambda to: write_dataset(to, _cart_episodes(transitions), id=DATASET, seed=0, **facts) and None)
    return storage.root


@pytest.fixture(scope="session")
def cart_root() -> Callable[..., str]:
    """`cart_root(folder, transitions=400, **options of write_dataset)`"""
    return _cart_root


@pytest.fixture(scope="session")
def cart(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = _cart_root(tmp_path_factory.mktemp("cart"))
    return Dataset([Storage(root).artifact("datasets", DATASET).path])


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """The overrides of `sweep_of`."""
    return SMALL


@pytest.fixture(scope="session")
def sweep_of() -> Callable[..., SweepConfig]:
    """`sweep_of(root, *overrides)`"""

    def of(root: str, *overrides: str) -> SweepConfig:
        return config.load(SweepConfig, overrides=(f"storage.root={root}", f"data.datasets=[{DATASET}]", *SMALL, *overrides))

    return of
