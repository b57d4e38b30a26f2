"""Untrained worlds over any spaces, and rollouts in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from mesocosm.config import StorageConfig
from mesocosm.data.loading.codec import Codec, Scaling
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.world import World
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.world_env import WorldVectorEnv

Space = gymnasium.Space[Any]
BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
PLACE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
DICT = spaces.Dict({"place": PLACE, "room": spaces.Discrete(4)})
TWO = spaces.Discrete(2)
TOKEN = "planted-token-4f1c9a0b7d"


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
    tokenizers: tuple[Any, ...] = (),
    **model: Any,
) -> World:
    """A world with random weights, whose episodes end with probability `terminal` per step.

    `tokenizers` has one for each image, and `model` holds keys of ModelConfig.
    """
    o, a = SpaceCodec(observation, tokenizers=tokenizers), SpaceCodec(action, "action")
    environment = {"id": "Test-v0", "version": "0", "kwargs": {}, "task": list(task)}
    environment |= {"max_episode_steps": None, "success": None}
    rest = {"reward_values": rewards, "reward_mean": 0.0, "reward_scale": 1.0, "reward_bin": 1e-3}
    rest |= {"durations": False, "duration_mean": 0.0, "duration_scale": 1.0}
    rest |= {"duration_bin": 1e-3, "terminal_rate": terminal}
    sizes = {"observation": o.numbers, "action": a.numbers, "options": 0}
    scalings = {name: scaling(size) for name, size in sizes.items()}
    codec = Codec(o, a, environment, [], scalings, np.ones(o.numbers), rest)
    torch.manual_seed(seed)
    defaults = {"size": "10k", "members": 3, "base": False, "context": 6}
    config = ModelConfig(family=family, **(defaults | model))
    net, base = build(codec.spec, config), Base(codec.spec, config)
    with torch.no_grad():
        for parameter in (*net.parameters(), *base.parameters()):
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return World(net, base, codec.to_json())


def rollout(
    env: Any, steps: int, seed: int | None = 3, before: Callable[[int], None] = lambda step: None
) -> list[Any]:
    """The results of a reset and of steps with fixed actions; `before` is called at each step."""
    env.action_space.seed(0)
    results = [env.reset(seed=seed)]
    for step in range(steps):
        before(step)
        results.append(env.step(env.action_space.sample()))
    return results


def bits(value: Any) -> bytes:
    """All bytes of arrays in nested results."""
    if isinstance(value, dict):
        return b"".join(bits(value[name]) for name in sorted(value))
    if isinstance(value, tuple | list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return b"".join(map(bits, value))
    return b"|" + (b"-" if value is None else np.asarray(value).tobytes())


def played(
    env: Any, steps: int, seed: int | None = 3, before: Callable[[int], None] = lambda step: None
) -> bytes:
    """The bytes of a rollout."""
    return bits(rollout(env, steps, seed, before))


def local(world: Any, root: str, num_envs: int = 3, **arguments: Any) -> WorldVectorEnv:
    """A client of a stored world in this process."""
    return WorldVectorEnv(num_envs, world, root=root, backend="local", **arguments)


def web_config(root: str, name: str, **values: Any) -> ServeConfig:
    """A config that serves the world `rich`; `http` adds the ingress."""
    values = {"world": "rich", "cpus": 0.5} | values
    return ServeConfig(name=name, storage=StorageConfig(root), **values)
