"""How rewards and terminations follow from the base's networks and from history. All families share
them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density
from mesocosm.model.ladder import BASE_WIDTH
from mesocosm.model.layers import Constant, Inputs, Linear, read
from mesocosm.model.spec import Spec
from mesocosm.model.tensors import Parts, Transition

REWARD_COMPONENTS = 2
NEVER = 1e-8
"""Probability of termination if the data never terminate: below the least of `rng.uniform`."""


class Correction(nn.Module):
    """A linear correction of K heads by the backbone's features, first zero.

    No gradient reaches the backbone: rare events and scalars were not learned on a shared trunk.
    """

    def __init__(self, members: int, features: int, outputs: int):
        super().__init__()
        output: Any = {"kind": "output", "members": members, "gain": 0.0}
        width = features / BASE_WIDTH
        self.linear = Linear(features, outputs, width=width, **output) if features else None

    def forward(self, outputs: Tensor, features: Tensor | None) -> Tensor:
        """[K, N, out] float32 outputs, corrected by the features [N, d] or [K, N, d], if any."""
        if self.linear is None or features is None:
            return outputs
        corrected: Tensor = self.linear(features.detach())
        return outputs + corrected.float()


def reward_outputs(spec: Spec) -> int:
    """The outputs of the base's reward network, which `RewardHead` reads."""
    if spec.reward_values is not None:
        return len(spec.reward_values)
    return density.PARAMS * (REWARD_COMPONENTS + (spec.reward_rare is not None))


class RewardHead(nn.Module):
    """p(r | o, a, o', history): a category if the spec lists values, otherwise a mixture. Rare
    large rewards have a component of their own, which begins with their share, mean and scale.

    `outputs` [K, N, out] in its methods are those of the base's reward network.
    """

    def __init__(self, spec: Spec, members: int, features: int):
        super().__init__()
        self.mean, self.scale = spec.reward_mean, spec.reward_scale
        values = spec.reward_values
        self.categorical = values is not None
        self.correction = Correction(members, features, reward_outputs(spec))
        self.values = Constant(torch.tensor(values or (), dtype=torch.float32))
        self.bin = Constant(torch.tensor(spec.reward_bin))
        self.spread = Constant(torch.tensor([0.0, 0.0, -0.5, 0.5, 0.0, 0.0]))
        self.gain: Constant | None = None
        if spec.reward_rare is not None:
            share, mean, scale = spec.reward_rare
            odds = math.log(REWARD_COMPONENTS * share / (1.0 - share))
            start = [0.0, 0.0, odds, -0.5, 0.5, mean, 0.0, 0.0, math.log(scale)]
            self.spread = Constant(torch.tensor(start))
            self.gain = Constant(torch.tensor([1.0] * 5 + [scale] + [1.0] * 3))

    def _mixture(self, outputs: Tensor) -> density.Mixture:
        if self.gain is not None:
            outputs = outputs * self.gain(outputs)
        return density.mixture(outputs + self.spread(outputs), self.bin(outputs))

    def log_prob(self, outputs: Tensor, features: Tensor | None, reward: Tensor) -> Tensor:
        """[K, N] float32 <= 0 of `reward` [N]: normalised, or the index of its value."""
        outputs = self.correction(outputs, features)
        if self.categorical:
            return density.categorical_log_prob(outputs, reward.long())
        return density.log_prob(self._mixture(outputs), reward)

    def draw(self, outputs: Tensor, features: Tensor | None, u: Tensor) -> Tensor:
        """[K, M] float32 raw rewards of each member's own rows, with uniforms u [K, M, 2]."""
        outputs = self.correction(outputs, features)
        if self.categorical:
            return self.values(outputs)[density.categorical(outputs, u[..., 0])]
        reward = density.sample(self._mixture(outputs), u[..., 0], torch.logit(u[..., 1]))
        return self.mean + self.scale * reward

    def expected(self, outputs: Tensor, features: Tensor | None) -> Tensor:
        """[K, M] float32: the expected raw rewards of each member's own rows; differentiable."""
        outputs = self.correction(outputs, features)
        if self.categorical:
            return F.softmax(outputs, -1) @ self.values(outputs)
        return self.mean + self.scale * density.mean(self._mixture(outputs))


class TerminationHead(nn.Module):
    """P(terminated | o, a, o', history) for K members: logit = f(o, a, task, o') + g(history).

    f is the base's termination network, g a correction that learns from the windows, f held.
    """

    def __init__(self, spec: Spec, members: int, features: int):
        super().__init__()
        self.correction = Correction(members, features, 1)
        rate = min(max(spec.terminal_rate, 1e-4), 0.5) if spec.terminal_rate > 0 else NEVER
        self.prior = Constant(torch.tensor(math.log(rate / (1.0 - rate))))

    def logit(self, outputs: Tensor, features: Tensor | None = None) -> Tensor:
        """[K, N] float32, by the base's outputs [K, N, 1]."""
        corrected: Tensor = self.correction(outputs, features)
        return corrected.squeeze(-1) + self.prior(corrected)


def head_inputs(t: Transition, following: Parts) -> Inputs:
    """The inputs of the heads, the leading dimensions joined into one."""
    parts = (t.observation, t.action, t.task, following)
    return read(*(part.flatten() for part in parts))


def bce(logit: Tensor, target: Tensor) -> Tensor:
    """-log P(target) for targets in {0, 1} that broadcast with `logit`."""
    return F.softplus(torch.where(target > 0.5, -logit, logit))
