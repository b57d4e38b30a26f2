"""SAC inside a world: model-based policy optimization (MBPO, Janner et al. 2019, arXiv 1906.08253).

Short imagined branches from logged states fill a replay buffer. SAC learns from it and from the
logged transitions themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.sac import SAC
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import LEARNER_RESULTS
from torch import Tensor

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.env import AgentRunner, FlatEnv
from mesocosm.agents.replay import Columns, Replay, mixed
from mesocosm.agents.sac_learner import WorldSACLearner, WorldSACModule
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.masks import has_mask
from mesocosm.policies.heads import ActionMap, flatten_batch, stack
from mesocosm.serve.world_env import WorldVectorEnv

IMAGINED = 100_000
"""Capacity of the buffer of imagined transitions."""


@dataclass(frozen=True)
class Schedule:
    """The work of an iteration."""

    branch: int
    """Steps of a branch."""
    branches: int
    """Rounds of branches: one in each environment of each runner."""
    updates: int
    real_share: float
    """Share of a batch that is real."""
    real: Replay


class BranchEnv(FlatEnv):
    """Imagined branches from logged states, as columns. Only `BranchRunner` steps it."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env: WorldVectorEnv, gamma: float):
        assert env.horizon is None, "a branch has no time limit of its own"
        super().__init__(env)
        self.gamma = gamma

    def imagine(self, module: WorldSACModule, steps: int, seed: int) -> Columns:
        """`steps` steps in each environment from new starts; the policy draws its actions.

        An environment whose episode ends begins a new one. A step after which disagreement ends the
        episode (`max_disagreement`) is bootstrapped with the value of its last observation. A step
        that diverged has no such value and is left out.
        """
        raw, _ = self.env.reset(seed=seed)
        observation, rows = self._tensor(raw), []
        for _ in range(steps):
            with torch.no_grad():
                if module.discrete:
                    logits = module.logits(observation)
                    action = torch.distributions.Categorical(logits=logits).sample()
                else:
                    action, _ = module.act(observation)
            raw, reward, terminated, truncated, infos = self.env.step(
                self.map.to_raw(action.numpy())
            )
            present = self._tensor(raw)
            last = infos.get("final_info", {})  # of the steps that ended an episode
            duration = infos.get("duration", np.ones(self.num_envs))
            if "duration" in last:
                duration = duration + last["duration"]  # each is 0 where the other is not
            duration = np.maximum(duration, 0.0)  # a world may imagine a negative one
            discount = np.where(terminated, 0.0, self.gamma**duration)
            columns = [np.asarray(x, np.float32) for x in (reward, discount)]
            reward_column, discount_column = map(torch.from_numpy, columns)
            following = self._before_reset(present, truncated, infos)
            diverged = last.get("diverged", infos["diverged"])
            keep = torch.from_numpy(~diverged)
            step = Columns(observation, action, reward_column, following, discount_column)
            rows.append(Columns(*(column[keep] for column in step)))
            statistics = self._statistics
            statistics.steps += self.num_envs
            statistics.measured += self.num_envs * ("disagreement" in infos)
            statistics.diverged += int(diverged.sum())
            for part in (infos, last):
                statistics.disagreement += float(np.sum(part.get("disagreement", 0.0)))
            observation = present
        return Columns(*map(torch.cat, zip(*rows, strict=True)))

    def _before_reset(self, present: Tensor, truncated: NDArray[Any], infos: Any) -> Tensor:
        """The observations [N, n] after a step; for truncated episodes the last one before the
        reset.
        """
        if not truncated.any():
            return present
        following, ended = present.clone(), np.flatnonzero(truncated)
        last = [infos["final_obs"][i] for i in ended]
        following[ended] = torch.from_numpy(_flatten(self.env.single_observation_space, last))
        return following

    def _tensor(self, observations: Any) -> Tensor:
        return torch.from_numpy(self._flat(observations))

    def state(self) -> dict[str, Any]:
        """Return no state: every branch begins with a seed."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


class BranchRunner(AgentRunner):
    """An environment runner whose sample is columns."""

    def imagine(self, steps: int) -> Columns:
        """A branch in each environment, with a seed from torch's generator."""
        assert self.env is not None
        seed = int(torch.randint(1 << 31, ()))
        env: Any = self.env.unwrapped
        columns: Columns = env.imagine(self.module, steps, seed)
        return columns


class WorldSAC(SAC):
    """RLlib's SAC, whose training step imagines branches and updates on columns."""

    schedule: Schedule
    """The schedule. It is set after the algorithm is built."""
    imagined: Replay

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.imagined = Replay(IMAGINED)

    def _create_local_replay_buffer_if_necessary(self, config: Any) -> None:
        """Return None: `imagined` replaces RLlib's buffer of episodes."""

    def training_step(self) -> None:
        schedule, group = self.schedule, self.env_runner_group
        assert group is not None
        group.sync_weights(from_worker_or_learner_group=self.learner_group, inference_only=True)
        imagine = partial(_imagine, schedule.branch)  # without the real data, which stay here
        for _ in range(schedule.branches):
            for columns in group.foreach_env_runner(imagine):
                if columns is not None:
                    self.imagined.add(columns)
        learners: Any = self.learner_group
        metrics = learners._learner.update_many(
            lambda count: mixed(schedule.real, self.imagined, schedule.real_share, count),
            schedule.updates,
        )
        assert self.metrics is not None
        for name, value in metrics.items():
            self.metrics.log_value((LEARNER_RESULTS, DEFAULT_MODULE_ID, name), value, window=1)


def _imagine(steps: int, runner: Any) -> Columns | None:
    """A runner's branches; None for one without environments."""
    return runner.imagine(steps) if runner.env is not None else None


def configure(config: AlgorithmConfig) -> None:
    """Make an RLlib SAC config one of `WorldSAC`."""
    config.env_runners(env_runner_cls=BranchRunner)
    config.learners(learner_class=WorldSACLearner)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=WorldSACModule))


def make_env(arguments: Mapping[str, Any], gamma: float, num_envs: int) -> BranchEnv:
    """`arguments` are those of a `WorldVectorEnv` of whole episodes."""
    mode = {"horizon": None, "autoreset_mode": "SameStep"}
    return BranchEnv(WorldVectorEnv(num_envs, **{**arguments, **mode}), gamma)


def rounds(config: AgentConfig) -> int:
    """Rounds of branches in an iteration, of at least `rollout` steps together."""
    return math.ceil(config.rollout / config.branch)


def prepare(
    algorithm: Algorithm, config: AgentConfig, data: Dataset, learned: Collection[str] = ()
) -> None:
    """Give a new `WorldSAC` its schedule and its real transitions.

    The first dataset fixes the normalization, so that it is the same in all rounds of a loop.

    Args:
        algorithm: A `WorldSAC`.
        config: The config that it was built from.
        data: One or several datasets as one.
        learned: Ids of the datasets that the initial agent has learned from.
    """
    assert isinstance(algorithm, WorldSAC)
    real = logged(data, config.gamma)
    algorithm.schedule = Schedule(
        branch=config.branch,
        branches=rounds(config),
        updates=updates(config, data, learned),
        real_share=0.0 if config.objective == "disagreement" else config.real_share,
        real=real,
    )
    learners: Any = algorithm.learner_group
    learners._learner.normalize_by(real.observations[: _transitions(data)[0]])


def updates(config: AgentConfig, data: Dataset, learned: Collection[str] = ()) -> int:
    """Updates in an iteration: those of the datasets that are not `learned`, or of all."""
    counts = _transitions(data)
    new = [count for count, id in zip(counts, data.ids, strict=True) if id not in learned]
    return max(1, round(config.updates_per_real_step * sum(new or counts) / config.iterations))


def _transitions(data: Dataset) -> list[int]:
    """Transitions of the training split of each of the datasets that are opened as one."""
    episodes = data.episodes("train")
    counts = np.bincount(
        data.part[episodes], data.table["length"][episodes], minlength=len(data.ids)
    )
    return [int(count) for count in counts]


def logged(data: Dataset, gamma: float) -> Replay:
    """All transitions of the training split, in a buffer that holds just these."""
    space = data.observation_space
    actions = ActionMap(data.action_space, has_mask(space))
    parts: list[Columns] = []
    for episode in data.iter_episodes("train"):
        flat = torch.from_numpy(_flatten(space, episode.observations))
        durations = np.ones(len(episode)) if episode.durations is None else episode.durations
        discount = np.where(episode.terminated, 0.0, gamma**durations)
        action = actions.to_head(stack(data.action_space, episode.actions))
        reward, weight = (torch.tensor(x, dtype=torch.float32) for x in (episode.rewards, discount))
        parts.append(Columns(flat[:-1], torch.from_numpy(action), reward, flat[1:], weight))
    rows = Columns(*map(torch.cat, zip(*parts, strict=True)))
    replay = Replay(len(rows.reward))
    replay.add(rows)
    return replay


def _flatten(space: gym.Space[Any], observations: Sequence[Any]) -> NDArray[np.float32]:
    return flatten_batch(space, stack(space, observations))
