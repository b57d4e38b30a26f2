"""A world of known dynamics, and policies in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from serve.worlds import untrained
from torch import nn

from mesocosm.data.loading.codec import Codec
from mesocosm.model.carry import Prediction
from mesocosm.model.groups import MemberGroups
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.policies.policy import Layout, Policy
from mesocosm.policies.value import ValueFunction

LINE = spaces.Box(-np.inf, np.inf, (1,), np.float32)
PUSH = spaces.Box(-1.0, 1.0, (1,), np.float32)
CHOICE = spaces.Discrete(3)


class KnownLine(World):
    """o' = o + push / 2 with the reward -o'^2. A choice pushes by -1, 0 or 1."""

    def predict(
        self,
        observation: Parts,
        action: Parts,
        task: Parts,
        groups: MemberGroups,
        *,
        disagreement: bool = False,
    ) -> Prediction:
        push = action.numbers if self.spec.action.numbers else action.categories - 1
        following = observation.numbers + 0.5 * push
        reward = -following.square().sum(-1)
        nothing = torch.zeros_like(reward)
        return Prediction(following, reward, nothing, nothing, None)


def line(action: Any = PUSH) -> tuple[World, Codec]:
    world = untrained(LINE, action, members=2)
    return KnownLine(world.net, world.base, world.codec), Codec.from_json(world.codec)


def agent(action: Any = PUSH, value: float = 0.0) -> tuple[Policy, ValueFunction]:
    """An agent that always does nearly nothing, whose value is `value` o."""
    head = "squashed_gaussian" if action is PUSH else "categorical"
    layers = [{"kind": "linear", "in": 1, "out": 2 if action is PUSH else 3}]
    policy = Policy("SAC", LINE, action, Layout(head, layers))  # type: ignore[arg-type]
    network = nn.Sequential(nn.Linear(1, 1))
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.zero_()
        network[0].weight.fill_(value)
        network[0].bias.zero_()
        if action is PUSH:
            policy.network.trunk[0].bias[1] = -5.0
    return policy, ValueFunction("state", [network], 0.9)


def earned(act: Any, start: float, steps: int = 12) -> float:
    """The return of a policy for batches of one on the line itself."""
    state, total = start, 0.0
    for _ in range(steps):
        action = act(np.array([[state]], np.float32))[0]
        state += 0.5 * float(action[0] if np.shape(action) else action - 1)
        total -= state**2
    return total
