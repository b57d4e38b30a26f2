"""Planning in a world: iCEM (Pinneri et al. 2020, arXiv 2008.06389) with an agent's proposals and
its value function at the end of each plan.

A plan is a sequence of actions in the world's normalised units. Its return is the mean over the
world's members, each of which imagines the whole plan by itself. The best plans of a step, moved on
by one action, are among the candidates of the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mesocosm.errors import UsageError
from mesocosm.model import rng
from mesocosm.model.carry import Carry, Context, Prediction, StepOut
from mesocosm.model.groups import MemberGroups
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.policies.heads import flatten_batch
from mesocosm.policies.plan_state import PlanSize, PlanState
from mesocosm.policies.policy import Policy
from mesocosm.policies.possible import PossibleActions
from mesocosm.policies.value import ValueFunction

BETA = 2.0
"""Exponent of the noise's power spectrum f^-beta along a plan. It makes successive actions similar.
"""
DEVIATION = 0.5
"""Initial standard deviation of a plan's actions, in halves of the action's range; where an action
is unbounded, twice this in standard deviations of the data's actions.
"""
MOMENTUM = 0.1
"""Weight of the former distribution when it is fitted to the best plans."""
FRESH = 0.5
"""Weight of the uniform distribution over categories against that of the former best plans."""
GAMMA = 0.99
"""Discount of a step without an agent."""


WITH_AGENT, ALONE = PlanSize(5, 24, 2, 8), PlanSize(10, 48, 3)


class PlannerCodec(Protocol):
    """The part of `data.loading.codec.Codec` that a planner needs."""

    spec: Spec
    options: list[Any]
    mask: slice | None

    @property
    def observation_space(self) -> Any: ...

    @property
    def action_space(self) -> Any: ...

    def observation(self, batch: Any) -> Parts: ...

    def task(self, batch: Any, options: Sequence[Mapping[str, Any]] | None = None) -> Parts: ...

    def action(self, batch: Any) -> Parts: ...

    def action_bounds(self) -> tuple[Tensor, Tensor]: ...

    def decode_observation(self, parts: Parts, task: Parts | None = None) -> Any: ...

    def decode_action(self, parts: Parts) -> Any: ...


def check_actions(action: PartSpec) -> None:
    """Raise UsageError for actions that cannot be planned."""
    if action.texts:
        raise UsageError(
            "a planner needs actions of numbers and categories, and this world's actions hold text;"
            " use an agent without planner"
        )


class Planner:
    """Plans actions in one world, with or without an agent.

    The same state and context give the same bits in every process (on one device type, with one
    number of threads).
    """

    def __init__(
        self,
        world: World,
        codec: PlannerCodec,
        agent: tuple[Policy, ValueFunction] | None = None,
        size: PlanSize | None = None,
    ):
        """Make a planner.

        Args:
            world: The world in which plans are imagined.
            codec: The world's codec.
            agent: A policy of the world's spaces and its value function.
            size: The effort. Defaults to `WITH_AGENT` or `ALONE`.

        Raises:
            UsageError: The world's actions hold text, or the agent has other spaces.
        """
        check_actions(codec.spec.action)
        if agent is not None:
            spaces = codec.observation_space, codec.action_space
            trained = agent[0].observation_space, agent[0].action_space
            for name, space, expected in zip(
                ("observation", "action"), trained, spaces, strict=True
            ):
                if space != expected:
                    raise UsageError(
                        f"agent must have the world's {name} space {expected}, got {space}; use an"
                        " agent of this world's environment"
                    )
        self.world, self.codec, self.agent = world, codec, agent
        self.size = size or (ALONE if agent is None else WITH_AGENT)
        self.gamma = GAMMA if agent is None else agent[1].gamma
        self.memory = world.net.memory
        low, high = codec.action_bounds()
        bounded = torch.isfinite(low) & torch.isfinite(high)
        middle = torch.where(bounded, (low + high) / 2, 0.0)
        self._low, self._high = low.to(world.device), high.to(world.device)
        self._mean = torch.minimum(torch.maximum(middle, low), high).to(world.device)
        halves = torch.where(bounded, (high - low) / 2, 2.0)
        self._deviation = (DEVIATION * halves).to(world.device)
        cards = torch.tensor(codec.spec.action.categories, dtype=torch.int64)
        self._most = int(cards.max()) if len(cards) else 1
        valid = torch.arange(self._most) < cards.unsqueeze(-1)
        self._uniform = (valid / cards.unsqueeze(-1)).to(world.device)
        self._cards = cards.to(world.device)
        self.possible = PossibleActions(codec.mask, cards.to(world.device))
        self._basis = _basis(self.size.horizon).to(world.device)
        spec = codec.spec
        self._smooth = not (self.memory or spec.observation.categories)
        """True where `World.predict` replaces random steps"""

    def begin(self, batch: int, seed: int) -> PlanState:
        """The state of `batch` environments before their first step."""
        return PlanState.begin(self.codec.spec.action, self.size, batch, seed)

    @torch.inference_mode()
    def plan(self, context: Context, state: PlanState) -> tuple[Parts, PlanState]:
        """Plan the next action of B environments.

        Args:
            context: The environments so far; `member` is not used.
            state: The planner's state.

        Returns:
            Actions [B, ...], normalised, on the CPU; and the state after these actions.
        """
        device, size = self.world.device, self.size
        origin = self._origin(context)
        key = int(rng.keys(state.seed, 0, 0, state.step)) % (1 << 63)
        generator = np.random.default_rng(key)
        planned = state.planned.to(device)
        elites = state.elites.to(device)
        mean, deviation, chances = self._initial(elites, planned)
        values = torch.full(elites.numbers.shape[:2], -torch.inf, device=device)
        for iteration in range(size.iterations):
            drawn = self._draw(mean, deviation, chances, generator)
            some = [drawn]
            if iteration == 0:
                some += [elites]
                if self.agent is not None:
                    some += [self._proposals(origin, key, generator)]
            plans = _cat(some)
            plans = self.possible.first(plans, origin.observation, chances[:, 0], generator)
            returns = self._returns(origin, plans, key)
            if iteration == 0:
                former = slice(size.plans, size.plans + size.elites)
                returns[:, former] = returns[:, former].where(planned.unsqueeze(-1), -torch.inf)
            else:
                plans, returns = _cat([elites, plans]), torch.cat((values, returns), 1)
            values, best = returns.topk(size.elites, 1)
            row = torch.arange(len(best), device=device).unsqueeze(-1)
            elites = plans[row, best]
            numbers, of_best = elites.numbers, self._frequencies(elites)
            center = numbers.mean(1)
            spread = (numbers - center.unsqueeze(1)).square().mean(1).sqrt()
            mean = mean.lerp(center, 1 - MOMENTUM)
            deviation = deviation.lerp(spread, 1 - MOMENTUM)
            chances = chances.lerp(of_best, 1 - MOMENTUM)
        following = torch.arange(1, size.horizon + 1).clamp(max=size.horizon - 1)
        moved = elites[:, :, following].to("cpu")
        after = PlanState(state.seed, state.step + 1, moved, torch.ones_like(state.planned))
        return elites[:, 0, 0].to("cpu"), after

    def _origin(self, context: Context) -> Carry:
        if self.memory:
            return self.world.restore(context)
        device = self.world.device
        member = torch.zeros_like(context.member).to(device)
        return self.world.begin(context.task.to(device), context.observation.to(device), member)

    def _initial(self, elites: Parts, planned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first distribution: means and deviations [B, H, n], and chances [B, H, m, most]."""
        mask = planned[:, None, None]
        former = elites.numbers.mean(1)
        mean = torch.where(mask, former, self._mean.expand_as(former))
        deviation = self._deviation.expand_as(former)
        frequencies = self._frequencies(elites)
        uniform = self._uniform.expand_as(frequencies)
        chances = uniform.lerp(frequencies, 1 - FRESH)
        return mean, deviation, torch.where(mask.unsqueeze(-1), chances, uniform)

    def _frequencies(self, elites: Parts) -> Tensor:
        """[B, H, m, most]: the share of each category among the plans."""
        return F.one_hot(elites.categories, self._most).float().mean(1)

    def _draw(
        self, mean: Tensor, deviation: Tensor, chances: Tensor, generator: np.random.Generator
    ) -> Parts:
        """Plans [B, P, H, ...]. The same coloured noise chooses numbers and categories."""
        batch, _, n = mean.shape
        slots = n + len(self._cards)
        shape = (batch, self.size.plans, slots, len(self._basis))
        white = torch.from_numpy(generator.standard_normal(shape, np.float32)).to(mean.device)
        noise = (white @ self._basis).transpose(-1, -2)  # [B, P, H, slots]
        numbers = mean.unsqueeze(1) + deviation.unsqueeze(1) * noise[..., :n]
        numbers = torch.minimum(torch.maximum(numbers, self._low), self._high)
        u = torch.special.ndtr(noise[..., n:]).unsqueeze(-1)
        below = (u > chances.cumsum(-1).unsqueeze(1)).sum(-1)
        return Parts(numbers, torch.minimum(below, self._cards - 1))

    def _proposals(self, origin: Carry, key: int, generator: np.random.Generator) -> Parts:
        """Plans [B, proposals, H, ...] of the agent: its actions in the world, greedy in the first
        plan. Members take turns.
        """
        assert self.agent is not None
        policy, count, batch = self.agent[0], self.size.proposals, len(origin.member)
        device = origin.member.device
        rows = torch.arange(batch, device=device).repeat(count)
        member = torch.arange(count, device=device) % self.world.config.members
        member = member.repeat_interleave(batch)
        steps = _Imagined(self, origin, rows, member, key)
        actions = []
        for _ in range(self.size.horizon):
            now = steps.observation
            greedy = self.codec.decode_observation(now[:batch], steps.task[:batch])
            parts = [self.codec.action(policy.act(greedy))]
            if count > 1:
                others = self.codec.decode_observation(now[batch:], steps.task[batch:])
                parts.append(self.codec.action(policy.act(others, True, generator)))
            action = _cat(parts, 0).to(device)
            action = Parts(action.numbers.nan_to_num(), action.categories)
            actions.append(action)
            steps.step(action)
        numbers = torch.stack([action.numbers for action in actions], 1)
        categories = torch.stack([action.categories for action in actions], 1)
        return Parts(
            *(x.unflatten(0, (count, batch)).transpose(0, 1) for x in (numbers, categories))
        )

    def _returns(self, origin: Carry, plans: Parts, key: int) -> Tensor:
        """[B, P]: the mean over members of each plan's imagined return; -inf where it is not
        finite.
        """
        batch, count, horizon = plans.numbers.shape[:3]
        members, device = self.world.config.members, origin.member.device
        rows = torch.arange(batch, device=device).repeat_interleave(count * members)
        member = torch.arange(members, device=device).repeat(batch * count)
        plan = torch.arange(batch * count, device=device).repeat_interleave(members)
        flat = Parts(plans.numbers.flatten(0, 1), plans.categories.flatten(0, 1))
        steps = _Imagined(self, origin, rows, member, key)
        for h in range(horizon):
            steps.step(flat[:, h][plan])
        total = steps.total
        if self.agent is not None:
            policy, value = self.agent
            raw = self.codec.decode_observation(steps.observation, steps.task)
            flat_observation = torch.from_numpy(flatten_batch(self.codec.observation_space, raw))
            total = total + steps.weight * value(policy, flat_observation).to(device)
        mean = total.view(batch, count, members).mean(-1)
        return torch.where(mean.isfinite(), mean, -torch.inf)


class _Imagined:
    """Rows that step in a world, each with its discounted return so far.

    A world of numbers without history moves to its expected next state. Others draw it, with the
    same random numbers for all plans of one environment and member.
    """

    def __init__(self, planner: Planner, origin: Carry, rows: Tensor, member: Tensor, key: int):
        """`rows` [N] are the environments of `origin` that start, `member` [N] imagines each."""
        self._possible = planner.possible
        self._world, self._gamma, self._key = planner.world, planner.gamma, key
        self._rows, self._member, self._steps = rows, member, 0
        self._carry: Carry | None = None
        if not planner._smooth:
            self._carry = self._world.copy_rows(origin, rows, member)
        self._groups = MemberGroups(member, self._world.config.members)
        self.observation, self.task = origin.observation[rows], origin.task[rows]
        self.total = torch.zeros(len(rows), device=rows.device)
        self.weight = torch.ones_like(self.total)
        """Discount times the probability that the episode continues"""

    def step(self, action: Parts) -> None:
        """Take actions [N, ...]. One that is not possible is drawn again: the first of a plan is
        possible, later ones may not be in the observation that a member imagines.
        """
        out: Prediction | StepOut
        keys = rng.keys(self._key, self._rows, self._member, self._steps)
        if self._steps:
            u = rng.uniform(keys, rng.POSSIBLE)
            action = self._possible.anywhere(action, self.observation, u)
        if self._carry is None:
            out = self._world.predict(self.observation, action, self.task, self._groups)
            self.observation = Parts(out.numbers, self.observation.categories)
        else:
            self._carry, out = self._world.step(self._carry, action, keys, disagreement=False)
            self.observation = out.observation
        # With durations gamma is per unit of time.
        discount = self._gamma**out.duration if self._world.spec.durations else self._gamma
        self.total = self.total + self.weight * out.reward
        self.weight = self.weight * discount * (1 - out.p_terminated)
        self._steps += 1


def _cat(parts: Sequence[Parts], dim: int = 1) -> Parts:
    numbers = torch.cat([part.numbers for part in parts], dim)
    return Parts(numbers, torch.cat([part.categories for part in parts], dim))


def _basis(horizon: int) -> Tensor:
    """[F, H]: white noise [.., F] times this is Gaussian noise of unit variance along a plan whose
    power falls as f^-BETA (Timmer and Koenig 1995). The lowest frequency counts as the second.
    """
    frequency = torch.fft.rfftfreq(horizon)
    if horizon > 1:
        frequency[0] = frequency[1]
    else:
        frequency[0] = 1.0
    amplitude = torch.diag(frequency ** (-BETA / 2))
    waves = torch.cat(
        (torch.complex(amplitude, 0 * amplitude), torch.complex(0 * amplitude, amplitude))
    )
    basis = torch.fft.irfft(waves, n=horizon)
    return basis / basis.square().sum(0).sqrt()
