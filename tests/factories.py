"""Builders of small datasets and worlds that several packages' tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from mesocosm.datasets.dataset import Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.store.artifacts import Storage


def cart_episodes(transitions: int) -> list[Episode]:
    """Random CartPole-v1 episodes that terminate, with at least this many transitions."""
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
        episodes.append(
            Episode(k, k, "random", observations, actions, np.array(rewards), "terminated")
        )
    return episodes


def cart_root(folder: Path, transitions: int = 400, **options: Any) -> str:
    """A storage root with the dataset `cart`. `options` are arguments of `write_dataset`."""
    env = gymnasium.make("CartPole-v1")
    storage = Storage(str(folder / "root"))
    facts: dict[str, Any] = {
        "environment": Environment(id="CartPole-v1"),
        "observation_space": env.observation_space,
        "action_space": env.action_space,
    }
    facts |= options
    storage.make(
        "datasets",
        "cart",
        {},
        lambda to: (
            write_dataset(to, cart_episodes(transitions), id="cart", seed=0, **facts) and None
        ),
    )
    return storage.root
