"""Untrained worlds over any spaces: a protocol does not ask whether a world is good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from mesocosm.data.codec import Codec, Scaling
from mesocosm.data.spaces import SpaceCodec
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.net import build
from mesocosm.model.world import World
from mesocosm.storage import Artifact, Storage

Space = gymnasium.Space[Any]
BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
TWO = spaces.Discrete(2)


def scaling(n: int) -> Scaling:
    return Scaling(np.zeros(n), np.ones(n), np.full(n, 1e-4))


def untrained(
    observation: Space = BOX,
    action: Space = TWO,
    family: str = "ensemble",
    *,
    task: tuple[str, ...] = (),
    terminal: float = 0.05,
    rewards: tuple[float, ...] | None = None,
    seed: int = 0,
    **model: Any,
) -> World:
    """A world with random weights, whose episodes end with a probability of about `terminal` a step; `model`: keys of ModelConfig."""
    o, a = SpaceCodec(observation), SpaceCodec(action, "action")
    environment = {"id": "Test-v0", "version": "0", "kwargs": {}, "task": list(task), "max_episode_steps": None, "success": None}
    rest = {"reward_values": rewards, "reward_mean": 0.0, "reward_scale": 1.0, "reward_bin": 1e-3, "durations": False, "duration_mean": 0.0}
    rest |= {"duration_scale": 1.0, "duration_bin": 1e-3, "terminal_rate": terminal}
    scalings = {"observation": scaling(o.numbers), "action": scaling(a.numbers), "options": scaling(0)}
    codec = Codec(o, a, environment, [], scalings, np.ones(o.numbers), rest)
    torch.manual_seed(seed)
    config = ModelConfig(family=family, **({"size": "10k", "members": 3, "base": False, "context": 6} | model))
    net = build(codec.spec, config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return World(net, Base(codec.spec, config), codec.to_json())


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    return untrained


@pytest.fixture
def store(root: str) -> Callable[[str, World], Artifact]:
    """Commits a world under an id."""

    def commit(id: str, world: World) -> Artifact:
        return Storage(root).make("worlds", id, {}, world.save)

    return commit
