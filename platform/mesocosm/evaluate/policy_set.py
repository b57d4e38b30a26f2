"""The policies whose values are compared: those of the config, an agent's snapshots, and graded
ones.

A graded policy is the agent with noise (`BehaviourConfig.noise`). `next_noise` bisects the levels
until each fifth of the range of real returns holds enough policies.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector.utils import batch_space, iterate

from mesocosm.data.planners import planner_policy
from mesocosm.datasets.masks import mask_of
from mesocosm.envs.episode import EpisodeAct, stream
from mesocosm.errors import UsageError
from mesocosm.evaluate.metrics.ranking import fifths_of, firm
from mesocosm.policies import behaviours
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.heads import batch_size, stack
from mesocosm.policies.image_policy import ImagePolicy
from mesocosm.policies.images import encoder_of
from mesocosm.policies.policy import SNAPSHOTS, Acts, RandomPolicy, begin_episodes
from mesocosm.policies.scorer import CandidatePolicy
from mesocosm.policies.stored import policy_of
from mesocosm.store.artifacts import Artifact, Storage

AGENT = "agent"
"""Name of the judged agent among other policies. The lineage has its id."""
MOST_NOISE = 2.0
"""The most noise on a Box, in halves of its range: little better than random. Other spaces: 1."""
FINEST = 2e-3
"""Smallest difference between levels of noise."""
Space = gymnasium.Space[Any]
Rng = np.random.Generator


@dataclass(frozen=True)
class ComparedPolicy:
    """A policy to compare."""

    name: str
    policy: Acts
    iteration: int | None = None
    """Iteration of a snapshot, or the last of an agent's training: a point of its curve"""
    noise: float | None = None
    """Noise of a graded policy"""
    held_out: bool = True
    """True if none of its episodes trained the world. Otherwise its value is shown but not counted.
    """


class Noisy:
    """A policy's greedy actions with noise, in vector layout and one by one. Needs `rng`."""

    def __init__(self, policy: Acts, action_space: Space, noise: float):
        self.policy, self.noise, self.action_space = policy, noise, copy.deepcopy(action_space)
        if isinstance(policy, ImagePolicy):  # each has a memory of its own
            self.policy = policy.copied()
        self.observation_space = getattr(policy, "observation_space", None)
        self.encoder = encoder_of(policy)

    def reset(self, num_envs: int = 1, seed: int = 0) -> None:
        """Begin new episodes in `num_envs` environments."""
        begin_episodes(self.policy, num_envs, seed)

    def start(self, k: int, rng: Rng) -> None:
        """Begin episode k of one environment (`envs.episode.EpisodeAct`)."""
        if isinstance(self.policy, EpisodeAct):
            self.policy.start(k, rng)

    def __call__(self, observation: Any, rng: Rng) -> Any:
        """The action of one environment (`envs.episode.Act`)."""
        return self.act_one(observation, False, rng)

    def act(self, observations: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map observations of B environments to B actions."""
        assert rng is not None, "noise needs rng"
        actions, space = self.policy.act(observations, False, rng), self.action_space
        if _is_float(space):
            return behaviours.perturbed(actions, space, self.noise, rng).astype(actions.dtype)
        space.seed(int(rng.integers(2**31)))
        rows = iterate(batch_space(space, batch_size(actions)), actions)
        possible = mask_of(observations)
        masks = itertools.repeat(None) if possible is None else possible
        pairs = zip(rows, masks, strict=False)
        noisy = [behaviours.perturbed(row, space, self.noise, rng, mask) for row, mask in pairs]
        return stack(space, noisy)

    def act_one(self, observation: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map one observation to one action."""
        assert rng is not None, "noise needs rng"
        space = self.action_space
        space.seed(int(rng.integers(2**31)))
        action = self.policy.act_one(observation, False, rng)  # type: ignore[attr-defined]
        noisy = behaviours.perturbed(action, space, self.noise, rng, mask_of(observation))
        return noisy.astype(space.dtype) if isinstance(space, Box) else noisy


class Scripted:
    """A scripted behaviour, noisy or not, as a policy.

    An expert may remember its episode, so each environment has an expert of its own.
    """

    def __init__(self, config: BehaviourConfig, storage: Storage, spaces: tuple[Space, Space]):
        """Make one expert.

        Args:
            config: A behaviour with a `function`.
            storage: The storage.
            spaces: The environment's (observation, action) spaces.

        Raises:
            UsageError: There is no such function.
        """
        self.observation_space, self.action_space = spaces
        self._make = partial(behaviours.build, config, *spaces, storage)
        self.reset()

    def reset(self, num_envs: int = 1, seed: int = 0) -> None:
        """Begin new episodes in `num_envs` environments, with new experts."""
        self._experts = [self._make() for _ in range(num_envs)]
        for k, expert in enumerate(self._experts):
            if isinstance(expert, EpisodeAct):
                expert.start(k, stream("expert", seed, k))

    def start(self, k: int, rng: Rng) -> None:
        """Begin episode k of one environment (`envs.episode.EpisodeAct`)."""
        expert = self._experts[0]
        if isinstance(expert, EpisodeAct):
            expert.start(k, rng)

    def act(self, observations: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map observations of B environments to B actions; `rng` is needed."""
        assert rng is not None, "a scripted policy takes rng"
        batch = batch_size(observations)
        if len(self._experts) != batch:
            self.reset(batch, int(rng.integers(2**31)))
        rows = iterate(batch_space(self.observation_space, batch), observations)
        pairs = zip(self._experts, rows, strict=True)
        return stack(self.action_space, [expert(row, rng) for expert, row in pairs])

    def act_one(self, observation: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map one observation to one action; `rng` is needed."""
        assert rng is not None, "a scripted policy takes rng"
        return self(observation, rng)

    def __call__(self, observation: Any, rng: Rng) -> Any:
        """The action of one environment (`envs.episode.Act`)."""
        return self._experts[0](observation, rng)


def full(config: BehaviourConfig, storage: Storage) -> BehaviourConfig:
    """The config with the full name of its policy. Raises UsageError where there is none."""
    if config.policy is None:
        return config
    return replace(config, policy=behaviours.full_name(storage, config.policy))


def named(
    config: BehaviourConfig, storage: Storage, observation_space: Space, action_space: Space
) -> ComparedPolicy:
    """The policy of one entry of `evaluate.policies`; trained ones act greedily. Raises UsageError
    where there is no such policy.
    """
    policy: Acts
    if config.kind == "random":
        policy = RandomPolicy(copy.deepcopy(action_space))
    elif config.function is not None:
        policy = Scripted(config, storage, (observation_space, action_space))
    else:
        assert config.policy is not None
        if config.kind == "planner":
            policy = planner_policy(storage, config.policy, observation_space, action_space)
        else:
            policy = policy_of(storage, config.policy)
        if config.kind == "noisy":
            policy = noisy(policy, action_space, config.noise)
    return ComparedPolicy(behaviours.label(config), policy)


def initial_agent(agent: Artifact) -> str | None:
    """The id of the agent that an agent's training began with, its `init`, or None."""
    earlier = agent.meta.get("inputs", {}).get("agents", [])
    return earlier[0] if earlier and "rival" not in agent.meta.get("config", {}) else None


def snapshots(agent: Artifact, storage: Storage) -> list[ComparedPolicy]:
    """An agent's policies along its training, then the agent itself, the best of them. Snapshot 0
    of an agent that began with another agent is left out: it is that one.
    """
    iterations = sorted(int(path.name) for path in (agent.path / SNAPSHOTS).glob("*"))
    if initial_agent(agent) is not None:
        iterations = [i for i in iterations if i]
    last = agent.meta["config"].get("iterations", 0)  # a clone has none
    best = int(agent.meta.get("metrics", {}).get("kept_iteration", last))
    candidates = [
        ComparedPolicy(f"{AGENT}@{i}", policy_of(storage, f"{agent.name}@{i}"), iteration=i)
        for i in iterations
        if i != best
    ]
    final = ComparedPolicy(AGENT, policy_of(storage, agent.name), iteration=max(best, 0))
    return [*candidates, final]


def graded(policy: Acts, action_space: Space, noise: float) -> ComparedPolicy:
    """The agent with noise."""
    name = f"{AGENT}, noise {noise:.3g}"
    return ComparedPolicy(name, noisy(policy, action_space, noise), noise=noise)


def noisy(policy: Acts, action_space: Space, noise: float) -> Acts:
    """A trained policy with noise; a random command is one of the candidates."""
    if isinstance(policy, CandidatePolicy):
        return policy.noisy(noise)
    return Noisy(policy, action_space, noise)


def held_out(refs: Sequence[str], storage: Storage, datasets: Sequence[Artifact]) -> None:
    """Raise UsageError where an agent that is to be judged collected the world's own `datasets`:
    its value would be no test.
    """
    for ref in refs:
        if (collector := collected(ref, storage, datasets)) is not None:
            raise UsageError(
                f"agents/{collector[0]} collected {collector[1]}, which the world was trained on:"
                " its value there is no test; judge another agent"
            )


def collected(ref: str, storage: Storage, datasets: Sequence[Artifact]) -> tuple[str, str] | None:
    """(agent's id, dataset's name) where the agent `ref`, a full name, collected one of the
    datasets: itself, or as an earlier agent that it equals (`kept_former`, or snapshot 0 of one
    with `init`).
    """
    name, _, iteration = ref.partition("@")
    agent = storage.artifact("agents", name)
    same = [agent.id]
    if iteration:
        is_copy = iteration == "0" and initial_agent(agent) is not None
    else:
        is_copy = agent.meta.get("metrics", {}).get("kept_former")
    while is_copy and (earlier := agent.meta.get("inputs", {}).get("agents")):
        agent = storage.artifact("agents", earlier[0])
        same.append(agent.id)
        is_copy = agent.meta.get("metrics", {}).get("kept_former")
    for dataset in datasets:
        for id in dataset.meta.get("inputs", {}).get("agents", []):
            if id in same:
                return id, dataset.name
    return None


def next_noise(
    noises: Mapping[float, float], returns: Sequence[float], most: float
) -> float | None:
    """The level of noise to try next.

    Args:
        noises: Mean real return by the level that was tried; 0 and `most` are tried first.
        returns: Of all policies so far.
        most: The highest level.

    Returns:
        None where the policies are enough for a firm ranking, or no level can tell more.
    """
    for level in (0.0, most):
        if level not in noises:
            return level
    low, high = min(returns), max(returns)
    if high == low:
        return None
    counts = fifths_of(returns)
    if firm(counts):
        return None
    steps = [(a, b) for a, b in itertools.pairwise(sorted(noises)) if b - a > FINEST]
    across: list[tuple[float, float]] = []
    for fifth in np.argsort(counts, kind="stable"):
        middle = low + (high - low) * (fifth + 0.5) / 5
        ends = [sorted((noises[a], noises[b])) for a, b in steps]
        across = [step for step, (x, y) in zip(steps, ends, strict=True) if x <= middle <= y]
        if across:
            break
    widest = max(across or steps, key=lambda step: step[1] - step[0], default=None)
    return None if widest is None else sum(widest) / 2


def most_noise(action_space: Space) -> float:
    """The highest level of noise of a space."""
    return MOST_NOISE if _is_float(action_space) else 1.0


def _is_float(space: Space) -> bool:
    return isinstance(space, Box) and np.issubdtype(space.dtype, np.floating)
