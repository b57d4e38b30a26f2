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
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.sac import SAC
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.metrics import LEARNER_RESULTS
from torch import Tensor

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.env import Statistics
from mesocosm.agents.replay import Columns, Replay, mixed
from mesocosm.agents.sac_learner import WorldSACLearner, WorldSACModule
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.policies.heads import ActionMap, flat_space, flatten_batch
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.store.artifacts import Artifact

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


class BranchEnv(VectorEnv[Any, Any, Any]):
    """Imagined branches from logged states, as columns. Only `BranchRunner` steps it."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env: WorldVectorEnv, gamma: float):
        assert env.horizon is None, "a branch has no time limit of its own"
        self.env, self.num_envs = env, env.num_envs
        self.map = ActionMap(env.single_action_space)
        self.gamma = gamma
        self.single_observation_space = flat_space(env.single_observation_space)
        self.single_action_space = self.map.head
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._statistics = Statistics()

    def imagine(self, module: WorldSACModule, steps: int, seed: int) -> Columns:
        """`steps` steps in each environment from new starts; the policy draws its actions.

        An environment that terminates begins anew. Steps whose result the world does not trust
        (`diverged`, `max_disagreement`) are left out.
        """
        raw, _ = self.env.reset(seed=seed)
        observation, rows = self._flat(raw), []
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
            following = self._flat(raw)
            duration = infos.get("duration", np.ones(self.num_envs))
            duration = np.maximum(duration, 0.0)  # a world may imagine a negative one
            discount = np.where(terminated, 0.0, self.gamma**duration)
            columns = [np.asarray(x, np.float32) for x in (reward, discount)]
            reward_column, discount_column = map(torch.from_numpy, columns)
            keep = torch.from_numpy(~truncated)
            step = Columns(observation, action, reward_column, following, discount_column)
            rows.append(Columns(*(column[keep] for column in step)))
            self._statistics.steps += self.num_envs
            for part in (infos, infos.get("final_info")):  # the last has the ended episodes' steps
                if part is not None:
                    self._statistics.disagreement += float(part["disagreement"].sum())
                    self._statistics.diverged += int(part["diverged"].sum())
            observation = following
        return Columns(*map(torch.cat, zip(*rows, strict=True)))

    def _flat(self, observations: Any) -> Tensor:
        space = self.env.single_observation_space
        return torch.from_numpy(flatten_batch(space, observations))

    def statistics(self) -> Statistics:
        """The statistics since the last call."""
        statistics, self._statistics = self._statistics, Statistics()
        return statistics

    def state(self) -> dict[str, Any]:
        """Nothing: every branch begins with a seed."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close(**kwargs)


class BranchRunner(SingleAgentEnvRunner):
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
    """Set after the algorithm is built."""
    imagined: Replay

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.imagined = Replay(IMAGINED)

    def _create_local_replay_buffer_if_necessary(self, config: Any) -> None:
        """None: `imagined` replaces RLlib's buffer of episodes."""

    def training_step(self) -> None:
        schedule, group = self.schedule, self.env_runner_group
        assert group is not None
        group.sync_weights(
            from_worker_or_learner_group=self.learner_group,
            timeout_seconds=None,
            inference_only=True,
        )
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
    algorithm: Algorithm,
    config: AgentConfig,
    datasets: Sequence[Dataset],
    learned: Collection[str] = (),
) -> None:
    """Give a new `WorldSAC` its schedule and its real transitions.

    The first dataset fixes the normalization, so that it is the same in all rounds of a loop.

    Args:
        datasets: One dataset each.
        learned: Ids of the datasets that the initial agent has learned from.
    """
    assert isinstance(algorithm, WorldSAC)
    real = logged(datasets, config.gamma)
    algorithm.schedule = Schedule(
        branch=config.branch,
        branches=rounds(config),
        updates=updates(config, datasets, learned),
        real_share=0.0 if config.objective == "disagreement" else config.real_share,
        real=real,
    )
    learners: Any = algorithm.learner_group
    learners._learner.normalize_by(real.observations[: datasets[0].count("train")])


def updates(config: AgentConfig, datasets: Sequence[Dataset], learned: Collection[str] = ()) -> int:
    """Updates in an iteration: those of the datasets that are not `learned`, or of all."""
    new = [d.count("train") for d in datasets if d.ids[0] not in learned]
    transitions = sum(new or [d.count("train") for d in datasets])
    return max(1, round(config.updates_per_real_step * transitions / config.iterations))


def check_data(
    branch: int,
    datasets: Sequence[Artifact],
    world: str,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
) -> None:
    """Raise UsageError for data of other spaces than the world's, or too short for a branch."""
    longest = 0
    for artifact in datasets:
        data = Dataset([artifact.path])
        if (data.observation_space, data.action_space) != spaces:
            fix = f"use data of the environment of {world}"
            raise UsageError(f"datasets: {artifact.name} has other spaces than the world; {fix}")
        longest = max(longest, int(data.table["length"].max(initial=0)))
    if branch > longest:
        raise UsageError(
            f"branch must be <= {longest}, the longest episode of the data, got {branch}; a longer"
            " branch leaves the data behind"
        )


def logged(datasets: Sequence[Dataset], gamma: float) -> Replay:
    """All transitions of the datasets' training splits, in a buffer that holds just these."""
    parts: list[Columns] = []
    for dataset in datasets:
        space, actions = dataset.observation_space, ActionMap(dataset.action_space)
        for episode in dataset.iter_episodes("train"):
            flat = torch.from_numpy(_flatten(space, episode.observations))
            durations = np.ones(len(episode)) if episode.durations is None else episode.durations
            discount = np.where(episode.terminated, 0.0, gamma**durations)
            action = actions.to_head(_stack(dataset.action_space, episode.actions))
            reward, weight = (
                torch.tensor(x, dtype=torch.float32) for x in (episode.rewards, discount)
            )
            parts.append(Columns(flat[:-1], torch.from_numpy(action), reward, flat[1:], weight))
    rows = Columns(*map(torch.cat, zip(*parts, strict=True)))
    replay = Replay(len(rows.reward))
    replay.add(rows)
    return replay


def _stack(space: gym.Space[Any], values: Sequence[Any]) -> Any:
    """The values in Gymnasium's vector layout."""
    return concatenate(space, values, create_empty_array(space, len(values)))


def _flatten(space: gym.Space[Any], observations: Sequence[Any]) -> NDArray[np.float32]:
    return flatten_batch(space, _stack(space, observations))
