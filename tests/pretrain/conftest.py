"""A small CartPole dataset, and the pretrain job run on it as a user would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm import config, tracking
from mesocosm.data.dataset import Environment, write_dataset
from mesocosm.data.episode import Episode
from mesocosm.pretrain.run import PretrainConfig, run
from mesocosm.storage import Artifact, Storage

DATASET = "cart"
SMALL = ("model.size=10k", "model.members=2", "model.context=8", "model.base_steps=50", "train.batch=8", "train.events=12", "train.lr=3e-3")


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


def _cart_root(folder: Path, transitions: int = 400) -> str:
    """A storage root that holds the dataset `cart`."""
    env = gymnasium.make("CartPole-v1")
    storage = Storage(str(folder / "root"))
    facts: dict[str, Any] = {"environment": Environment(id="CartPole-v1"), "observation_space": env.observation_space, "action_space": env.action_space}
    storage.make("datasets", DATASET, {}, lambda to: write_dataset(to, _cart_episodes(transitions), id=DATASET, seed=0, **facts) and None)
    return storage.root


@dataclass
class Pretrained:
    """A finished pretrain job."""

    artifact: Artifact
    folder: Path
    """The run's"""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> dict[int, list[float]]:
        """By step, every time it was trained."""
        found: dict[int, list[float]] = {}
        for line in self.lines:
            if "train/loss" in line:
                found.setdefault(line["step"], []).append(line["train/loss"])
        return found

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()


def _load(root: str, *overrides: str) -> PretrainConfig:
    return config.load(PretrainConfig, overrides=(f"storage.root={root}", f"data.datasets=[{DATASET}]", *SMALL, *overrides))


def _pretrain(root: str, *overrides: str) -> Pretrained:
    """Run the job with the small defaults and `overrides`."""
    given = _load(root, *overrides)
    with tracking.start("pretrain", given, quiet=True) as made:
        return Pretrained(run(given, made), made.folder)


@pytest.fixture(scope="session")
def cart_root() -> Callable[..., str]:
    """`cart_root(folder, transitions=400)`"""
    return _cart_root


@pytest.fixture(scope="session")
def load() -> Callable[..., PretrainConfig]:
    """`load(root, *overrides)`"""
    return _load


@pytest.fixture(scope="session")
def pretrain() -> Callable[..., Pretrained]:
    """`pretrain(root, *overrides)`"""
    return _pretrain
