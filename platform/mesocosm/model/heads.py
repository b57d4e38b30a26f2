"""The start model, the reward network and the termination network, which all families share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density
from mesocosm.model.config import ModelConfig
from mesocosm.model.decoder import Decoder, Scale, slot_order
from mesocosm.model.ladder import BASE_HIDDEN, BASE_WIDTH
from mesocosm.model.layers import Constant, Inputs, Linear, MemberMLP, read
from mesocosm.model.spec import Parts, PartSpec, Spec, TextSpan, Transition, Windows

REWARD_COMPONENTS = 2
TrainedBy = Callable[[Tensor], Tensor]


class StartModel(nn.Module):
    """p(task, o_0): a decoder over the slots of the task, then of the observation, of absolute
    values and without context; one for all members.
    """

    def __init__(self, spec: Spec, config: ModelConfig):
        super().__init__()
        self.spec = spec
        task, o = spec.task, spec.observation
        first = len(task.categories)
        texts = tuple(TextSpan(t.start + first, t.length, t.min_length) for t in o.texts)
        numbers, categories = task.numbers + o.numbers, task.categories + o.categories
        both = PartSpec(numbers, task.bins + o.bins, categories, task.texts + texts)
        order = slot_order(task) + slot_order(o, task.numbers, first)
        self.decoder = Decoder(both, order, config, members=1, inputs=0)
        self.scale = Constant(torch.ones(numbers))

    def _scale(self, like: Tensor) -> Scale:
        scale = self.scale(like)
        return Scale(scale.new_zeros(1, len(like), len(scale)), scale)

    def log_prob(self, task: Parts, observation: Parts) -> Tensor:
        """[B] float32 <= 0, of the task and o_0 [B, ...] jointly."""
        numbers = torch.cat((task.numbers, observation.numbers), -1).float()
        categories = torch.cat((task.categories, observation.categories), -1)
        return self.decoder.log_prob(None, numbers, categories, self._scale(numbers))[0].sum(-1)

    def draw(self, keys: Tensor) -> tuple[Parts, Parts]:
        """(task, o_0) for each of `keys` [B] int64."""
        drawn = self.decoder.draw(None, self._scale(keys), keys.unsqueeze(0))
        numbers, categories = (values.squeeze(0) for values in drawn)
        n, m = self.spec.task.numbers, len(self.spec.task.categories)
        return Parts(numbers[:, :n], categories[:, :m]), Parts(numbers[:, n:], categories[:, m:])


class Head(nn.Module):
    """K MLPs on (o, a, task, o'), and a linear correction by the backbone's features, first zero.

    No gradient reaches the backbone: rare events and scalars were not learned on a shared trunk.
    """

    def __init__(self, spec: Spec, members: int, hidden: int, features: int, outputs: int):
        super().__init__()
        parts = (spec.observation, spec.action, spec.task, spec.observation)
        width = hidden / BASE_HIDDEN
        self.mlp = MemberMLP(*parts, members=members, hidden=hidden, outputs=outputs, width=width)
        output: Any = {"kind": "output", "members": members, "gain": 0.0}
        width = features / BASE_WIDTH
        self.correction = Linear(features, outputs, width=width, **output) if features else None

    def correct(self, features: Tensor | None) -> Tensor | float:
        """[N, d] or [K, N, d] -> [K, N, out] float32, or 0 without history."""
        if self.correction is None or features is None:
            return 0.0
        corrected: Tensor = self.correction(features.detach())
        return corrected.float()

    def forward(self, inputs: Inputs, features: Tensor | None) -> Tensor:
        """[K, N, out] float32"""
        outputs: Tensor = self.mlp(inputs) + self.correct(features)
        return outputs


class RewardHead(nn.Module):
    """p(r | o, a, o', history): a category if the spec lists values, otherwise a mixture."""

    def __init__(self, spec: Spec, members: int, hidden: int, features: int):
        super().__init__()
        self.mean, self.scale = spec.reward_mean, spec.reward_scale
        values = spec.reward_values
        self.categorical = values is not None
        outputs = density.PARAMS * REWARD_COMPONENTS if values is None else len(values)
        self.head = Head(spec, members, hidden, features, outputs)
        self.values = Constant(torch.tensor(values or (), dtype=torch.float32))
        self.bin = Constant(torch.tensor(spec.reward_bin))
        self.spread = Constant(torch.tensor([0.0, 0.0, -0.5, 0.5, 0.0, 0.0]))

    def _mixture(self, outputs: Tensor) -> density.Mixture:
        return density.mixture(outputs + self.spread(outputs), self.bin(outputs))

    def log_prob(self, inputs: Inputs, features: Tensor | None, reward: Tensor) -> Tensor:
        """[K, N] float32 <= 0 of `reward` [N]: normalised, or the index of its value."""
        outputs = self.head(inputs, features)
        if self.categorical:
            return density.categorical_log_prob(outputs, reward.long())
        return density.log_prob(self._mixture(outputs), reward)

    def draw(self, inputs: Inputs, features: Tensor | None, u: Tensor) -> Tensor:
        """[K, M] float32 raw rewards of each member's own rows, with uniforms u [K, M, 2]."""
        outputs = self.head(inputs, features)
        if self.categorical:
            return self.values(outputs)[density.categorical(outputs, u[..., 0])]
        reward = density.sample(self._mixture(outputs), u[..., 0], torch.logit(u[..., 1]))
        return self.mean + self.scale * reward

    def expected(self, inputs: Inputs, features: Tensor | None) -> Tensor:
        """[K, M] float32: the expected raw rewards of each member's own rows; differentiable."""
        outputs = self.head(inputs, features)
        if self.categorical:
            return F.softmax(outputs, -1) @ self.values(outputs)
        return self.mean + self.scale * density.mean(self._mixture(outputs))


class TerminationHead(nn.Module):
    """P(terminated | o, a, o', history) for K members: logit = f(o, a, task, o') + g(history).

    f learns from events (terminals oversampled and weighted back), g from the windows, f held.
    """

    def __init__(self, spec: Spec, members: int, hidden: int, features: int):
        super().__init__()
        self.head = Head(spec, members, hidden, features, 1)
        rate = min(max(spec.terminal_rate, 1e-4), 0.5)
        self.prior = Constant(torch.tensor(math.log(rate / (1.0 - rate))))

    def logit(self, inputs: Inputs, features: Tensor | None = None) -> Tensor:
        """[K, N] float32"""
        outputs: Tensor = self.head(inputs, features)
        return outputs.squeeze(-1) + self.prior(outputs)

    def losses(
        self, windows: Windows, inputs: Inputs, features: Tensor | None, trained_by: TrainedBy
    ) -> tuple[Tensor, Tensor]:
        """(log-likelihood [K, N] of the windows' transitions, objective: mean over members, nats a
        transition). `trained_by` is that of `WorldNet`.
        """
        events = windows.events
        with torch.set_grad_enabled(events is None and torch.is_grad_enabled()):
            f = self.logit(inputs)
        g = self.head.correct(features)
        logit = f + (g.squeeze(-1) if isinstance(g, Tensor) else g)
        log_prob = -bce(logit, windows.terminated.flatten())
        keep = trained_by(windows.episode).unsqueeze(-1) * windows.mask.float()
        objective = -(log_prob * keep.flatten(1)).sum() / keep.numel()
        if events is not None:
            single = Transition(events.observation, events.action, events.task)
            reads = head_inputs(single, events.next_observation)
            loss = bce(self.logit(reads), events.terminated)
            weight = trained_by(events.episode) * events.weight
            objective = objective + (loss * weight).sum() / weight.numel()
        return log_prob, objective


def head_inputs(t: Transition, following: Parts) -> Inputs:
    """The inputs of the heads, the leading dimensions joined into one."""
    parts = (t.observation, t.action, t.task, following)
    return read(*(part.flatten() for part in parts))


def bce(logit: Tensor, target: Tensor) -> Tensor:
    """-log P(target) for targets in {0, 1} that broadcast with `logit`."""
    return F.softplus(torch.where(target > 0.5, -logit, logit))
