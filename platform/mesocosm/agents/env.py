"""The environment that RLlib steps: flat observations, head actions and durations. The penalty for
disagreement is taken off the rewards before, in `serve.world_env`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete, Text
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from ray.exceptions import RayTaskError
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from mesocosm.agents.candidate_module import row_space
from mesocosm.agents.discounts import Durations
from mesocosm.datasets.images import image_spaces
from mesocosm.datasets.masks import has_mask, mask_size
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.policies.candidates import COMMANDS, CandidateEpisodes, Candidates, check_spaces
from mesocosm.policies.heads import ActionMap, flat_space, flatten_batch
from mesocosm.policies.images import ImageEncoder, ImageMemory
from mesocosm.serve.world_env import WorldVectorEnv


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
    seconds: float = 0.0
    """Seconds in the steps and resets of worlds"""
    tokens: int = 0
    """Tokens that text worlds generated"""

    def mean_disagreement(self) -> dict[str, float]:
        """{"disagreement": mean over the measured steps}; {} without such steps."""
        return {"disagreement": self.disagreement / self.measured} if self.measured else {}

    def __add__(self, other: Statistics) -> Statistics:
        names = [f.name for f in dataclasses.fields(self)]
        return Statistics(*(getattr(self, name) + getattr(other, name) for name in names))


class FlatEnv(VectorEnv[Any, Any, Any]):
    """A vector environment with flat float32 observations and head actions, and its statistics."""

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        candidates: Candidates | None = None,
        encoder: ImageEncoder | None = None,
    ):
        """Wrap an environment.

        Args:
            env: The environment.
            candidates: How an agent lists its commands, where it acts in texts.
            encoder: How an agent sees images. A world then gives its codes.
        """
        self.env, self.num_envs = env, env.num_envs
        self._commands: CandidateEpisodes | None = None
        self._images = None if encoder is None else ImageMemory(encoder, self.num_envs)
        self._seen = env.single_observation_space if encoder is None else encoder.space
        spaces = self._seen, env.single_action_space
        self.single_observation_space, self.single_action_space = head_spaces(spaces, candidates)
        if encoder is not None and isinstance(env, WorldVectorEnv):
            env.keep_codes()
        if candidates is None:
            self.map = ActionMap(env.single_action_space, has_mask(env.single_observation_space))
        else:
            shape, actions = candidates.shape, env.single_action_space
            assert isinstance(actions, Text)
            self._commands = CandidateEpisodes(candidates.source, shape, actions, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._statistics = Statistics()

    def _flat(self, observations: Any) -> NDArray[np.float32]:
        return flatten_batch(self._seen, observations)

    def _encode(
        self, observations: Any, began: NDArray[np.bool_], infos: Mapping[str, Any]
    ) -> NDArray[np.float32]:
        """The rows of observations, where the episodes of `began` [B] have just begun."""
        if self._images is not None:
            self._images.restart(began)
            observations = self._images.see(observations)
        if self._commands is None:
            return self._flat(observations)
        self._commands.restart(began)
        return self._commands.observe(observations, infos.get(COMMANDS))

    def _decode(self, actions: NDArray[Any]) -> Any:
        """The environment's actions of head actions."""
        return self.map.to_raw(actions) if self._commands is None else self._commands.take(actions)

    def statistics(self) -> Statistics:
        """The statistics since the last call."""
        statistics, self._statistics = self._statistics, Statistics()
        if isinstance(self.env, WorldVectorEnv):
            statistics.seconds, statistics.tokens = self.env.take_usage()
        return statistics

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close(**kwargs)


class AgentEnv(FlatEnv):
    """A NEXT_STEP vector environment with flat float32 observations and head actions.

    RLlib makes a dict of the infos for every environment and step. Its infos are therefore the
    durations alone; `statistics` reports the rest.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        candidates: Candidates | None = None,
        encoder: ImageEncoder | None = None,
    ):
        """Wrap an environment. The arguments are those of `FlatEnv`."""
        mode = env.metadata.get("autoreset_mode")
        assert mode == AutoresetMode.NEXT_STEP, f"RLlib needs NEXT_STEP autoreset, got {mode}"
        super().__init__(env, candidates, encoder)
        self._durations = Durations()
        self._begin()

    def _begin(self) -> None:
        self._statistics = Statistics()
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observations, infos = self.env.reset(seed=seed, options=options)
        self._begin()
        return self._encode(observations, np.ones(self.num_envs, np.bool_), infos), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        raw = self._decode(actions)
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
        rows = self._encode(observations, ~stepped, infos)
        return rows, rewards, terminated, truncated, durations

    def state(self) -> dict[str, Any]:
        """The state of an imagined environment for `restore`, without its statistics."""
        assert isinstance(self.env, WorldVectorEnv), "a real environment has no state to save"
        episodes = {"ended": self._ended, "return": self._return, "length": self._length}
        state = {"env": self.env.state(), "durations": self._durations.reported}
        if self._commands is not None:
            state["commands"] = self._commands.state()
        if self._images is not None:
            state["images"] = self._images.state()
        return state | copy.deepcopy(episodes)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        assert isinstance(self.env, WorldVectorEnv)
        self._begin()
        self.env.restore(state["env"])
        self._durations.reported = state["durations"]
        if self._commands is not None:
            self._commands.restore(state["commands"])
        if self._images is not None:
            self._images.restore(state["images"])
        self._ended, self._return = state["ended"], state["return"]
        self._length = state["length"]


def make_env(
    arguments: Mapping[str, Any],
    candidates: Candidates | None,
    encoder: ImageEncoder | None,
    num_envs: int,
) -> AgentEnv:
    """An imagined environment; `arguments` are those of its `WorldVectorEnv`.

    RLlib resets each runner's environment with another seed, so that runners imagine different
    episodes.
    """
    return AgentEnv(WorldVectorEnv(num_envs, **arguments), candidates, encoder)


def head_spaces(
    spaces: tuple[gym.Space[Any], gym.Space[Any]], candidates: Candidates | None
) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """The (observation, action) spaces of a network for those of an environment.

    Raises:
        UsageError: An agent cannot use the spaces.
    """
    if candidates is None:
        if isinstance(spaces[1], Text):
            raise UsageError(
                "an agent acts in texts by choosing among candidates, got candidates=null; set"
                " candidates=infos or candidates=module:function"
            )
        if images := image_spaces(spaces[0]):
            raise UsageError(
                f"an agent sees images as the codes of a tokenizer, got {images[0]} without one;"
                " train it in a world (mesocosm tokenize, pretrain data.tokenizer=ID, train-agent),"
                " or give features with a wrapper"
            )
        masked = mask_size(*spaces) is not None
        return flat_space(spaces[0]), ActionMap(spaces[1], masked).head
    check_spaces(*spaces, "candidates")
    return row_space(candidates.shape), Discrete(candidates.shape.candidates)


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
