"""Builders of small datasets and worlds that several packages' tests share."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.model import mup
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.net import apply_base
from mesocosm.model.world import World
from mesocosm.store.artifacts import Storage
from mesocosm.train.prepare import fitted_base

SHORT_RUN = ("train.steps=12", "train.checkpoint_every=4", "train.validate_every=6")
"""Keys of a pretraining of a few seconds."""
SMALL_WORLD = (
    "model.size=10k",
    "model.members=2",
    "model.context=8",
    "model.base_steps=50",
    "model.head_steps=50",
    "train.batch=8",
)
"""Overrides of `pretrain` for a world that trains in seconds."""


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


def cart_in_bucket(root: str, folder: Path, **options: Any) -> Storage:
    """The storage `root`, an s3:// URI, with the dataset `cart`, of which no cache holds a copy."""
    made = Storage(cart_root(folder, **options)).artifact("datasets", "cart")
    storage = Storage(root)
    storage.make(
        "datasets",
        "cart",
        {"job": "collect"},
        lambda to: shutil.copytree(made.path, to, dirs_exist_ok=True) and None,
    )
    shutil.rmtree(storage.local_path("cache"), ignore_errors=True)
    return storage


def fit_world(
    data: Dataset, model: ModelConfig, *, steps: int = 0, batch: int = 16, lr: float = 3e-3
) -> World:
    """A world of this data, trained in this process for `steps` steps of AdamW from seed 0."""
    codec = Codec.fit(data)
    model = replace(model, head_steps=max(1, min(model.head_steps, steps)))
    base = fitted_base(data, codec, model, 0)
    torch.manual_seed(0)
    net = build(codec.spec, model)
    mup.init_(net, 0)
    optimizer = torch.optim.AdamW(mup.param_groups(net, lr, 0.0))
    loader = Loader(data, codec, "train", model.context, batch, 0)
    for step in range(steps):
        windows = loader.batch(step)
        optimizer.zero_grad()
        net(windows, apply_base(base, windows)).objective.backward()
        optimizer.step()
    return World(net, base, codec.to_json())


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Return when `condition` holds; fail after `seconds`, which suit a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not true within {seconds:g} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
