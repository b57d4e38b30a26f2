"""Behaviours that act during data collection: random, scripted, trained or noisy."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Text
from numpy.typing import NDArray

from mesocosm import checks, user_code
from mesocosm.datasets.masks import draw, mask_of
from mesocosm.datasets.permutation import GOLDEN
from mesocosm.datasets.spaces import shown_space
from mesocosm.datasets.texts import text_problem
from mesocosm.envs.config import DrawnOption, RealityConfig, check_option
from mesocosm.envs.episode import Act, EpisodeAct, ReadsInfos, stream
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.store.artifacts import Storage

SOURCES = {
    "random": (),
    "noisy": ("function", "policy"),
    "planner": ("policy",),
    "scripted": ("function",),
    "trained": ("policy",),
}
"""Keys of BehaviourConfig that each kind needs one of."""


@dataclass
class BehaviourConfig:
    kind: str = "random"
    """random: uniform from the action space; scripted: `function`; trained: draws of `policy`;
    noisy: `function`, or greedy actions of `policy`, with noise; planner: plans of `policy` in the
    world that it was trained in.
    """
    weight: float = 1.0
    """Relative share of the episodes. For any number of episodes it is exact to within two
    episodes.
    """
    noise: float = 0.1
    """Noise of kind noisy. Box: the standard deviation as a fraction of half the action's range (1
    where unbounded). Other spaces: the probability of a random action, drawn from the space or by
    the function's own `random_action(observation, rng)`.
    """
    policy: str | None = None
    """`agents/ID`, or `agents/ID@ITERATION` for a snapshot of its training."""
    function: str | None = None
    """`module:function`, called as f(observation, rng) -> action, or a class whose instance is
    called so; its `start(k, rng)`, if it has one, begins an episode. Modules may be in the current
    directory.
    """
    task_options: dict[str, DrawnOption] = field(default_factory=dict)
    """Narrower ranges of some `reality.task_options` for these episodes."""


def check(behaviours: Sequence[BehaviourConfig], name: str = "behaviours") -> None:
    """Raise UsageError on the first invalid behaviour of the config key `name`."""
    if not behaviours:
        raise UsageError(f"{name} must list at least one behaviour, got []; try [{{kind: random}}]")
    for i, b in enumerate(behaviours):
        key = f"{name}[{i}]"
        checks.one_of(b, SOURCES, "kind", prefix=f"{key}.")
        checks.within(b, 0, math.inf, "weight", open="[]", prefix=f"{key}.")
        sources = [name for name in ("function", "policy") if getattr(b, name) is not None]
        for source in sources:
            if source not in SOURCES[b.kind]:
                raise UsageError(
                    f"{key}.{source} must be null for kind {b.kind!r}, got"
                    f" {getattr(b, source)!r}; remove it or choose another kind"
                )
        if SOURCES[b.kind] and len(sources) != 1:
            options = " or ".join(f"{key}.{name}" for name in SOURCES[b.kind])
            raise UsageError(
                f"{key}: kind {b.kind!r} needs one of {options}, got {sources or 'none'}"
            )
        if b.kind == "noisy":
            checks.within(b, 0, math.inf, "noise", open="]", prefix=f"{key}.")
        if b.function is not None:
            load_function(b.function)


def label(behaviour: BehaviourConfig) -> str:
    """The behaviour's name in episodes, such as `noisy module:function 0.1`."""
    source = behaviour.function or behaviour.policy
    words = [behaviour.kind, *([source] if source else [])]
    if behaviour.kind == "noisy":
        words.append(f"{behaviour.noise:g}")
    for name, option in behaviour.task_options.items():
        if option.choices is not None:
            words.append(f"{name}={'|'.join(map(str, option.choices))}")
        else:
            words.append(f"{name}={option.low:g}..{option.high:g}")
    return " ".join(words)


def check_tasks(
    behaviours: Sequence[BehaviourConfig], reality: RealityConfig, name: str = "behaviours"
) -> None:
    """Raise UsageError where a behaviour's task options are not a part of reality's."""
    for i, behaviour in enumerate(behaviours):
        for option_name, option in behaviour.task_options.items():
            key = f"{name}[{i}].task_options.{option_name}"
            whole = reality.task_options.get(option_name)
            if whole is None:
                raise UsageError(
                    f"{key} must name one of reality.task_options"
                    f" {list(reality.task_options)}, got {option_name!r}"
                )
            check_option(key, option)
            for value in option.choices or [option.low, option.high]:
                if whole.choices is not None:
                    inside = option.choices is not None and value in whole.choices
                    values = f"choices={whole.choices}"
                else:
                    assert whole.low is not None and whole.high is not None
                    inside = isinstance(value, int | float) and whole.low <= value <= whole.high
                    values = f"low={whole.low} and high={whole.high}"
                if not inside:
                    raise UsageError(
                        f"{key} must be within reality.task_options.{option_name}.{values}, got"
                        f" {value!r}"
                    )


def narrowed(reality: RealityConfig, behaviour: BehaviourConfig) -> RealityConfig:
    """`reality` with the behaviour's task options; numbers of a real option are floats."""
    options = dict(reality.task_options)
    for name, option in behaviour.task_options.items():
        whole = options[name].choices
        if option.choices is not None and (
            whole is None or any(isinstance(value, float) for value in whole)
        ):
            option = replace(option, choices=[float(value) for value in option.choices])
        options[name] = option
    return replace(reality, task_options=options)


def full_name(storage: Storage, policy: str) -> str:
    """`agents/ID` or `agents/ID@ITERATION` of a reference, which may be a prefix.

    Raises:
        UsageError: There is no such agent.
    """
    name, at, iteration = policy.partition("@")
    return f"{storage.artifact('agents', name).name}{at}{iteration}"


def choose(behaviours: Sequence[BehaviourConfig], seed: int, k: int) -> int:
    """The index of the behaviour that acts in episode k, a function of (seed, k).

    In any run of episodes each behaviour has its share to within two. Weights divide the unit
    circle, and episode k is k steps of the golden ratio from a seeded start, which spreads evenly
    (Kuipers and Niederreiter 1974, Uniform Distribution of Sequences, chapter 2.3).
    """
    edges = np.cumsum([b.weight for b in behaviours])
    start = int(stream("behaviour", seed).integers(2**64, dtype=np.uint64))
    point = ((start + k * int(GOLDEN)) % 2**64) / 2**64 * edges[-1]
    return min(int(np.searchsorted(edges, point, side="right")), len(edges) - 1)


def load_function(name: str) -> Act:
    """The function `module:function`. Raises UsageError where there is none."""
    return user_code.load_function(name, f"behaviours function {name!r}")


def build(
    behaviour: BehaviourConfig,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    storage: Storage,
) -> Act:
    """The `Act` of a checked behaviour that does not plan (`data.collecting.acts.build_act`
    builds any).

    Raises:
        UsageError: The policy is missing, or has other spaces.
    """
    if behaviour.kind == "random":
        return RandomActions(action_space)
    if behaviour.function is not None:
        source = load_function(behaviour.function)
        if isinstance(source, type):
            source = source()
    else:
        assert behaviour.policy is not None
        spaces = (observation_space, action_space)
        source = policy_actions(behaviour.policy, spaces, storage, behaviour.kind == "trained")
    if behaviour.kind == "noisy":
        source = NoisyActions(source, action_space, behaviour.noise)
    return CheckedActions(source, action_space, label(behaviour))


class RandomActions:
    """Uniform actions, seeded by the episode. Masked ones are never drawn."""

    def __init__(self, action_space: gymnasium.Space[Any]):
        self._space = copy.deepcopy(action_space)

    def start(self, k: int, rng: np.random.Generator) -> None:
        self._space.seed(int(rng.integers(2**31)))

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        mask = mask_of(observation)
        return self._space.sample() if mask is None else draw(self._space, mask, rng)


def policy_actions(
    ref: str,
    spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]],
    storage: Storage,
    explore: bool,
) -> Act:
    """The actions of an exported policy on one observation at a time."""
    # They import torch: only where a policy acts.
    from mesocosm.policies.image_policy import ImagePolicy
    from mesocosm.policies.scorer import CandidatePolicy
    from mesocosm.policies.stored import policy_of

    policy = policy_of(storage, ref)
    trained = (policy.observation_space, policy.action_space)
    for name, expected, space in zip(("observation", "action"), trained, spaces, strict=True):
        if space != expected:
            raise UsageError(
                f"policy {ref!r} needs the {name} space {expected}, reality.env has {space}; use a"
                " policy of this environment"
            )
    if isinstance(policy, CandidatePolicy | ImagePolicy):
        policy.explores = explore
        return policy
    return lambda observation, rng: policy.act_one(observation, explore, rng)


@runtime_checkable
class DrawsActions(Protocol):
    """A behaviour that draws the random actions of its own noise, such as sensible texts."""

    def random_action(self, observation: Any, rng: np.random.Generator) -> Any: ...


class NoisyActions(RandomActions):
    """Another behaviour's actions, with noise."""

    def __init__(self, source: Act, action_space: gymnasium.Space[Any], noise: float):
        super().__init__(action_space)
        self._source, self._noise = source, noise

    def start(self, k: int, rng: np.random.Generator) -> None:
        super().start(k, rng)
        if isinstance(self._source, EpisodeAct):
            self._source.start(k, rng)

    def read_info(self, info: Mapping[str, Any]) -> None:
        if isinstance(self._source, ReadsInfos):
            self._source.read_info(info)

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        if isinstance(self._source, DrawsActions):
            noisy = rng.random() < self._noise
            act = self._source.random_action if noisy else self._source
            return act(observation, rng)
        mask = mask_of(observation)
        return perturbed(self._source(observation, rng), self._space, self._noise, rng, mask)


def perturbed(
    action: Any,
    space: gymnasium.Space[Any],
    noise: float,
    rng: np.random.Generator,
    mask: NDArray[np.bool_] | None = None,
) -> Any:
    """Add `BehaviourConfig.noise` to one action, or to [B, ...] of a real-valued Box.

    Other spaces draw from their own generator: seed `space`. With a mask (`masks.mask_of`) the
    possible actions are drawn by `rng`.
    """
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        if rng.random() >= noise:
            return action
        return space.sample() if mask is None else draw(space, mask, rng)
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = (np.where(bounded, edge, 0.0) for edge in (space.low, space.high))
    reach = np.where(bounded, (high - low) / 2, 1.0)
    noisy = np.asarray(action) + noise * reach * rng.standard_normal(np.shape(action))
    return np.clip(noisy, space.low, space.high)


class CheckedActions:
    """Rejects actions outside the action space, and casts those of a Box to its dtype."""

    def __init__(self, source: Act, action_space: gymnasium.Space[Any], name: str):
        self._source, self._space, self._name = source, action_space, name

    def start(self, k: int, rng: np.random.Generator) -> None:
        if isinstance(self._source, EpisodeAct):
            self._source.start(k, rng)

    def read_info(self, info: Mapping[str, Any]) -> None:
        if isinstance(self._source, ReadsInfos):
            self._source.read_info(info)

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        action = self._source(observation, rng)
        if isinstance(self._space, Box):
            action = np.asarray(action, dtype=self._space.dtype)
        if isinstance(self._space, Text) and isinstance(action, str):
            problem = text_problem(self._space, action)
            if problem is not None:
                raise MesocosmError(f"behaviour {self._name!r} returned an action: {problem}")
        elif not self._space.contains(action):
            raise MesocosmError(
                f"behaviour {self._name!r} returned the action {action!r}, which is not in the"
                f" action space {shown_space(self._space)}"
            )
        return action
