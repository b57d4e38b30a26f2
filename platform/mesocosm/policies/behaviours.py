"""Who acts while data is collected: random, scripted, trained, or either of the latter with noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from mesocosm.data.format.permutation import GOLDEN
from mesocosm.envs.config import RealityConfig, TaskOption, check_option
from mesocosm.envs.make import Act, Behaviour, import_module, stream
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.store.artifacts import Storage

KINDS = ("random", "noisy", "scripted", "trained")


@dataclass
class BehaviourConfig:
    kind: str = "random"
    """random: uniform from the action space; scripted: `function`; trained: `policy`, drawing from
    its own distribution; noisy: `function`, or `policy` at its best, with noise.
    """
    weight: float = 1.0
    """Its share of the episodes, relative to the other behaviours' weights: kept to within two
    episodes, however few there are.
    """
    noise: float = 0.1
    """noisy only. Box: the standard deviation as a share of half the action's range (of 1 where it
    has no bounds); other spaces: the probability of a random action.
    """
    policy: str | None = None
    """`agents/<id>`, or `agents/<id>@<iteration>` for a snapshot on the way of its training"""
    function: str | None = None
    """`module:function`, called as f(observation, rng) -> action; the current directory is
    importable.
    """
    task_options: dict[str, TaskOption] = field(default_factory=dict)
    """How some of `reality.task_options` are drawn in its episodes: a part of what reality draws
    from.
    """


def check(behaviours: Sequence[BehaviourConfig], name: str = "behaviours") -> None:
    """Raise UsageError on the first behaviour of the config key `name` that cannot be meant."""
    if not behaviours:
        raise UsageError(
            f"{name}=[] leaves nobody to act; give at least one, such as {{kind: random}}"
        )
    for i, b in enumerate(behaviours):
        key = f"{name}[{i}]"
        if b.kind not in KINDS:
            raise UsageError(
                f"{key}.kind={b.kind!r} is not known{nearest(b.kind, KINDS)}; use one of"
                f" {', '.join(KINDS)}"
            )
        if not (math.isfinite(b.weight) and b.weight > 0):
            raise UsageError(f"{key}.weight={b.weight} is no share; give a number above 0")
        needs = {
            "random": (),
            "scripted": ("function",),
            "trained": ("policy",),
            "noisy": ("function", "policy"),
        }[b.kind]
        given = [name for name in ("function", "policy") if getattr(b, name) is not None]
        for source in given:
            if source not in needs:
                raise UsageError(
                    f"{key}.{source}={getattr(b, source)!r} is not used by kind {b.kind!r}; remove"
                    " it, or choose another kind"
                )
        if needs and len(given) != 1:
            raise UsageError(
                f"{key}: kind {b.kind!r} needs {' or '.join(f'{key}.{name}' for name in needs)}"
                f" (one of them); {given or 'none'} given"
            )
        if b.kind == "noisy" and not (math.isfinite(b.noise) and b.noise >= 0):
            raise UsageError(
                f"{key}.noise={b.noise} is no amount of noise; give a number of at least 0"
            )
        if b.function is not None:
            load_function(b.function)


def label(behaviour: BehaviourConfig) -> str:
    """How episodes name it: `random`, `trained agents/ab12`, `noisy module:function 0.1`."""
    source = behaviour.function or behaviour.policy
    noise = [f"{behaviour.noise:g}"] if behaviour.kind == "noisy" else []
    return " ".join(
        [
            behaviour.kind,
            *([source] if source else []),
            *noise,
            *(f"{name}={_part(option)}" for name, option in behaviour.task_options.items()),
        ]
    )


def _part(option: TaskOption) -> str:
    return (
        "|".join(map(str, option.choices))
        if option.choices is not None
        else f"{option.low:g}..{option.high:g}"
    )


def check_tasks(
    behaviours: Sequence[BehaviourConfig], reality: RealityConfig, name: str = "behaviours"
) -> None:
    """Raise UsageError where a behaviour draws a reset option that `reality` does not draw, or
    beyond what it draws from.
    """
    for i, behaviour in enumerate(behaviours):
        for option_name, option in behaviour.task_options.items():
            key = f"{name}[{i}].task_options.{option_name}"
            whole = reality.task_options.get(option_name)
            if whole is None:
                raise UsageError(
                    f"{key} is a part of nothing: reality.task_options has"
                    f" {list(reality.task_options)}; name one of these, or remove it"
                )
            check_option(key, option)
            values = option.choices if option.choices is not None else [option.low, option.high]
            for value in values:
                if whole.choices is not None:
                    held = option.choices is not None and value in whole.choices
                else:
                    assert whole.low is not None and whole.high is not None
                    held = isinstance(value, int | float) and whole.low <= value <= whole.high
                if not held:
                    drawn = (
                        f"choices={whole.choices}"
                        if whole.choices is not None
                        else f"low={whole.low} and high={whole.high}"
                    )
                    raise UsageError(
                        f"{key} holds {value!r}, which is beyond"
                        f" reality.task_options.{option_name}.{drawn}; give a part of that"
                    )


def narrowed(reality: RealityConfig, behaviour: BehaviourConfig) -> RealityConfig:
    """`reality` as the behaviour's episodes draw their tasks. A number stays a number, whatever
    part of the choices is left.
    """
    options = dict(reality.task_options)
    for name, option in behaviour.task_options.items():
        whole = options[name]
        if option.choices is not None and (
            whole.choices is None or any(isinstance(value, float) for value in whole.choices)
        ):
            option = replace(option, choices=[float(value) for value in option.choices])
        options[name] = option
    return replace(reality, task_options=options)


def full_name(storage: Storage, policy: str) -> str:
    """`agents/<id>` or `agents/<id>@<iteration>` of a reference that may be a prefix. Raises
    UsageError where there is no such agent.
    """
    name, at, iteration = policy.partition("@")
    return f"{storage.artifact('agents', name).name}{at}{iteration}"


def choose(behaviours: Sequence[BehaviourConfig], seed: int, k: int) -> int:
    """Which behaviour acts in episode k, a function of (seed, k): of any run of episodes each
    behaviour has its share to within two.

    A circle is cut by weight, and episode k stands on it k steps of the golden ratio from a place
    that the seed draws: points of which every run is spread evenly (discrepancy of O(log n / n):
    Kuipers and Niederreiter 1974, Uniform Distribution of Sequences, chapter 2.3).
    """
    edges = np.cumsum([b.weight for b in behaviours])
    start = int(stream("behaviour", seed).integers(2**64, dtype=np.uint64))
    return int(
        np.searchsorted(
            edges, ((start + k * int(GOLDEN)) % 2**64) / 2**64 * edges[-1], side="right"
        ).clip(max=len(edges) - 1)
    )


def load_function(name: str) -> Act:
    """The function `module:function`. Raises UsageError if there is none."""
    what = f"behaviours function {name!r}"
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{what} is not of the form module:function")
    module = import_module(module_name, what)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(
            f"{what}: module {module_name!r} has no function"
            f" {attribute!r}{nearest(attribute, [n for n in vars(module) if callable(vars(module)[n])])}"
        )
    return function


def build(
    behaviour: BehaviourConfig,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    storage: Storage,
) -> Act:
    """The `Act` of a checked behaviour. Raises UsageError where a policy is missing or was made for
    other spaces.
    """
    if behaviour.kind == "random":
        return RandomActions(action_space)
    if behaviour.function is not None:
        source = load_function(behaviour.function)
    else:
        assert behaviour.policy is not None
        source = PolicyActions(
            behaviour.policy,
            observation_space,
            action_space,
            storage,
            explore=behaviour.kind == "trained",
        )
    if behaviour.kind == "noisy":
        source = NoisyActions(source, action_space, behaviour.noise)
    return Checked(source, action_space, label(behaviour))


class RandomActions:
    """Uniform actions, seeded by the episode."""

    def __init__(self, action_space: gymnasium.Space[Any]):
        self._space = copy.deepcopy(action_space)

    def start(self, k: int, rng: np.random.Generator) -> None:
        self._space.seed(int(rng.integers(2**31)))

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        return self._space.sample()


class PolicyActions:
    """An exported policy, one observation at a time."""

    def __init__(
        self,
        ref: str,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        storage: Storage,
        *,
        explore: bool,
    ):
        from mesocosm.policies.policy import policy_of  # imports torch: only where a policy acts

        self._policy = policy_of(storage, ref)
        for name, made, here in (
            ("observation", self._policy.observation_space, observation_space),
            ("action", self._policy.action_space, action_space),
        ):
            if made != here:
                raise UsageError(
                    f"policy {ref!r} was made for the {name} space {made}, and reality.env has"
                    f" {here}; use a policy of this environment"
                )
        self._observation_space, self._explore = observation_space, explore
        self._actions = batch_space(action_space, 1)

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        batch = concatenate(
            self._observation_space, [observation], create_empty_array(self._observation_space, 1)
        )
        return next(
            iter(iterate(self._actions, self._policy.act(batch, explore=self._explore, rng=rng)))
        )


class NoisyActions:
    """Another behaviour's actions with Gaussian noise (real-valued Box), or replaced by random ones
    with probability `noise`.
    """

    def __init__(self, source: Act, action_space: gymnasium.Space[Any], noise: float):
        self._source, self._noise = source, noise
        self._space = copy.deepcopy(action_space)

    def start(self, k: int, rng: np.random.Generator) -> None:
        self._space.seed(int(rng.integers(2**31)))

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        return perturbed(self._source(observation, rng), self._space, self._noise, rng)


def perturbed(
    action: Any, space: gymnasium.Space[Any], noise: float, rng: np.random.Generator
) -> Any:
    """One action, or [B, ...] of a real-valued Box, with `BehaviourConfig.noise`. Other spaces draw
    from their own generator: seed `space`.
    """
    if (
        isinstance(space, Box)
        and space.dtype is not None
        and np.issubdtype(space.dtype, np.floating)
    ):
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        reach = np.where(
            bounded,
            (np.where(bounded, space.high, 0.0) - np.where(bounded, space.low, 0.0)) / 2,
            1.0,
        )
        return np.clip(
            np.asarray(action) + noise * reach * rng.standard_normal(np.shape(action)),
            space.low,
            space.high,
        )
    return space.sample() if rng.random() < noise else action


class Checked:
    """Refuses an action outside the action space before reality sees it; casts a Box's action to
    its dtype.
    """

    def __init__(self, source: Act, action_space: gymnasium.Space[Any], name: str):
        self._source, self._space, self._name = source, action_space, name

    def start(self, k: int, rng: np.random.Generator) -> None:
        if isinstance(self._source, Behaviour):
            self._source.start(k, rng)

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        action = self._source(observation, rng)
        if isinstance(self._space, Box):
            action = np.asarray(action, dtype=self._space.dtype)
        if not self._space.contains(action):
            raise MesocosmError(
                f"behaviour {self._name!r} gave the action {action!r}, which is not in the action"
                f" space {self._space}; correct it"
            )
        return action
