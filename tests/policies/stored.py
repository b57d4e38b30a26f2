"""A stored world of CartPole-v1's spaces with random weights, and an agent of it."""

from __future__ import annotations

import gymnasium
import torch
from serve.worlds import untrained
from torch import nn

from mesocosm.policies.policy import Layout, Policy
from mesocosm.policies.value import ValueFunction
from mesocosm.store.artifacts import Storage

WORLD, AGENT, OLD = "aaaa0123aaaa0123", "feed0123feed0123", "beef0123beef0123"


def store(storage: Storage, env: str = "CartPole-v1", family: str = "ensemble") -> None:
    """Store WORLD, AGENT, which was trained in it, and OLD, an agent without a value function."""
    made = gymnasium.make(env)
    observation, action = made.observation_space, made.action_space
    world = untrained(observation, action, family, members=2)
    storage.make("worlds", WORLD, {}, world.save)
    torch.manual_seed(0)
    layers = [{"kind": "linear", "in": 4, "out": 2}]
    policy = Policy("PPO", observation, action, Layout("categorical", layers))
    value = ValueFunction("state", [nn.Sequential(nn.Linear(4, 1))], 0.9)

    def save(folder: object) -> None:
        policy.save(folder)  # type: ignore[arg-type]
        value.save(folder)  # type: ignore[arg-type]

    inputs = {"inputs": {"worlds": [WORLD]}}
    storage.make("agents", AGENT, inputs, save)
    storage.make("agents", OLD, inputs, policy.save)
