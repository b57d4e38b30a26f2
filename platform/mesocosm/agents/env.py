"""The environment that RLlib steps: flat observations, head actions and durations."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from ray.exceptions import RayTaskError
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from mesocosm.agents.durations import Durations
from mesocosm.errors import MesocosmError
from mesocosm.policies.heads import ActionMap, flat_space, flatten_batch
from mesocosm.serve.client import WorldVectorEnv


@dataclass
class Statistics:
    """Statistics of AgentEnvs since the last query."""

    steps: int = 0
    """Steps taken, without resets."""
    measured: int = 0
    """Steps whose disagreement was computed; 0 outside worlds."""
    disagreement: float = 0.0
    """Sum over those steps."""
    diverged: int = 0
    """Episodes that a world cut because a number was not finite."""
    returns: list[float] = field(default_factory=list)
    """Undiscounted returns of the episodes that ended, without penalty."""
    lengths: list[int] = field(default_factory=list)

    def mean_disagreement(self) -> dict[str, float]:
        """{"disagreement": mean over the measured steps}; {} where none did."""
        return {"disagreement": self.disagreement / self.measured} if self.measured else {}

    def __add__(self, other: Statistics) -> Statistics:
        names = [f.name for f in dataclasses.fields(self)]
        return Statistics(*(getattr(self, name) + getattr(other, name) for name in names))


class FlatEnv(VectorEnv[Any, Any, Any]):
    """A vector environment with flat float32 observations and head actions, and its statistics."""

    def __init__(self, env: VectorEnv[Any, Any, Any]):
        self.env, self.num_envs = env, env.num_envs
        self.map = ActionMap(env.single_action_space)
        self.single_observation_space = flat_space(env.single_observation_space)
        self.single_action_space = self.map.head
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._statistics = Statistics()

    def _flat(self, observations: Any) -> NDArray[np.float32]:
        return flatten_batch(self.env.single_observation_space, observations)

    def statistics(self) -> Statistics:
        """The statistics since the last call."""
        statistics, self._statistics = self._statistics, Statistics()
        return statistics

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close(**kwargs)


class AgentEnv(FlatEnv):
    """A NEXT_STEP vector environment with flat float32 observations and head actions.

    RLlib makes a dict of the infos for every environment and step. Its infos are therefore the
    durations alone; `statistics` reports the rest.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, env: VectorEnv[Any, Any, Any]):
        mode = env.metadata.get("autoreset_mode")
        assert mode == AutoresetMode.NEXT_STEP, f"RLlib needs NEXT_STEP autoreset, got {mode}"
        super().__init__(env)
        self._durations = Durations(env.metadata)
        self._begin()

    def _begin(self) -> None:
        self._statistics = Statistics()
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observations, _ = self.env.reset(seed=seed, options=options)
        self._begin()
        return self._flat(observations), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        raw = self.map.to_raw(actions)
        observations, rewards, terminated, truncated, infos = self.env.step(raw)
        stepped, statistics = ~self._ended, self._statistics
        self._return += np.where(stepped, infos.get("raw_reward", rewards), 0.0)
        self._length += stepped
        statistics.steps += int(stepped.sum())
        if "disagreement" in infos:
            statistics.measured += int(stepped.sum())
            statistics.disagreement += float(infos["disagreement"][stepped].sum())
        if "diverged" in infos:
            statistics.diverged += int(infos["diverged"][stepped].sum())
        self._ended = np.logical_or(terminated, truncated)
        durations = self._durations.infos(infos, stepped, self._ended)
        if self._ended.any():
            statistics.returns += self._return[self._ended].tolist()
            statistics.lengths += self._length[self._ended].tolist()
            self._return[self._ended] = 0.0
            self._length[self._ended] = 0
        return self._flat(observations), rewards, terminated, truncated, durations

    def state(self) -> dict[str, Any]:
        """The state of an imagined environment for `restore`, without its statistics."""
        assert isinstance(self.env, WorldVectorEnv), "a real environment has no state to save"
        episodes = {"ended": self._ended, "return": self._return, "length": self._length}
        state = {"env": self.env.state(), "durations": self._durations.reported}
        return state | copy.deepcopy(episodes)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        assert isinstance(self.env, WorldVectorEnv)
        self._begin()
        self.env.restore(state["env"])
        self._durations.reported = state["durations"]
        self._ended, self._return = state["ended"], state["return"]
        self._length = state["length"]


def make_env(arguments: Mapping[str, Any], num_envs: int) -> AgentEnv:
    """An imagined environment; `arguments` are those of its `WorldVectorEnv`.

    RLlib resets each runner's environment with another seed, so that runners imagine different
    episodes.
    """
    return AgentEnv(WorldVectorEnv(num_envs, **arguments))


class AgentRunner(SingleAgentEnvRunner):
    """An environment runner whose errors reach the job. RLlib's logs them and ends its process."""

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return func(self, *args, **kwargs)
        except Exception as error:
            raise (root_error(error) or error) from None  # Ray drops an error's cause


def root_error(error: BaseException) -> MesocosmError | None:
    """The MesocosmError behind an error, which RLlib or Ray wrapped."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RayTaskError):
            cause = cause.cause
        elif isinstance(cause, MesocosmError):
            return cause
        else:
            cause = cause.__cause__ or cause.__context__
    return None
