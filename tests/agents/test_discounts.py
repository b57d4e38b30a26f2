"""Durations: gamma^dt in every algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mesocosm.agents import discounts, rllib, settings
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.discounts import Durations
from mesocosm.agents.env import AgentEnv
from mesocosm.errors import MesocosmError, UsageError

GAMMA = 0.8
PRIZE = np.array([1.0, 2.0, 1.5])
DURATION = np.array([1.0, 5.0, 10.0])
QUICK, SLOW, SLOWER = range(3)
"""With a discount per step `SLOW` is best. With GAMMA per unit of time `QUICK` for ever is worth 5,
`SLOW` 2.97 and `SLOWER` 1.68.
"""


class Pace(gymnasium.Env[Any, Any]):
    """One state, eight steps: each action takes its DURATION and pays its PRIZE."""

    def __init__(self, reports: bool = True):
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space, self.reports = spaces.Discrete(3), reports

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        info = {"duration": float(DURATION[action])} if self.reports else {}
        return np.ones(1, np.float32), float(PRIZE[action]), False, self.t >= 8, info


def test_environments_that_drop_no_step_sample_the_policy() -> None:
    """At their own pace, unfinished steps carried over: each action's share is its probability."""
    policy, window, rng = np.array([0.5, 0.3, 0.2]), 5.0, np.random.default_rng(0)
    actions = rng.choice(3, 500, p=policy)
    left, completed = DURATION[actions], []
    for _ in range(40):
        left = left - window
        while (done := np.flatnonzero(left <= 0)).size:
            completed.append(actions[done])
            actions[done] = rng.choice(3, len(done), p=policy)
            left[done] += DURATION[actions[done]]
    late = np.concatenate(completed[len(completed) // 4 :])
    np.testing.assert_allclose(np.bincount(late) / len(late), policy, atol=0.02)


# -- RLlib


@contextmanager
def built(
    folder: Path,
    algo: str,
    num_envs: int = 4,
    rollout: int = 16,
    *,
    reports: bool = True,
    runners: int = 0,
    **params: Any,
) -> Iterator[Any]:
    """An algorithm on `num_envs` Pace environments, with the defaults of training in a world, but
    RLlib's SAC.
    """

    def make_env(count: int) -> AgentEnv:
        makers = [lambda: Pace(reports)] * count
        vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
        return AgentEnv(vector)

    config = AgentConfig(algo=algo, params=params, model={"fcnet_hiddens": [16]}, gamma=GAMMA)
    config.num_envs, config.rollout, config.runners = num_envs, rollout, runners
    setup = replace(settings.imagined(config), rollout=rollout, imagined=False)
    algorithm = rllib.build(setup, make_env, folder)
    try:
        yield algorithm
    finally:
        algorithm.stop()


def learner_batch(algorithm: Any, episodes: list[Any]) -> Any:
    """The losses' input, by RLlib's names."""
    learner = algorithm.learner_group._learner
    shared = {"shared_data": {}, "metrics": learner.metrics}
    connector = learner._learner_connector
    batch = connector(rl_module=learner.module, batch={}, episodes=episodes, **shared)
    return batch["default_policy"]


def sampled(algorithm: Any) -> list[Any]:
    episodes = algorithm.env_runner.sample()
    buffer = getattr(algorithm, "local_replay_buffer", None)
    if buffer is None:
        return list(episodes)
    buffer.add(episodes)
    shape = {"num_items": 64, "batch_length_T": 0, "lookback": 0, "sample_episodes": True}
    return list(buffer.sample(n_step=algorithm.config.n_step, gamma=GAMMA, beta=0.4, **shape))


def values_of(algorithm: Any, batch: Any) -> Any:
    module = algorithm.learner_group._learner.module["default_policy"]
    return module.compute_values(batch).detach()


def slow(*algorithms: str) -> list[Any]:
    return [pytest.param(algo, marks=pytest.mark.slow) for algo in algorithms]


@pytest.mark.parametrize("algo", ["PPO", *slow("DQN", "SAC", "APPO", "IMPALA")])
def test_every_algorithm_discounts_by_durations(ray_local: None, tmp_path: Path, algo: str) -> None:
    """Losses discount by gamma (1 - terminated), and by gamma ** n_step (1 - terminated) those of
    replay: that is gamma^dt.
    """
    with built(tmp_path, algo) as algorithm:
        batch = learner_batch(algorithm, sampled(algorithm))
        every = torch.ones(len(batch["rewards"]), dtype=torch.bool)
        real = batch.get("loss_mask", every).bool()
        discount = (GAMMA * (1.0 - batch["terminateds"].float()))[real]
        taken = batch["actions"][real].long()
        assert len(taken.unique()) == 3
        expected = torch.as_tensor(GAMMA**DURATION, dtype=torch.float32)[taken]
        torch.testing.assert_close(discount, expected)
        rllib.train(algorithm)  # in which the losses take that column


def test_advantages_are_those_of_a_semi_markov_process(ray_local: None, tmp_path: Path) -> None:
    with built(tmp_path, "PPO", 3, 20, lambda_=0.9) as algorithm:
        episodes = sampled(algorithm)
        ended = [episode.is_done for episode in episodes]
        assert any(ended) and not all(ended), "cut by the time limit, and by the rollout"
        batch = learner_batch(algorithm, episodes)
        values = values_of(algorithm, batch).numpy()
    targets, start = [], 0
    for episode in episodes:
        n = len(episode)  # with the step that RLlib adds for the last value
        v, actions = values[start : start + n], np.asarray(episode.get_actions())[: n - 1]
        start, advantage, backwards = start + n, 0.0, []
        for t in reversed(range(n - 1)):
            gamma = GAMMA ** DURATION[actions[t]]
            advantage = PRIZE[actions[t]] + gamma * v[t + 1] - v[t] + gamma * 0.9 * advantage
            backwards.append(advantage + v[t])
        targets += backwards[::-1]
    actual = batch["value_targets"][batch["loss_mask"]].numpy()
    np.testing.assert_allclose(actual, targets, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("reports", "best"), [(True, QUICK), (False, SLOW)])
def test_ppo_finds_the_best_action_per_unit_of_time(
    ray_local: None, tmp_path: Path, reports: bool, best: int
) -> None:
    """QUICK is best with gamma^dt; without durations gamma is per step, and SLOW is best."""
    learning = {"lr": 1e-2, "entropy_coeff": 0.0, "use_kl_loss": False, "minibatch_size": 128}
    with built(tmp_path, "PPO", 16, 16, reports=reports, **learning) as algorithm:
        for _ in range(8):
            rllib.train(algorithm)
        batch = learner_batch(algorithm, sampled(algorithm))
    actions = batch["actions"][batch["loss_mask"]].numpy()
    share = np.bincount(actions, minlength=3) / len(actions)
    assert share[best] > 0.9, share


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["PPO", "DQN"])
def test_without_durations_nothing_changes(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    """The weights have the bits of RLlib's own pipeline; with durations they differ."""
    learned = {}
    early = {} if algo == "PPO" else {"num_steps_sampled_before_learning_starts": 16}
    for name in ("plain", "silent", "reports"):
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr(discounts, "install", lambda algorithm: None)
            with built(tmp_path, algo, reports=name == "reports", **early) as algorithm:
                if algo == "DQN":  # RLlib does not seed it
                    algorithm.local_replay_buffer.rng = np.random.default_rng(0)
                for _ in range(2):
                    rllib.train(algorithm)
                state = algorithm.learner_group._learner.module["default_policy"].state_dict()
                learned[name] = torch.cat([value.flatten().clone() for value in state.values()])
    assert torch.equal(learned["plain"], learned["silent"])
    assert not torch.equal(learned["plain"], learned["reports"])


def test_advantages_are_not_weighted_by_duration(ray_local: None, tmp_path: Path) -> None:
    """In lock step samples are distributed as the policy: advantages are only standardised."""
    with built(tmp_path, "PPO") as algorithm:
        batch = learner_batch(algorithm, sampled(algorithm))
        values = values_of(algorithm, batch)
    real = batch["loss_mask"]
    plain = batch["value_targets"] - values
    plain = ((plain - plain.mean()) / plain.std(correction=0))[real].numpy()
    actual = batch["advantages"][real].numpy()
    np.testing.assert_allclose(actual, plain, rtol=1e-3, atol=1e-4)


def test_steps_of_several_transitions_are_refused_where_durations_discount(
    ray_local: None, tmp_path: Path
) -> None:
    learning = {"n_step": 3, "num_steps_sampled_before_learning_starts": 16}
    with (
        built(tmp_path, "DQN", **learning) as algorithm,
        pytest.raises(UsageError, match=r"params.n_step must be 1 .*got [23]"),
    ):
        rllib.train(algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("runners", [0, 1])
def test_an_error_of_an_environment_reaches_the_job(
    ray_local: None, tmp_path: Path, runners: int
) -> None:
    """RLlib by itself ends the runner's process, and the reason stays in a log."""
    with built(tmp_path, "PPO", runners=runners) as algorithm:
        algorithm.env_runner_group.foreach_env_runner(break_env)
        with pytest.raises(MesocosmError, match="the tank is empty"):
            rllib.train(algorithm)


def break_env(runner: Any) -> None:
    def step(actions: Any) -> Any:
        raise MesocosmError("the tank is empty")

    if runner.env is not None:
        runner.env.unwrapped.step = step


# -- an environment's infos


def duration_infos(
    reported: list[float | None], ended: list[bool], before: Durations | None = None
) -> dict[str, Any]:
    mask = np.array([value is not None for value in reported])
    values = np.array([value or 0.0 for value in reported])
    infos = {"duration": values, "_duration": mask} if mask.any() else {}
    stepped = np.ones(len(reported), np.bool_)
    return (before or Durations()).infos(infos, stepped, np.array(ended))


def test_infos() -> None:
    assert duration_infos([None, None], [False, True]) == {}
    for reported, ended in (([2.0, -0.1], [False, False]), ([2.0, None], [False, True])):
        assert duration_infos(list(reported), ended)["duration"].tolist() == [2.0, 0.0]
    untimed = Durations()
    duration_infos([None], [False], untimed)
    for mixed, before in (([2.0, None], None), ([None, 2.0], None), ([1.0], untimed)):
        with pytest.raises(MesocosmError, match="at some steps and not at others"):
            duration_infos(list(mixed), [False] * len(mixed), before)
    with pytest.raises(MesocosmError, match=r"info\['duration'\]=nan; give a finite number"):
        duration_infos([float("nan")], [False])
