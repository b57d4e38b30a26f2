"""One episode of reality: a function of (reality config, seed, k), whichever process runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np

from mesocosm.datasets.bounds import FIX, first_outside
from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.datasets.leaf import FLOAT32
from mesocosm.envs.api import Env, take_reset, take_step
from mesocosm.envs.config import RealityConfig, parse_success
from mesocosm.envs.make import draw_options
from mesocosm.errors import BudgetSpent, MesocosmError
from mesocosm.user_code import one_line

Act = Callable[[Any, np.random.Generator], Any]
"""(raw observation, the episode's generator) -> raw action"""


class EpisodeError(MesocosmError):
    """An environment failed in an episode: it raised, hung, or gave a value that is not finite or
    outside of its space.
    """


class EpisodeCut(BudgetSpent):
    """The budget ran out in an episode. `episode` is its unfinished part, which is paid for, or
    None before its first transition.
    """

    def __init__(self, message: str, episode: Episode | None):
        super().__init__(message)
        self.episode = episode


@runtime_checkable
class EpisodeAct(Protocol):
    """An `Act` whose `start` is called when an episode begins."""

    def start(self, k: int, rng: np.random.Generator) -> None: ...

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any: ...


@runtime_checkable
class ReadsInfos(Protocol):
    """An `Act` that receives the info of the reset or step before each action."""

    def read_info(self, info: Mapping[str, Any]) -> None: ...


def stream(*key: Any) -> np.random.Generator:
    """A generator that is a function of `key` (numbers and texts) alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def episode_seed(seed: int, k: int) -> int:
    """The argument of `env.reset(seed=...)` in episode k: 31 bits of a hash of (seed, k)."""
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
        env: A MeteredEnv around `make_env(config)`.
        act: Chooses actions; an `EpisodeAct`'s `start` is called first.
        max_steps: Steps after which the episode is `unfinished`; None runs it to its end.

    Raises:
        EpisodeError: The environment raises or gives an invalid number, or with
            `reality.bounds=drop` an observation outside its space.
        EpisodeCut: The meter has no more steps.
        MesocosmError: `act` raises, or the environment has gym's old API.
    """
    assert max_steps is None or max_steps >= 1, max_steps
    reset_seed, rng = episode_seed(seed, k), stream("actions", seed, k)
    task = draw_options(config, stream("task", seed, k))
    if isinstance(act, EpisodeAct):
        act.start(k, rng)
    try:
        with _failures(EpisodeError, f"episode {k}: the environment's reset"):
            observation, info = take_reset(env, seed=reset_seed, options=task or None)
    except BudgetSpent as error:
        raise EpisodeCut(str(error), None) from error
    bounded = env.observation_space if config.bounds == "drop" else None
    observations, actions = [_valid(observation, bounded, k, 0)], list[Any]()
    rewards, durations = list[float](), list[float]()
    outcome: Outcome = "unfinished"
    spent: BudgetSpent | None = None
    while outcome == "unfinished" and (max_steps is None or len(rewards) < max_steps):
        t = len(rewards) + 1
        with _failures(MesocosmError, f"episode {k}: behaviour {behaviour!r}"):
            if isinstance(act, ReadsInfos):
                act.read_info(info)
            action = act(deepcopy(observations[-1]), rng)
        chosen = deepcopy(action)  # an environment may clip the action in place
        try:
            with _failures(EpisodeError, f"episode {k}: the environment's step {t}"):
                observation, reward, terminated, truncated, info = take_step(env, action)
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
    values = np.asarray(rewards, dtype=np.float64)
    success = None if config.success is None else parse_success(config.success)
    episode = Episode(
        index=k,
        seed=reset_seed,
        behaviour=behaviour,
        observations=observations,
        actions=actions,
        rewards=values,
        outcome=outcome,
        durations=np.asarray(durations) if len(durations) == len(rewards) else None,
        task=task,
        success=None if success is None else success(float(values.sum()), info),
    )
    if spent is not None:
        raise EpisodeCut(str(spent), episode if rewards else None) from spent
    return episode


@contextmanager
def _failures(kind: type[MesocosmError], source: str) -> Iterator[None]:
    """Convert an error of the user's code to an error of this kind. A MesocosmError passes
    unchanged.
    """
    try:
        yield
    except MesocosmError:
        raise
    except (Exception, SystemExit) as error:
        raise kind(f"{source} raised {type(error).__name__}: {one_line(error)}") from error


def _number(value: Any, name: str, k: int, t: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        shown, problem = repr(value), "which is no number"
    else:
        shown, problem = f"{number:g}", ""
        if not np.isfinite(number):
            problem = "which is not finite"
        elif abs(number) > FLOAT32:
            problem = "and a world computes in float32; rescale it"
        elif number < 0 and name != "reward":
            problem = "which is negative; give seconds"
    if problem:
        raise EpisodeError(f"episode {k}: step {t} gave {name} {shown}, {problem}")
    return number


def _valid(observation: Any, bounded: gymnasium.Space[Any] | None, k: int, t: int) -> Any:
    """A copy of an observation, which must be finite and inside the space, if one is given."""
    observation = deepcopy(observation)  # an environment may return the same buffer at every step
    if not all_finite(observation):
        raise EpisodeError(f"episode {k}: the observation after step {t} holds NaN or infinity")
    if bounded is not None and (problem := first_outside(bounded, observation, "observation")):
        raise EpisodeError(f"episode {k}: after step {t}, {problem}; {FIX}")
    return observation


def all_finite(value: Any) -> bool:
    """True if all floating point numbers of an observation are finite."""
    if isinstance(value, Mapping):
        return all(all_finite(item) for item in value.values())
    if isinstance(value, tuple | list):
        return all(all_finite(item) for item in value)
    if isinstance(value, str):
        return True
    array = np.asarray(value)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
