"""Stochastic value gradients (SVG(N), Heess et al. 2015, arXiv 1510.09142) for SAC: the actor's
gradient passes through N expected steps of a world, and the critics' value of what follows.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import utils
from torch import Tensor

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.replay import Replay
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError
from mesocosm.model.groups import MemberGroups
from mesocosm.model.spec import Parts
from mesocosm.model.world import World
from mesocosm.policies.heads import ActionMap

FAMILY = "ensemble"
"""The family whose expected step is differentiable."""


def check(config: AgentConfig) -> None:
    """Raise UsageError where the config's `svg` cannot be used, whatever the world."""
    if not config.svg:
        return
    needs = (
        ("algo", "SAC", "only SAC's actor learns by a critic's gradient"),
        (
            "backend",
            "local",
            "the actor's gradient passes through a world in the learner's process",
        ),
    )
    for key, value, reason in needs:
        actual = getattr(config, key)
        if actual != value:
            raise UsageError(
                f"svg={config.svg} needs {key}={value}, got {key}={actual}, because {reason}; set"
                f" {key}={value} or svg=0"
            )


def check_spaces(
    config: AgentConfig, spaces: tuple[gym.Space[object], gym.Space[object]], family: str
) -> None:
    """Raise UsageError where `svg` cannot differentiate a world of these spaces and family."""
    if not config.svg:
        return
    for name, space in zip(("observation", "action"), spaces, strict=True):
        if SpaceCodec(space, name).categories:
            raise UsageError(
                f"svg={config.svg} needs numbers in the {name} space to differentiate, got {space};"
                " set svg=0"
            )
    if not isinstance(ActionMap(spaces[1]).head, gym.spaces.Box):
        raise UsageError(f"svg={config.svg} needs continuous actions, got {spaces[1]}; set svg=0")
    if family != FAMILY:
        raise UsageError(
            f"svg={config.svg} needs a world of model.family={FAMILY}, which has no history, got"
            f" {family}; set svg=0"
        )


def check_codec(config: AgentConfig, codec: Codec) -> None:
    """Raise UsageError where `svg` would miss a part of the world's task."""
    if config.svg and codec.options:
        names = [option.name for option in codec.options]
        raise UsageError(
            f"svg={config.svg} needs tasks that the observation holds, got the reset options"
            f" {names}; set svg=0"
        )


class Lookahead:
    """Returns of an actor over `steps` expected steps of a world, differentiable in its actions.

    Rewards are those of the imagined environment: with its penalty on disagreement, or an
    adversary's. Row i of a batch is predicted by member i modulo K.
    """

    def __init__(self, world: World, codec: Codec, config: AgentConfig, real: Replay):
        """`real`: the logged transitions, at whose observations the rows begin."""
        self.steps, self._gamma = config.svg, config.gamma
        self._world, self._real = world, real
        self._penalty = config.penalty if world.config.members > 1 else 0.0
        self._adversary = config.objective == "disagreement"
        columns = codec.number_columns
        self._body, self._task = map(torch.from_numpy, (columns.body, columns.task))
        self._order = torch.argsort(torch.cat((self._body, self._task)))
        self._mean, self._scale = _floats(columns.observation.mean, columns.observation.scale)
        space = utils.flatten_space(codec.action_space)
        assert isinstance(space, gym.spaces.Box)
        bounded = np.isfinite(space.low) & np.isfinite(space.high)  # as `heads.ActionMap`
        low, high = (np.where(bounded, edge, 0.0) for edge in (space.low, space.high))
        half = np.where(bounded, (high - low) / 2, 1.0)
        self._half, self._middle = _floats(half, (high + low) / 2)
        self._low, self._high = _floats(space.low, space.high)
        self._action_mean, self._action_scale = _floats(columns.action.mean, columns.action.scale)
        self._groups: dict[int, MemberGroups] = {}

    def starts(self, count: int) -> Tensor:
        """[N, n]: logged observations, as an agent sees them, by torch's global generator."""
        return self._real.sample(count).observation

    def soft_return(
        self,
        observation: Tensor,
        act: Callable[[Tensor], tuple[Tensor, Tensor]],
        value: Callable[[Tensor, Tensor], Tensor],
        alpha: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The discounted rewards and entropies of the next steps, with the value of what follows.

        Args:
            observation: [N, n], as an agent sees them.
            act: (head actions [N, a], their log-probabilities [N]) of observations, reparametrized.
            value: Values [N] of (observations, head actions).
            alpha: The temperature.

        Returns:
            ([N] the returns, [N] the log-probabilities of the first actions).
        """
        state, task = self._encode(observation)
        groups, first = self._groups_of(len(observation)), None
        total, weight = torch.zeros(len(observation)), torch.ones(len(observation))
        for _ in range(self.steps):
            action, log_p = act(observation)
            first = log_p if first is None else first
            apart = bool(self._penalty) or self._adversary
            encoded = Parts(self._encode_action(action), state.categories)
            out = self._world.predict(state, encoded, task, groups, disagreement=apart)
            total = total + weight * (self._reward(out.reward, out.disagreement) - alpha * log_p)
            weight = weight * (1.0 - out.p_terminated) * self._discount(out.duration)
            state = Parts(out.numbers, state.categories)
            observation = self._decode(state, task)
        action, log_p = act(observation)
        assert first is not None, "at least one step"
        return total + weight * (value(observation, action) - alpha * log_p), first

    def _reward(self, reward: Tensor, disagreement: Tensor | None) -> Tensor:
        """As `WorldVectorEnv` gives it."""
        if disagreement is None:
            return reward
        if self._adversary:
            return torch.log1p(disagreement)
        size = self._world.spec.reward_size
        return reward - size * (self._penalty * disagreement).clamp(max=1.0)

    def _discount(self, duration: Tensor) -> Tensor | float:
        return self._gamma**duration if self._world.spec.durations else self._gamma

    def _encode(self, observation: Tensor) -> tuple[Parts, Parts]:
        numbers = (observation - self._mean) / self._scale
        none = torch.zeros(len(observation), 0, dtype=torch.int64)
        return Parts(numbers[:, self._body], none), Parts(numbers[:, self._task], none)

    def _decode(self, state: Parts, task: Parts) -> Tensor:
        numbers = torch.cat((state.numbers, task.numbers), 1)[:, self._order]
        return numbers * self._scale + self._mean

    def _encode_action(self, action: Tensor) -> Tensor:
        raw = (self._middle + self._half * action).clamp(self._low, self._high)
        return (raw - self._action_mean) / self._action_scale

    def _groups_of(self, count: int) -> MemberGroups:
        if count not in self._groups:
            members = self._world.config.members
            self._groups[count] = MemberGroups(torch.arange(count) % members, members)
        return self._groups[count]


def _floats(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]
