"""Durations: gamma^dt in every algorithm, and the weight dt only where samples arrive by time."""

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
from numpy.typing import NDArray

from mesocosm.agents import durations, rllib, settings
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.durations import Durations, arrival_weights
from mesocosm.agents.env import AgentEnv
from mesocosm.errors import MesocosmError, UsageError

Floats = NDArray[np.float64]
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


# -- samplers


class Sampler:
    """The actions that `n` environments complete in a window, with one policy per window."""

    def __init__(self, n: int, window: float, seed: int = 0):
        self.n, self.window, self.rng = n, window, np.random.default_rng(seed)
        self.under_way: list[tuple[int, float]] = []
        """Of `carried`: each environment's action, and the time until it is completed."""

    def draw(self, policy: Floats) -> int:
        return min(int((policy.cumsum() < self.rng.random()).sum()), len(policy) - 1)

    def lock_step(self, policy: Floats) -> list[int]:
        """Every environment steps once, and all wait for the slowest: a vector environment."""
        return [self.draw(policy) for _ in range(self.n)]

    def repeated(self, policy: Floats) -> list[int]:
        """By time: every environment repeats its action until the window closes."""
        actions = self.lock_step(policy)
        return [a for a in actions for _ in range(int(self.window / DURATION[a]))]

    def carried(self, policy: Floats) -> list[int]:
        """At their own pace; an unfinished action is completed in the next window."""
        completed, under_way = [], []
        first = [(a, DURATION[a]) for a in self.lock_step(policy)] if not self.under_way else []
        for a, left in self.under_way or first:
            left -= self.window
            while left <= 0:
                completed.append(a)
                a = self.draw(policy)
                left += DURATION[a]
            under_way.append((a, left))
        self.under_way = under_way
        return completed


def softmax(logits: Floats) -> Floats:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def gradient(policy: Floats, actions: list[int], weighted: bool) -> Floats:
    """REINFORCE's estimate of d E[reward] / d logits, up to a positive factor."""
    weights = arrival_weights(DURATION[actions]) if weighted else np.ones(len(actions))
    terms = (weights * PRIZE[actions])[:, None] * (np.eye(3)[actions] - policy)
    return np.asarray(terms.mean(0))


def test_gradients_with_and_without_the_weight() -> None:
    """Estimates against the closed form pi (fitness - mean fitness): in lock step fitness is the
    prize, by time prize / dt; the weight multiplies it by dt.
    """
    policy, sampler = np.array([0.5, 0.3, 0.2]), Sampler(10_000, 20.0)
    cases = [
        ("lock_step", False, PRIZE, SLOW),
        ("lock_step", True, PRIZE * DURATION, SLOWER),
        ("repeated", False, PRIZE / DURATION, QUICK),
        ("repeated", True, PRIZE, SLOW),
    ]
    for name, weighted, fitness, best in cases:
        estimate = gradient(policy, getattr(sampler, name)(policy), weighted)
        expected = policy * (fitness - policy @ fitness)
        unit, expected = (v / np.linalg.norm(v) for v in (estimate, expected))
        np.testing.assert_allclose(unit, expected, atol=0.07)
        assert estimate.argmax() == best, (name, weighted)


@pytest.mark.parametrize(
    ("name", "window", "weighted", "learned"),
    [
        ("lock_step", 0.0, False, SLOW),
        ("lock_step", 0.0, True, SLOWER),
        ("repeated", 20.0, False, QUICK),
        ("repeated", 20.0, True, SLOW),
        ("carried", 5.0, False, SLOW),
        ("carried", 5.0, True, SLOWER),
    ],
)
def test_learning_with_and_without_the_weight(
    name: str, window: float, weighted: bool, learned: int
) -> None:
    """SLOW pays most. The weight is needed only where fast actions are over-represented."""
    logits, sampler = np.zeros(3), Sampler(256, window)
    for _ in range(60):
        policy = softmax(logits)
        if actions := getattr(sampler, name)(policy):
            logits = logits + 1.5 * gradient(policy, actions, weighted)
    assert softmax(logits)[learned] > 0.8, softmax(logits)


def test_environments_that_drop_nothing_sample_the_policy() -> None:
    """A fraction pi(a) of completed steps: RLlib's asynchronous algorithms need no weight."""
    policy, sampler = np.array([0.5, 0.3, 0.2]), Sampler(500, 5.0)
    actions = np.concatenate([sampler.carried(policy) for _ in range(40)][10:])
    np.testing.assert_allclose(np.bincount(actions) / len(actions), policy, atol=0.02)


def test_weights() -> None:
    np.testing.assert_allclose(arrival_weights(np.array([1.0, 3.0])), [0.5, 1.5])
    np.testing.assert_array_equal(arrival_weights(np.zeros(2)), [1.0, 1.0])


# -- RLlib


@contextmanager
def built(
    folder: Path,
    algo: str,
    num_envs: int = 4,
    rollout: int = 16,
    *,
    reports: bool = True,
    by_time: bool = False,
    runners: int = 0,
    **params: Any,
) -> Iterator[Any]:
    """An algorithm on `num_envs` Pace environments, with the defaults of training in a world, but
    RLlib's SAC.
    """

    def make_env(count: int) -> AgentEnv:
        makers = [lambda: Pace(reports)] * count
        vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
        vector.metadata = {**vector.metadata, **({"arrival": "time"} if by_time else {})}
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


@pytest.mark.parametrize("algo", slow("APPO", "IMPALA"))
def test_algorithms_without_weights(ray_local: None, tmp_path: Path, algo: str) -> None:
    message = f"agent.algo={algo} cannot weight samples that arrive by time"
    with built(tmp_path, algo, by_time=True) as algorithm, pytest.raises(UsageError, match=message):
        learner_batch(algorithm, sampled(algorithm))


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
                patch.setattr(durations, "install", lambda algorithm: None)
            with built(tmp_path, algo, reports=name == "reports", **early) as algorithm:
                if algo == "DQN":  # RLlib does not seed it
                    algorithm.local_replay_buffer.rng = np.random.default_rng(0)
                for _ in range(2):
                    rllib.train(algorithm)
                state = algorithm.learner_group._learner.module["default_policy"].state_dict()
                learned[name] = torch.cat([value.flatten().clone() for value in state.values()])
    assert torch.equal(learned["plain"], learned["silent"])
    assert not torch.equal(learned["plain"], learned["reports"])


@pytest.mark.parametrize("by_time", [False, True])
def test_advantages_of_samples_that_arrive_by_time_count_by_duration(
    ray_local: None, tmp_path: Path, by_time: bool
) -> None:
    """Only with metadata['arrival']='time'; in lock step advantages are only standardised."""
    with built(tmp_path, "PPO", by_time=by_time) as algorithm:
        batch = learner_batch(algorithm, sampled(algorithm))
        values = values_of(algorithm, batch)
    real = batch["loss_mask"]
    weights = arrival_weights(DURATION[batch["actions"][real].numpy()]) if by_time else 1.0
    plain = batch["value_targets"] - values
    plain = ((plain - plain.mean()) / plain.std(correction=0))[real].numpy()
    actual = batch["advantages"][real].numpy()
    np.testing.assert_allclose(actual, plain * weights, rtol=1e-3, atol=1e-4)


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
    return (before or Durations({})).infos(infos, stepped, np.array(ended))


def test_infos() -> None:
    assert duration_infos([None, None], [False, True]) == {}
    for reported, ended in (([2.0, -0.1], [False, False]), ([2.0, None], [False, True])):
        assert duration_infos(list(reported), ended)["duration"].tolist() == [2.0, 0.0]
    assert "weight" not in duration_infos([2.0], [False])
    assert "weight" in duration_infos([2.0], [False], Durations({"arrival": "time"}))
    untimed = Durations({})
    duration_infos([None], [False], untimed)
    for mixed, before in (([2.0, None], None), ([None, 2.0], None), ([1.0], untimed)):
        with pytest.raises(MesocosmError, match="at some steps and not at others"):
            duration_infos(list(mixed), [False] * len(mixed), before)
    with pytest.raises(MesocosmError, match=r"info\['duration'\]=nan; give a finite number"):
        duration_infos([float("nan")], [False])
