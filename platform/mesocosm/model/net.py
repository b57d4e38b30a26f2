"""What the two families share: the losses of all parts of a trajectory, and the calls by which a
world steps.

A family gives dynamics: `context` (what history says of a step), `log_prob` (of a next observation)
and `draw` (one from it). The rest is here: the start model p(task, o_0), the reward and termination
networks, and the sums of nats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mesocosm.model.config import ModelConfig
from mesocosm.model.heads import RewardHead, StartModel, TerminationHead, inputs
from mesocosm.model.layers import Constant
from mesocosm.model.rng import left_out, member_mask
from mesocosm.model.spec import Parts, Spec, Windows


@dataclass(frozen=True)
class BaseOut:
    """What the frozen base says of some transitions, float32; it is made outside a DeepSpeed engine
    (`apply_base`).
    """

    change: Tensor
    """[K, ..., n]: each member's predicted normalised change o_{t+1} - o_t of the numbers"""
    scale: Tensor
    """[n]: residual_scale; a density is over r_k = (change - base_k) / scale"""


@dataclass(frozen=True)
class Transition:
    """Transitions of any leading shape [...]: what a network reads."""

    observation: Parts
    action: Parts
    task: Parts


@dataclass(frozen=True)
class Outcome:
    """What followed transitions of the same leading shape [...]."""

    observation: Parts
    """o_{t+1}; the change of the numbers is `observation.numbers - transition.observation.numbers`
    """
    duration: Tensor
    """[...] float32 normalised; ignored without `spec.durations`"""


@dataclass(frozen=True)
class Draw:
    """A sampled next step for B environments, float32."""

    observation: Parts
    """[B, ...] o_{t+1}"""
    duration: Tensor
    """[B] normalised; zeros without durations"""
    disagreement: Tensor
    """[B] `spread` of the members' predictions, not yet on the world's scale"""


@dataclass(frozen=True)
class Losses:
    """Sums over the valid transitions of a batch, so that batches and ranks add up."""

    objective: Tensor
    """What an optimiser minimises: a scalar with gradient, float32. The sum over parts of the
    members' mean nats, each member on the episodes that it keeps, divided by B * W (not by the
    count of valid transitions, so that equal slices of a batch average to the batch's own
    objective, whatever the number of ranks).
    """
    nats: dict[str, Tensor]
    """"dynamics", "reward", "termination" and "task", and "duration" where the spec has it: the sum
    of -log of the members' mean likelihood, all members on all transitions; detached, never
    negative. "task" is the nats of (task, o_0), summed over the windows that start an episode.
    """
    by_window: dict[str, Tensor]
    """The same sums for each window, [B]: windows of one episode make its own."""
    transitions: Tensor
    """Valid transitions, float32 scalar."""
    starts: Tensor
    """Windows at an episode's start, float32 scalar."""

    @property
    def per_transition(self) -> dict[str, Tensor]:
        """Nats a transition by part, and their "total"; "task" too is divided by the transitions."""
        parts = {name: value / self.transitions.clamp(min=1) for name, value in self.nats.items()}
        return parts | {"total": torch.stack(list(parts.values())).sum()}


class Cache:
    """What a family keeps between steps of a vector of environments, in columns 0 .. W-1 that all
    environments share.
    """


class WorldNet(nn.Module, ABC):
    """The trained part of a world. Its parameters may be float32 or bfloat16; densities and losses
    are float32 always.

    `memory` is W for a family with history and 0 for one without; without, `context` and `advance`
    return None.
    """

    memory: int = 0
    checkpoint_activations: bool = False
    """Recompute the backbone's blocks in the backward pass."""

    def __init__(self, spec: Spec, config: ModelConfig, *, hidden: int, features: int):
        """`hidden`: width of the reward and termination networks; `features`: width of `context`, 0
        without history.
        """
        super().__init__()
        self.spec = spec
        self.config = config
        self.members = config.members
        self.start = StartModel(spec, config)
        self.reward = RewardHead(spec, config.members, hidden, features)
        self.termination = TerminationHead(spec, config.members, hidden, features)
        self._left_out = Constant(torch.zeros(config.members, dtype=torch.bool))

    # -- what a family gives
    # -------------------------------------------------------------------------------------------

    @abstractmethod
    def context(self, transition: Transition) -> Tensor | None:
        """Windows [B, W] (the task too) -> causal features [B, W, d], in the network's dtype; None
        without history.
        """

    @abstractmethod
    def log_prob(
        self, features: Tensor | None, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> tuple[Tensor, Tensor | None]:
        """Each member's log-likelihood of outcomes of any leading shape [...]: ([K, ...] of
        o_{t+1}, slots jointly; [K, ...] of the duration given o_{t+1}, None without durations).
        float32, <= 0.
        """

    @abstractmethod
    def disagreement(
        self, features: Tensor | None, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> Tensor:
        """[...] float32: `Draw.disagreement` where o_{t+1} is known: logged, not drawn."""

    @abstractmethod
    def draw(
        self,
        features: Tensor | None,
        transition: Transition,
        base: BaseOut,
        member: Tensor,
        keys: Tensor,
    ) -> Draw:
        """One step for B environments, [B] leading; environment i draws from its own `member[i]`
        with `keys[i]` (int64).
        """

    def new_cache(self, batch: int) -> Cache | None:
        """An empty cache for `batch` environments; None without history."""
        return None

    def advance(
        self, cache: Cache | None, column: int, start_column: Tensor, token: Transition
    ) -> Tensor | None:
        """Write the step `token` ([B] leading) at `column` and give its features [B, d].
        Environment i sees columns >= start_column[i].
        """
        return None

    def rebuild(self, cache: Cache | None, start_column: Tensor, tokens: Transition) -> None:
        """Fill columns 0 .. C-1 of `cache` from `tokens` [B, C], in one pass over all of them: the
        same bits for the same tokens.
        """

    # -- what they share
    # -----------------------------------------------------------------------------------------------

    def trains_on(self, episodes: Tensor) -> None:
        """Say which episodes, by their hashes [E] int64, the training split holds: a member that
        would keep none of them keeps all.
        """
        self._left_out = Constant(left_out(episodes, self.members))

    def kept(self, episode: Tensor) -> Tensor:
        """[B] int64 hashes -> bool [K, B]: the members that train on an episode."""
        return member_mask(episode, self.members) | self._left_out(episode).unsqueeze(1)

    def forward(self, windows: Windows, base: BaseOut) -> Losses:
        """The losses of `windows`; `base` is `apply_base(base, windows)`, [K, B, W, n]. Where
        `windows.seen` is set it stands for o_t everywhere: see `unroll`.
        """
        transition, outcome = unroll(windows)
        valid = windows.mask.float()
        scale = 1.0 / (self.members * valid.numel())
        keep = self.kept(windows.episode).unsqueeze(-1) * valid
        log_k = math.log(self.members)

        def nats(log_prob: Tensor) -> Tensor:
            mixed = torch.logsumexp(log_prob.detach(), 0) - log_k
            return torch.where(windows.mask, -mixed, 0.0).sum(1).clamp(min=0.0)

        def objective(log_prob: Tensor) -> Tensor:
            return -(torch.where(windows.mask, log_prob, 0.0) * keep).sum() * scale

        features = self.context(transition)
        dynamics, duration = self.log_prob(features, transition, outcome, base)
        parts = inputs(
            transition.observation, transition.action, transition.task, outcome.observation
        )
        flat = None if features is None else features.flatten(0, 1)
        reward = self.reward.log_prob(parts, flat, windows.reward.flatten()).view(dynamics.shape)
        termination, termination_objective = self.termination.losses(
            windows, parts, flat, self.kept
        )
        start = torch.where(
            windows.start, self.start.log_prob(windows.task, windows.observation[:, 0]), 0.0
        )

        found = {
            "dynamics": nats(dynamics),
            "reward": nats(reward),
            "termination": nats(termination.view(dynamics.shape)),
            "task": -start.detach(),
        }
        total = (
            objective(dynamics)
            + objective(reward)
            + termination_objective
            - start.sum() / valid.numel()
        )
        if duration is not None:
            found["duration"] = nats(duration)
            total = total + objective(duration)
        return Losses(
            total,
            {name: each.sum() for name, each in found.items()},
            found,
            valid.sum(),
            windows.start.float().sum(),
        )


def unroll(windows: Windows) -> tuple[Transition, Outcome]:
    """The [B, W] transitions of windows, the task repeated along W. From `windows.seen`, where it
    is set, to the true o_{t+1}: history, base and heads read the noisy o_t, and the change to be
    predicted leads back from it, so that a world learns to correct its own errors (Sanchez-Gonzalez
    et al. 2020, arXiv 2002.09405).
    """
    steps = windows.mask.shape[1]
    task = Parts(
        windows.task.numbers.unsqueeze(1).expand(-1, steps, -1),
        windows.task.categories.unsqueeze(1).expand(-1, steps, -1),
    )
    transition = Transition(
        windows.observation[:, :-1] if windows.seen is None else windows.seen, windows.action, task
    )
    return transition, Outcome(windows.observation[:, 1:], windows.duration)


def apply_base(base: nn.Module, windows: Windows) -> BaseOut:
    """The frozen `base` (model/base.py) on windows, without gradient."""
    transition, _ = unroll(windows)
    scale = base.residual_scale
    assert isinstance(scale, Tensor)
    with torch.no_grad():
        return BaseOut(base(transition.observation, transition.action, transition.task), scale)


def spread(numbers: Tensor, chances: Tensor | None) -> Tensor:
    """[B] float32: how far K members are apart in what they expect of a step; 0 for one member.

    The root of the mean over slots of the members' variance: of a number's expected change in units
    of the base's residual scale ([K, B, n]), of a category's probabilities summed over its values
    ([K, B, m, C]; None: no categories). It has no ceiling. The divergence of the members' densities
    (in nats) has, log K, which sharp members reach everywhere: on a balanced pole this spread told
    the tenth of transitions with the largest errors with an AUROC of .92 to 1.0, the divergence
    with .68 to .82.
    """
    variance = (numbers - numbers.mean(0)).pow(2).mean(0).sum(-1)
    slots = numbers.shape[-1]
    if chances is not None:
        variance = variance + (chances - chances.mean(0)).pow(2).mean(0).sum((-2, -1))
        slots += chances.shape[-2]
    return (variance / slots).sqrt()


def build(spec: Spec, config: ModelConfig) -> WorldNet:
    """A new network of `config.family`, initialised from torch's global generator. Raises
    UsageError on an unknown family or size.
    """
    config.validate()
    if config.family == "sequence":
        from mesocosm.model.sequence import Sequence

        return Sequence(spec, config)
    from mesocosm.model.ensemble import Ensemble

    return Ensemble(spec, config)
