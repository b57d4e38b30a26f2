"""The network interface that all families but `language` share: the losses of all parts of a
trajectory. Losses of texts are in `language.net`.

A family implements the dynamics. The base class adds the corrections of reward and termination by
history, and the sums of nats. The start model p(task, o_0) is part of the frozen base.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.heads import RewardHead, TerminationHead, bce, head_inputs
from mesocosm.model.layers import Constant
from mesocosm.model.rng import left_out, member_mask
from mesocosm.model.spec import Spec
from mesocosm.model.tensors import Outcome, Transition, Windows

Features = Tensor | None
"""The result of `WorldNet.context`: None without history."""


@dataclass(frozen=True)
class HeadOut:
    """The outputs of the base's reward and termination networks, float32."""

    reward: Tensor  # [K, N, out]
    termination: Tensor  # [K, N, 1]


@dataclass(frozen=True)
class BaseOut:
    """The frozen base's prediction, float32, computed outside a DeepSpeed engine (`apply_base`)."""

    change: Tensor
    """[K, ..., n]: each member's predicted normalised change o_{t+1} - o_t of the numbers"""
    scale: Tensor  # [n]: residual_scale; a density is over r_k = (change - base_k) / scale
    widening: Tensor
    """[n], and one for the duration if there is one: the factors of the densities' scales"""
    heads: HeadOut | None = None
    """None if the next observation is not known."""
    log_start: Tensor | None = None
    """[B]: log-likelihood of (task, o_0), 0 for windows that do not start an episode; None: not
    asked for
    """

    def flat(self, durations: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(shift [K, N, n], scale [n], widening [n]), float32; with one more column for the
        duration, if any.
        """
        shift, scale = self.change.flatten(1, -2).float(), self.scale.float()
        if durations:
            shift, scale = F.pad(shift, (0, 1)), F.pad(scale, (0, 1), value=1.0)
        return shift, scale, self.widening

    def widened(self, widening: Tensor) -> BaseOut:
        """The same with other factors."""
        return replace(self, widening=widening)


@dataclass(frozen=True)
class WindowLosses:
    """Sums over the valid transitions of a batch, so that batches and ranks add up."""

    objective: Tensor
    """The scalar to minimise, float32, with gradient: the sum over parts of the members' mean nats,
    each member on the episodes that it keeps, divided by B * W (not by the valid transitions: equal
    slices of a batch average to the batch's objective, whatever the number of ranks)
    """
    by_window: dict[str, Tensor]
    """[B] of "dynamics", "reward", "termination" and "task", and "duration" if the spec has it: the
    sum of -log of the members' mean likelihood, all members on all transitions; detached, >= 0.
    "task" is the nats of (task, o_0), 0 for windows that do not start an episode.
    """
    transitions: Tensor  # valid transitions, float32 scalar

    @property
    def nats(self) -> dict[str, Tensor]:
        """The sums over all windows, by part."""
        return {name: nats.sum() for name, nats in self.by_window.items()}

    @property
    def counts(self) -> dict[str, Tensor]:
        """The numbers by which nats are divided, by name: sums over all windows."""
        return {"transitions": self.transitions}


class WorldNet(nn.Module, ABC):
    """The trained part of a world. Parameters may be float32 or bfloat16; densities and losses are
    always float32.
    """

    memory: int = 0
    """W; 0 for a family without history, whose `context`, `new_cache`, `advance` return None"""
    checkpoint_activations: bool = False  # recompute the backbone's blocks in the backward pass

    def __init__(self, spec: Spec, config: ModelConfig, *, features: int):
        """`features`: of `context`."""
        super().__init__()
        self.spec = spec
        self.config = config
        self.members = config.members
        self.reward = RewardHead(spec, config.members, features)
        self.termination = TerminationHead(spec, config.members, features)
        self._left_out = Constant(torch.zeros(config.members, dtype=torch.bool))

    # A family implements these.

    @abstractmethod
    def context(self, transition: Transition) -> Features:
        """Windows [B, W] (the task too) -> causal features [B, W, d], in the network's dtype."""

    @abstractmethod
    def log_prob(
        self, features: Features, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> tuple[Tensor, Tensor | None]:
        """Each member's log-likelihood: ([K, ...] of o_{t+1}, slots jointly; [K, ...] of the
        duration given o_{t+1}, None without durations), float32, <= 0.
        """

    @abstractmethod
    def disagreement(
        self, features: Features, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> Tensor:
        """[...] float32: the `spread` of the members' predictions of an outcome, for any leading
        shape; not yet on the world's scale.
        """

    @abstractmethod
    def draw(
        self, features: Features, transition: Transition, base: BaseOut, keys: Tensor
    ) -> Outcome:
        """Sample outcomes of K groups of M environments, by each member for its own group.

        Args:
            features: [K, M, d], or None without history.
            transition: [K, M] leading.
            base: Of the groups: its change is [K, M, n].
            keys: [K, M] int64.

        Returns:
            Outcomes, [K, M] leading, float32. The duration is 0 without durations.
        """

    def expected(self, features: Features, transition: Transition, base: BaseOut) -> Outcome:
        """The numbers that `draw` expects, differentiable. Only for a family without history."""
        raise NotImplementedError

    def new_cache(self, batch: int) -> Tensor | None:
        """An empty cache for `batch` environments, in columns 0 .. W-1 that all of them share."""
        return None

    def advance(
        self, cache: Tensor | None, column: int, start_column: Tensor, token: Transition
    ) -> Tensor | None:
        """Write the step `token` ([B] leading) at `column` and return its features [B, d].
        Environment i sees columns >= start_column[i].
        """
        return None

    def rebuild(self, cache: Tensor | None, start_column: Tensor, tokens: Transition) -> None:
        """Fill columns 0 .. C-1 of `cache` from `tokens` [B, C] in one pass, for the same bits."""

    # All families share these.

    def trains_on(self, episodes: Tensor) -> None:
        """Set the episodes of the training split, by their hashes [E] int64: a member that would
        keep none of them keeps all.
        """
        self._left_out = Constant(left_out(episodes, self.members))

    def trained_by(self, episode: Tensor) -> Tensor:
        """[B] int64 hashes -> bool [K, B]: the members that train on an episode."""
        return member_mask(episode, self.members) | self._left_out(episode).unsqueeze(1)

    def held_out(self, windows: Windows, *, unseen: bool = False) -> Tensor:
        """bool [K, B, W]: the valid transitions that a member is not trained on; all of them where
        the windows are `unseen`, because they belong to another split.
        """
        if unseen:
            return windows.mask.expand(self.members, *windows.mask.shape)
        return ~self.trained_by(windows.episode).unsqueeze(-1) & windows.mask

    def forward(
        self, windows: Windows, base: BaseOut, counted: Tensor | None = None
    ) -> WindowLosses:
        """The losses of `windows`.

        Args:
            windows: [B, W].
            base: `apply_base(base, windows)`, [K, B, W, n].
            counted: bool [K, B, W], the transitions of each member that the objective counts; by
                default those of the episodes that it trains on.
        """
        transition, outcome = unroll(windows)
        valid = windows.mask.float()
        scale = 1.0 / (self.members * valid.numel())
        if counted is None:
            counted = self.trained_by(windows.episode).unsqueeze(-1)
        keep = counted * valid
        log_k = math.log(self.members)

        def nats(log_prob: Tensor) -> Tensor:
            mixed = torch.logsumexp(log_prob.detach(), 0) - log_k
            return torch.where(windows.mask, -mixed, 0.0).sum(1).clamp(min=0.0)

        def objective(log_prob: Tensor) -> Tensor:
            return -torch.where(keep > 0, log_prob, 0.0).sum() * scale

        features = self.context(transition)
        dynamics, duration = self.log_prob(features, transition, outcome, base)
        heads = base.heads
        assert heads is not None, "apply_base computes them"
        flat = None if features is None else features.flatten(0, 1)
        reward = self.reward.log_prob(heads.reward, flat, windows.reward.flatten())
        logit = self.termination.logit(heads.termination, flat)
        reward, termination = (
            log_prob.view(dynamics.shape)
            for log_prob in (reward, -bce(logit, windows.terminated.flatten()))
        )
        start = valid.new_zeros(len(valid)) if base.log_start is None else base.log_start

        by_window = {
            "dynamics": nats(dynamics),
            "reward": nats(reward),
            "termination": nats(termination),
            "task": -start,
        }
        total = objective(dynamics) + objective(reward) + objective(termination)
        if duration is not None:
            by_window["duration"] = nats(duration)
            total = total + objective(duration)
        return WindowLosses(total, by_window, valid.sum())


def unroll(windows: Windows) -> tuple[Transition, Outcome]:
    """The [B, W] transitions of windows, the task repeated along W.

    They start from `windows.seen` where it is set and end at the true o_{t+1}: history, base and
    heads read the noisy o_t, and the change to predict starts from it, so that a world learns to
    correct its own errors (Sanchez-Gonzalez et al. 2020, arXiv 2002.09405).
    """
    task = windows.task.repeat(windows.mask.shape[1])
    observation = windows.observation[:, :-1] if windows.seen is None else windows.seen
    following = Outcome(windows.observation[:, 1:], windows.duration)
    return Transition(observation, windows.action, task), following


@torch.no_grad()
def apply_base(base: Base, windows: Windows) -> BaseOut:
    """The frozen `base` on windows, without gradient."""
    transition, outcome = unroll(windows)
    change = base(transition.observation, transition.action, transition.task)
    inputs = head_inputs(transition, outcome.observation)
    heads = HeadOut(base.reward(inputs), base.termination(inputs))
    log_start = torch.zeros(len(windows.start), device=change.device)
    if log_start.device.type != "meta":  # where no number of starts is known
        first = windows.start
        log_start[first] = base.start.log_prob(windows.task[first], windows.observation[first, 0])
    return BaseOut(change, base.residual_scale, base.widening, heads, log_start)


def spread(numbers: Tensor, probabilities: Tensor | None) -> Tensor:
    """[B] float32: the distance between the expectations of K members for a step; 0 for one member.

    The root of the mean over slots of the members' variance: of a number's expected change in units
    of the base's residual scale ([K, B, n]), of a category's probabilities summed over its values
    ([K, B, m, C]; None: no categories). Sharp members reach the ceiling of the divergence of their
    densities (log K nats) everywhere: on a balanced pole it picked out the tenth of transitions
    with the largest errors with an AUROC of .68 to .82, this spread with .92 to 1.0.
    """
    variance = (numbers - numbers.mean(0)).pow(2).mean(0).sum(-1)
    slots = numbers.shape[-1]
    if probabilities is not None:
        apart = (probabilities - probabilities.mean(0)).pow(2).mean(0)
        variance = variance + apart.sum((-2, -1))
        slots += probabilities.shape[-2]
    return (variance / slots).sqrt()
