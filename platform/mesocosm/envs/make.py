"""Ground-truth environments by name, and one episode of them: a function of (reality config, seed,
k), whoever runs it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium
import numpy as np

from mesocosm.cluster.ray_session import IMPORTS
from mesocosm.data.format.bounds import FIX, Clipped, first_outside
from mesocosm.data.format.episode import Episode, Outcome
from mesocosm.data.format.spaces import FLOAT32
from mesocosm.envs.api import close, take_reset, take_step
from mesocosm.envs.config import RealityConfig, check, parse_success
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError, nearest

Env = gymnasium.Env[Any, Any]
Act = Callable[[Any, np.random.Generator], Any]
"""(raw observation, the episode's generator) -> raw action"""


class EpisodeError(MesocosmError):
    """An environment failed in the middle of an episode: it raised, hung, or gave what is not
    finite or not of its spaces.
    """


class EpisodeCut(BudgetSpent):
    """The budget ran out in the middle of an episode. `episode` is what was paid for, unfinished;
    None before its first transition.
    """

    def __init__(self, message: str, episode: Episode | None):
        super().__init__(message)
        self.episode = episode


@runtime_checkable
class Behaviour(Protocol):
    """An `Act` that is told when an episode begins."""

    def start(self, k: int, rng: np.random.Generator) -> None: ...

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any: ...


# -- making
# ----------------------------------------------------------------------------------------------------------


def make_env(config: RealityConfig) -> Env:
    """The environment that `reality.env` names, with its kwargs and horizon.

    `module:Id` imports the module (the current directory is importable) and takes the id that it
    registers, or else the class or function of that name. Raises UsageError: no such environment
    (with the nearest id), a module that cannot be imported, keyword arguments it does not take, a
    task it does not have.
    """
    check(config)
    maker = _maker(config)
    try:
        env = maker()
    except UsageError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise UsageError(
            f"reality.env={config.env!r} needs a package that is not installed: {_line(error)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"reality.env={config.env!r} cannot be made with reality.kwargs={dict(config.kwargs)!r}"
            f" ({type(error).__name__}: {_line(error)}); correct them"
        ) from error
    task_keys(config, env.observation_space)
    return Clipped(env) if config.bounds == "clip" else env


@dataclass(frozen=True)
class EnvFacts:
    """What is known of an environment without a step."""

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    version: str
    """`environment_version`: part of the id of whatever was measured in it."""
    max_episode_steps: int | None
    """The time limit of an episode; None where neither the config nor the environment sets one."""

    @property
    def spaces(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
        """(observation space, action space)"""
        return self.observation_space, self.action_space


def facts_of(config: RealityConfig) -> EnvFacts:
    """Makes the environment to look at it, and closes it; takes no real step. Raises UsageError as
    `make_env` does.
    """
    env = make_env(config)
    try:
        limit = (
            config.horizon
            if config.horizon is not None
            else env.spec.max_episode_steps
            if env.spec is not None
            else None
        )
        return EnvFacts(env.observation_space, env.action_space, environment_version(env), limit)
    finally:
        close(env)


MOVED = {"mesocosm.reality.domains": "mesocosm.envs.builtin"}
"""Modules under the names that artifacts of earlier versions hold."""


def _maker(config: RealityConfig) -> Callable[[], Env]:
    module_name, _, name = config.env.rpartition(":")
    module_name = MOVED.get(module_name, module_name)
    module = import_module(module_name, f"reality.env={config.env!r}") if module_name else None
    if name in gymnasium.registry or module is None or not hasattr(module, name):
        _check_registered(config.env, name, module)
        return lambda: gymnasium.make(
            name, max_episode_steps=config.horizon, disable_env_checker=True, **config.kwargs
        )
    build = getattr(module, name)

    def make() -> Env:
        env = build(**config.kwargs)
        if not isinstance(env, gymnasium.Env):
            raise UsageError(
                f"reality.env={config.env!r} gave a {type(env).__name__}, not a gymnasium.Env; name"
                " a class or function that makes one"
            )
        return env if config.horizon is None else gymnasium.wrappers.TimeLimit(env, config.horizon)

    return make


def _check_registered(env: str, name: str, module: Any) -> None:
    if name in gymnasium.registry:
        return
    if module is not None:
        own = [
            n
            for n, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, gymnasium.Env)
        ]
        where = f" ({path})" if (path := getattr(module, "__file__", None)) else ""
        raise UsageError(
            f"reality.env={env!r}: module {module.__name__!r}{where} neither registers nor defines"
            f" {name!r}{nearest(name, [*own, *gymnasium.registry])}"
        )
    same = [
        id
        for id in gymnasium.registry
        if id.rsplit("-v", 1)[0].lower() == name.rsplit("-v", 1)[0].lower()
    ]
    hint = f"; did you mean {same[-1]!r}?" if same else nearest(name, gymnasium.registry)
    raise UsageError(
        f"reality.env={env!r} does not exist: no environment of that id is registered{hint}"
    )


def import_module(name: str, what: str) -> Any:
    """Import a user's module, the current directory being importable. `what` names the config key
    and value in the UsageError.
    """
    here = os.getcwd()
    for folder in (here, os.environ.get(IMPORTS, here)):
        if folder not in sys.path:
            sys.path.append(folder)  # last: a user's http.py must not replace Python's own module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(
                f"{what}: there is no module {error.name!r} in {here!r} or among the installed"
                " packages; check its name"
            ) from error
        raise UsageError(
            f"{what}: module {name!r} needs {error.name!r}, which is not installed"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{what}: module {name!r} fails on import ({type(error).__name__}: {_line(error)})"
        ) from error


def environment_version(env: Env) -> str:
    """What code the environment is: the version of its package, or of a loose module the hash of
    its source.
    """
    kind = type(env.unwrapped)
    package = kind.__module__.partition(".")[0]
    versions = []
    for name in [
        package,
        *(["mujoco"] if "mujoco" in kind.__module__ and package != "mujoco" else []),
    ]:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{kind.__module__} {source_hash(kind)}")
    return ", ".join(versions)


def source_hash(thing: Any) -> str:
    """16 hex digits of the file that defines a class or function; "unknown" where there is no such
    file.
    """
    try:
        path = inspect.getsourcefile(thing)
        return (
            "unknown" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        )
    except (OSError, TypeError):
        return "unknown"


# -- tasks
# -----------------------------------------------------------------------------------------------------------


def task_keys(config: RealityConfig, observation_space: gymnasium.Space[Any]) -> list[str]:
    """Those names of `reality.task` that are keys of the observation (dotted where nested); the
    others are reset options.

    Raises UsageError on a name that is neither.
    """
    keys = _keys(observation_space)
    for name in config.task:
        if name in keys and name in config.task_options:
            raise UsageError(
                f"reality.task_options.{name} is drawn, and {name!r} is a key of the observation"
                " too; rename the option, or remove it"
            )
        if name not in keys and name not in config.task_options:
            raise UsageError(
                f"reality.task names {name!r}, which is no key of the observation (it has {keys})"
                f" and has no reality.task_options.{name} to draw it"
                f" from{nearest(name, [*keys, *config.task_options])}"
            )
    return [name for name in config.task if name in keys]


def _keys(space: gymnasium.Space[Any], prefix: str = "") -> list[str]:
    if isinstance(space, gymnasium.spaces.Dict):
        children = list(space.spaces.items())
    elif isinstance(space, gymnasium.spaces.Tuple) and prefix:
        children = [(str(i), child) for i, child in enumerate(space.spaces)]
    else:
        return []
    return [
        key
        for name, child in children
        for key in (f"{prefix}{name}", *_keys(child, f"{prefix}{name}."))
    ]


def draw_options(config: RealityConfig, rng: np.random.Generator) -> dict[str, Any]:
    """The reset options of one episode, in the order of `reality.task`. A float among the choices
    makes them all floats, so that an option's kind is the config's, not the draw's.
    """
    options: dict[str, Any] = {}
    for name in config.task:
        option = config.task_options.get(name)
        if option is None:
            continue
        if option.choices is not None:
            value = option.choices[int(rng.integers(len(option.choices)))]
            options[name] = (
                float(value)
                if any(isinstance(choice, float) for choice in option.choices)
                else value
            )
        else:
            assert option.low is not None and option.high is not None
            options[name] = float(rng.uniform(option.low, option.high))
    return options


class TaskSampler(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Draws the reset options of `reality.task` at each reset that names none: what model-free
    agents train on.
    """

    def __init__(self, env: Env, config: RealityConfig):
        super().__init__(env)
        self._config = config
        self._rng = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        return self.env.reset(
            seed=seed, options={**draw_options(self._config, self._rng), **(options or {})}
        )


# -- episodes
# --------------------------------------------------------------------------------------------------------


def stream(*key: Any) -> np.random.Generator:
    """A generator that is a function of `key` (numbers and texts) alone."""
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:16], "big")
    )


def episode_seed(seed: int, k: int) -> int:
    """What `env.reset(seed=...)` is given for episode k: 31 bits of a hash of (seed, k)."""
    return int.from_bytes(hashlib.sha256(f"episode/{seed}/{k}".encode()).digest()[:4], "big") >> 1


def run_episode(
    env: Env,
    act: Act,
    *,
    k: int,
    seed: int,
    behaviour: str,
    max_steps: int | None,
    config: RealityConfig,
) -> Episode:
    """Run episode k of (config, seed) and return it.

    Args:
        env: a MeteredEnv around `make_env(config)`.
        act: chooses actions; a `Behaviour`'s `start` is called first. Its generator is a function
        of (seed, k). max_steps: after so many steps an episode that has not ended is `unfinished`;
        None runs to its end.

    Raises EpisodeError if the environment raises, or gives an observation, reward or duration that
    is not finite, a reward or duration beyond float32, a negative duration, or with
    `reality.bounds=drop` an observation outside its space; EpisodeCut if the meter has no more
    steps; MesocosmError if `act` raises: that is the caller's fault, not reality's; or if the
    environment is of gym's old API.
    """
    assert max_steps is None or max_steps >= 1, max_steps
    reset_seed, rng = episode_seed(seed, k), stream("actions", seed, k)
    task = draw_options(config, stream("task", seed, k))
    if isinstance(act, Behaviour):
        act.start(k, rng)
    try:
        reset = partial(take_reset, env, seed=reset_seed, options=task or None)
        observation, info = _guarded(reset, k, "reset")
    except BudgetSpent as error:
        raise EpisodeCut(str(error), None) from error
    bounded = env.observation_space if config.bounds == "drop" else None
    observations, actions = [_valid(observation, bounded, k, 0)], list[Any]()
    rewards: list[float] = []
    durations: list[float] = []
    outcome: Outcome = "unfinished"
    spent: BudgetSpent | None = None
    while max_steps is None or len(rewards) < max_steps:
        t = len(rewards) + 1
        action = _choose(act, copied(observations[-1]), rng, behaviour, k)
        chosen = copied(action)  # an environment may clip the action in place
        try:
            observation, reward, terminated, truncated, info = _guarded(
                partial(take_step, env, action), k, f"step {t}"
            )
        except BudgetSpent as error:
            spent = error
            break
        observations.append(_valid(observation, bounded, k, t))
        actions.append(chosen)
        rewards.append(_number(reward, "reward", k, t))
        if "duration" in info:
            durations.append(_number(info["duration"], "info['duration']", k, t))
        if terminated or truncated:
            outcome = "terminated" if terminated else "truncated"
            break
    values = np.asarray(rewards, dtype=np.float64)
    episode = Episode(
        index=k,
        seed=reset_seed,
        behaviour=behaviour,
        observations=observations,
        actions=actions,
        rewards=values,
        outcome=outcome,
        durations=(
            np.asarray(durations, dtype=np.float64) if len(durations) == len(rewards) else None
        ),
        task=task,
        success=(
            None
            if config.success is None
            else parse_success(config.success)(float(values.sum()), cast(Mapping[str, Any], info))
        ),
    )
    if spent is not None:
        raise EpisodeCut(str(spent), episode if rewards else None) from spent
    return episode


def _guarded(call: Callable[[], Any], k: int, where: str) -> Any:
    try:
        return call()
    except MesocosmError:
        raise
    except (Exception, SystemExit) as error:
        raise EpisodeError(
            f"episode {k}: the environment's {where} raised {type(error).__name__}: {_line(error)}"
        ) from error


def _choose(act: Act, observation: Any, rng: np.random.Generator, behaviour: str, k: int) -> Any:
    try:
        return act(observation, rng)
    except MesocosmError:
        raise
    except Exception as error:
        raise MesocosmError(
            f"behaviour {behaviour!r} raised {type(error).__name__} in episode {k}: {_line(error)};"
            " correct it"
        ) from error


def _number(value: Any, what: str, k: int, t: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise EpisodeError(
            f"episode {k}: step {t} gave {what} {value!r}, which is no number"
        ) from error
    if not np.isfinite(number):
        raise EpisodeError(f"episode {k}: step {t} gave {what} {number}")
    if abs(number) > FLOAT32:
        raise EpisodeError(
            f"episode {k}: step {t} gave {what} {number:g}, and a world computes in float32;"
            " rescale it"
        )
    if number < 0 and what != "reward":
        raise EpisodeError(
            f"episode {k}: step {t} gave {what} {number:g}, which is negative; give seconds"
        )
    return number


def _valid(observation: Any, bounded: gymnasium.Space[Any] | None, k: int, t: int) -> Any:
    """A copy of an observation that is finite and, where a space is given, inside its bounds."""
    own = copied(observation)
    if not all_finite(own):
        raise EpisodeError(f"episode {k}: the observation after step {t} holds NaN or infinity")
    problem = None if bounded is None else first_outside(bounded, own, "observation")
    if problem is not None:
        raise EpisodeError(f"episode {k}: after step {t}, {problem}; {FIX}")
    return own


def copied(value: Any) -> Any:
    """Environments may give the same buffer twice."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [copied(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def all_finite(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind != "f" or bool(np.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(all_finite(item) for item in value.values())
    if isinstance(value, tuple | list):
        return all(all_finite(item) for item in value)
    return not isinstance(value, float | np.floating) or bool(np.isfinite(value))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
