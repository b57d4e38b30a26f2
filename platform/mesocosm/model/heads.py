"""Start model, reward network and termination network: what both families share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model import density
from mesocosm.model.config import ModelConfig
from mesocosm.model.decoder import Decoder, Layout, Scale
from mesocosm.model.ladder import BASE_HIDDEN, BASE_WIDTH, dims
from mesocosm.model.layers import Constant, MemberLinear, MemberMLP, Read, flatten, read
from mesocosm.model.spec import Parts, Spec, TextSpan, Windows

REWARD_COMPONENTS = 2


class StartModel(nn.Module):
    """p(task, o_0): a decoder over the task's slots, then the observation's, of absolute values and
    no context; one for all members.
    """

    def __init__(self, spec: Spec, config: ModelConfig):
        super().__init__()
        self.spec = spec
        task, o = spec.task, spec.observation
        order = [("number", j) for j in range(task.numbers)] + [
            ("category", j) for j in range(len(task.categories))
        ]
        order += [("number", task.numbers + j) for j in range(o.numbers)] + [
            ("category", len(task.categories) + j) for j in range(len(o.categories))
        ]
        texts = task.texts + tuple(
            TextSpan(t.start + len(task.categories), t.length, t.min_length) for t in o.texts
        )
        layout = Layout(tuple(order), task.bins + o.bins, task.categories + o.categories, texts)
        self.decoder = Decoder(
            layout, dims(config.size), members=1, components=config.components, inputs=0
        )
        self.scale = Constant(torch.ones(len(layout.bins)))

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
        numbers, categories, _, _ = self.decoder.draw(
            None, self._scale(keys), torch.zeros_like(keys), keys
        )
        n, m = self.spec.task.numbers, len(self.spec.task.categories)
        return Parts(numbers[:, :n], categories[:, :m]), Parts(numbers[:, n:], categories[:, m:])


class Head(nn.Module):
    """K separate MLPs on (o, a, task, o'), and a correction by the backbone's features, zero at
    first. No gradient reaches the backbone: on a shared trunk, rare events and scalars were not
    learned.
    """

    def __init__(self, spec: Spec, members: int, hidden: int, features: int, outputs: int):
        super().__init__()
        parts = (spec.observation, spec.action, spec.task, spec.observation)
        self.mlp = MemberMLP(
            *parts, members=members, hidden=hidden, outputs=outputs, width=hidden / BASE_HIDDEN
        )
        width = features / BASE_WIDTH
        self.correction = (
            MemberLinear(
                members, features, outputs, "output", width=width, multiplier=1.0 / width, gain=0.0
            )
            if features
            else None
        )

    def correct(self, features: Tensor | None) -> Tensor | float:
        """[N, d] -> [K, N, out] float32, or 0 without history."""
        if self.correction is None or features is None:
            return 0.0
        corrected: Tensor = self.correction(features.detach())
        return corrected.float()


class RewardHead(nn.Module):
    """p(r | o, a, o', history) for K members: a category where the spec lists reward values, a
    discretised mixture otherwise.
    """

    def __init__(self, spec: Spec, members: int, hidden: int, features: int):
        super().__init__()
        self.members = members
        self.mean, self.scale = spec.reward_mean, spec.reward_scale
        values = spec.reward_values
        self.categorical = values is not None
        outputs = density.PARAMS * REWARD_COMPONENTS if values is None else len(values)
        self.head = Head(spec, members, hidden, features, outputs)
        self.values = Constant(torch.tensor(values or (), dtype=torch.float32))
        self.bin = Constant(torch.tensor(spec.reward_bin))
        self.spread = Constant(torch.tensor([0.0, 0.0, -0.5, 0.5, 0.0, 0.0]))

    def _outputs(self, parts: Read, features: Tensor | None) -> Tensor:
        outputs: Tensor = self.head.mlp(parts) + self.head.correct(features)
        return outputs if self.categorical else outputs + self.spread(outputs)

    def log_prob(self, parts: Read, features: Tensor | None, reward: Tensor) -> Tensor:
        """[K, N] float32 <= 0 of `reward` [N]: normalised, or the index of its value."""
        outputs = self._outputs(parts, features)
        if self.categorical:
            index = reward.long().expand(self.members, -1).unsqueeze(-1)
            return F.log_softmax(outputs, -1).gather(-1, index).squeeze(-1)
        return density.log_prob(density.mixture(outputs, self.bin(outputs)), reward)

    def draw(self, parts: Read, features: Tensor | None, member: Tensor, u: Tensor) -> Tensor:
        """[B] float32 raw rewards, by each row's member and uniforms u [B, 2]."""
        outputs = own(self._outputs(parts, features), member)
        if self.categorical:
            return self.values(outputs)[density.categorical(outputs, u[:, 0])]
        return self.mean + self.scale * density.sample(
            density.mixture(outputs, self.bin(outputs)), u[:, 0], torch.logit(u[:, 1])
        )


class TerminationHead(nn.Module):
    """P(terminated | o, a, o', history) for K members: logit = f(o, a, task, o') + g(history).

    f learns from events, where terminals are oversampled and weighted back; g learns from the
    windows, with f held fixed.
    """

    def __init__(self, spec: Spec, members: int, hidden: int, features: int):
        super().__init__()
        self.members = members
        self.head = Head(spec, members, hidden, features, 1)
        rate = min(max(spec.terminal_rate, 1e-4), 0.5)
        self.prior = Constant(torch.tensor(math.log(rate / (1.0 - rate))))

    def logit(self, parts: Read, features: Tensor | None = None) -> Tensor:
        """[K, N] float32"""
        outputs: Tensor = self.head.mlp(parts) + self.head.correct(features)
        return outputs.squeeze(-1) + self.prior(outputs)

    def losses(
        self,
        windows: Windows,
        parts: Read,
        features: Tensor | None,
        kept: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(log-likelihood [K, N] of the windows' own transitions, the scalar objective: mean over
        members, nats a transition); `kept` is `WorldNet.kept`.
        """
        terminated = windows.terminated.flatten()
        events = windows.events
        with torch.set_grad_enabled(events is None and torch.is_grad_enabled()):
            f = self.logit(parts)
        log_prob = -bce(f + self._g(features), terminated)
        keep = kept(windows.episode).unsqueeze(-1) * windows.mask.float()
        objective = -(log_prob * keep.flatten(1)).sum() / keep.numel()
        if events is not None:
            of_events = bce(
                self.logit(
                    inputs(events.observation, events.action, events.task, events.next_observation)
                ),
                events.terminated,
            )
            weight = kept(events.episode) * events.weight
            objective = objective + (of_events * weight).sum() / weight.numel()
        return log_prob, objective

    def _g(self, features: Tensor | None) -> Tensor | float:
        corrected = self.head.correct(features)
        return corrected.squeeze(-1) if isinstance(corrected, Tensor) else corrected

    def draw(
        self, parts: Read, features: Tensor | None, member: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(p [B] float32, a draw from it [B] bool), by each row's member and uniform u [B]."""
        p = torch.sigmoid(own(self.logit(parts, features), member))
        return p, u < p


def inputs(observation: Parts, action: Parts, task: Parts, next_observation: Parts) -> Read:
    """What the heads read, leading dimensions as one."""
    return read(flatten(observation), flatten(action), flatten(task), flatten(next_observation))


def bce(logit: Tensor, target: Tensor) -> Tensor:
    """-log P(target) for targets in {0, 1} that broadcast with `logit`."""
    return F.softplus(torch.where(target > 0.5, -logit, logit))


def own(values: Tensor, member: Tensor) -> Tensor:
    """Row i of [K, N, ...] from member[i]: [N, ...]."""
    rows = torch.arange(len(member), device=member.device)
    return values.flatten(0, 1).index_select(0, member * len(member) + rows)
