"""The policies whose values in reality and in the world are compared: those of the config, an
agent's snapshots, and graded ones.

A graded policy is the agent at its best with noise (`BehaviourConfig.noise`). How much noise makes
how bad a policy is not known beforehand, so levels are found by bisection: `next_noise` says which
to try, until each fifth of the range of real returns holds enough policies.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from mesocosm.envs.episode import Act
from mesocosm.errors import UsageError
from mesocosm.evaluate.metrics.ranking import fifths_of, firm
from mesocosm.policies import behaviours
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.heads import batch_size
from mesocosm.policies.policy import SNAPSHOTS, Acts, RandomPolicy, policy_of
from mesocosm.store.artifacts import Artifact, Storage

AGENT = "agent"
"""What the judged agent is called beside other policies; the lineage has its id."""
MOST_NOISE = 2.0
"""Of a Box: twice half its range, little better than random; of other spaces at most 1, random
altogether.
"""
FINEST = 2e-3
"""Levels of noise nearer to each other than this are not told apart."""


@dataclass(frozen=True)
class Candidate:
    name: str
    policy: Acts
    iteration: int | None = None
    """Of a snapshot, and the whole of an agent's training: a point of its curve"""
    noise: float | None = None
    """Of a graded policy"""
    held_out: bool = True
    """None of its episodes trained the world; where they did, its value is shown and is no evidence
    """


class Noisy:
    """A policy's greedy actions with noise, in vector layout and one by one."""

    def __init__(self, policy: Acts, action_space: gymnasium.Space[Any], noise: float):
        self.policy, self.noise, self.action_space = policy, noise, copy.deepcopy(action_space)
        self.observation_space = getattr(policy, "observation_space", None)
        self._batched = _real(action_space)

    def act(
        self, observations: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        assert rng is not None, "noise needs rng"
        actions = self.policy.act(observations, False, rng)
        if self._batched:
            return behaviours.perturbed(actions, self.action_space, self.noise, rng).astype(
                actions.dtype
            )
        self.action_space.seed(int(rng.integers(2**31)))
        count = batch_size(actions)
        rows = [
            behaviours.perturbed(action, self.action_space, self.noise, rng)
            for action in iterate(batch_space(self.action_space, count), actions)
        ]
        return concatenate(self.action_space, rows, create_empty_array(self.action_space, count))

    def act_one(
        self, observation: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        assert rng is not None, "noise needs rng"
        self.action_space.seed(int(rng.integers(2**31)))
        action = self.policy.act_one(observation, False, rng)  # type: ignore[attr-defined]
        noisy = behaviours.perturbed(action, self.action_space, self.noise, rng)
        return (
            noisy.astype(self.action_space.dtype) if isinstance(self.action_space, Box) else noisy
        )


class Scripted:
    """A function f(observation, rng) -> action of the user's own. Actions outside the space are
    refused, as in collection.
    """

    def __init__(
        self,
        function: Act,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
    ):
        self.function, self.observation_space, self.action_space = (
            function,
            observation_space,
            action_space,
        )

    def act(
        self, observations: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        count = batch_size(observations)
        rows = [
            self.act_one(one, explore, rng)
            for one in iterate(batch_space(self.observation_space, count), observations)
        ]
        return concatenate(self.action_space, rows, create_empty_array(self.action_space, count))

    def act_one(
        self, observation: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        assert rng is not None, "a scripted policy takes rng"
        return self.function(observation, rng)


def full(config: BehaviourConfig, storage: Storage) -> BehaviourConfig:
    """The same with the full name of its policy. Raises UsageError where there is none."""
    return (
        config
        if config.policy is None
        else replace(config, policy=behaviours.full_name(storage, config.policy))
    )


def named(
    config: BehaviourConfig,
    storage: Storage,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
) -> Candidate:
    """The policy of one entry of `evaluate.policies`; trained ones at their best. Raises UsageError
    where there is no such policy.
    """
    policy: Acts
    if config.kind == "random":
        policy = RandomPolicy(copy.deepcopy(action_space))
    elif config.function is not None:
        bare = BehaviourConfig(kind="scripted", function=config.function)
        policy = Scripted(
            behaviours.build(bare, observation_space, action_space, storage),
            observation_space,
            action_space,
        )
    else:
        assert config.policy is not None
        policy = policy_of(storage, config.policy)
    return Candidate(
        behaviours.label(config),
        Noisy(policy, action_space, config.noise) if config.kind == "noisy" else policy,
    )


def snapshots(agent: Artifact, storage: Storage) -> list[Candidate]:
    """An agent's policies along its training, then the agent itself, which is the best of them. The
    first, where it began with another agent, is that one.
    """
    iterations = sorted(int(path.name) for path in (agent.path / SNAPSHOTS).glob("*"))
    iterations = [i for i in iterations if i or not agent.meta.get("inputs", {}).get("agents")]
    kept = int(
        agent.meta.get("metrics", {}).get("kept_iteration", agent.meta["config"]["iterations"])
    )
    found = [
        Candidate(f"{AGENT}@{i}", policy_of(storage, f"{agent.name}@{i}"), iteration=i)
        for i in iterations
        if i != kept
    ]
    return [*found, Candidate(AGENT, policy_of(storage, agent.name), iteration=max(kept, 0))]


def graded(policy: Acts, action_space: gymnasium.Space[Any], noise: float) -> Candidate:
    return Candidate(f"{AGENT}, noise {noise:.3g}", Noisy(policy, action_space, noise), noise=noise)


def held_out(refs: Sequence[str], storage: Storage, datasets: Sequence[Artifact]) -> None:
    """Raise UsageError where an agent that is to be judged collected the world's own `datasets`:
    its value would be no test.
    """
    for ref in refs:
        if (found := collected(ref, storage, datasets)) is not None:
            id, dataset = found
            raise UsageError(
                f"agents/{id} collected {dataset}, which the world was trained on: its value there"
                " is no test; judge another agent"
            )


def collected(ref: str, storage: Storage, datasets: Sequence[Artifact]) -> tuple[str, str] | None:
    """(agent's id, dataset's name) where the agent `ref`, a full name, collected one of the
    datasets: itself, or as the agent that it began with and is (`kept_former`, or its snapshot 0).
    """
    name, _, iteration = ref.partition("@")
    agent = storage.artifact("agents", name)
    begun = (
        agent.meta.get("inputs", {}).get("agents", [])
        if agent.meta.get("metrics", {}).get("kept_former") or iteration == "0"
        else []
    )
    for dataset in datasets:
        for id in dataset.meta.get("inputs", {}).get("agents", []):
            if id in (agent.id, *begun):
                return id, dataset.name
    return None


def next_noise(
    noises: Mapping[float, float], returns: Sequence[float], most: float
) -> float | None:
    """The level of noise to try next; None where each fifth holds PER_FIFTH policies and there are
    LEAST, or no level can tell more.

    noises: level -> mean real return of what was tried, from 0 and `most` on; returns: of all
    policies so far.
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
    levels = sorted(noises)
    for fifth in np.argsort(counts, kind="stable"):
        middle = low + (high - low) * (fifth + 0.5) / 5
        across = [
            (a, b)
            for a, b in itertools.pairwise(levels)
            if min(noises[a], noises[b]) <= middle <= max(noises[a], noises[b]) and b - a > FINEST
        ]
        if across:
            a, b = max(across, key=lambda pair: pair[1] - pair[0])
            return (a + b) / 2
    wide = max(itertools.pairwise(levels), key=lambda pair: pair[1] - pair[0])
    return sum(wide) / 2 if wide[1] - wide[0] > FINEST else None


def most_noise(action_space: gymnasium.Space[Any]) -> float:
    return MOST_NOISE if _real(action_space) else 1.0


def _real(space: gymnasium.Space[Any]) -> bool:
    return (
        isinstance(space, Box)
        and space.dtype is not None
        and np.issubdtype(space.dtype, np.floating)
    )
