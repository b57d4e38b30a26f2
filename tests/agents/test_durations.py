"""Durations: gamma^dt in every algorithm, and the weight dt only where samples arrive by time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from mesocosm.agents import durations, rllib, settings
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.durations import Durations, arrival_weights
from mesocosm.agents.env import AgentEnv
from mesocosm.errors import MesocosmError, UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "sample_envs"))
from pace import DURATION, PRIZE, QUICK, SLOW, SLOWER, Pace

GAMMA = 0.8

# -- samplers

Samples = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Actions, rewards and durations of the steps that were completed."""


class Sampler:
    """`n` Pace environments, with one policy per window."""

    def __init__(self, n: int, window: float, seed: int = 0):
        self.envs, self.window, self.rng = (
            [Pace() for _ in range(n)],
            window,
            np.random.default_rng(seed),
        )
        self.under_way: list[tuple[int, float]] = []
        """Of `carried`: each environment's action, and the time until it is completed."""

    def draw(self, policy: NDArray[np.float64]) -> int:
        return min(int((policy.cumsum() < self.rng.random()).sum()), len(policy) - 1)

    def lock_step(self, policy: NDArray[np.float64]) -> Samples:
        """Every environment steps once, and all wait for the slowest: a vector environment."""
        return self._samples([self.draw(policy) for _ in self.envs])

    def repeated(self, policy: NDArray[np.float64]) -> Samples:
        """By time: every environment repeats what it began until the window closes."""
        return self._samples(
            [
                a
                for a in (self.draw(policy) for _ in self.envs)
                for _ in range(int(self.window / DURATION[a]))
            ]
        )

    def carried(self, policy: NDArray[np.float64]) -> Samples:
        """At their own pace; an unfinished action is completed in the next window."""
        done, going = [], []
        for a, left in self.under_way or [
            (a, DURATION[a]) for a in (self.draw(policy) for _ in self.envs)
        ]:
            left -= self.window
            while left <= 0:
                done.append(a)
                a = self.draw(policy)
                left += DURATION[a]
            going.append((a, left))
        self.under_way = going
        return self._samples(done)

    def _samples(self, actions: list[int]) -> Samples:
        rewards, took = np.zeros(len(actions)), np.zeros(len(actions))
        env = self.envs[0]
        env.reset()
        for k, action in enumerate(actions):
            _, rewards[k], _, _, info = env.step(action)
            took[k] = info["duration"]
        return np.array(actions, np.int64), rewards, took


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def gradient(policy: NDArray[np.float64], samples: Samples, weighted: bool) -> NDArray[np.float64]:
    """REINFORCE's estimate of d E[reward] / d logits, up to a positive factor."""
    actions, rewards, took = samples
    weights = arrival_weights(took) if weighted else np.ones(len(actions))
    return np.asarray(((weights * rewards)[:, None] * (np.eye(3)[actions] - policy)).mean(0))


def learn(
    sample: Callable[[NDArray[np.float64]], Samples], weighted: bool, updates: int = 60
) -> NDArray[np.float64]:
    """The policy that REINFORCE learns from the uniform one."""
    logits = np.zeros(3)
    for _ in range(updates):
        samples = sample(softmax(logits))
        if len(samples[0]):
            logits = logits + 1.5 * gradient(softmax(logits), samples, weighted)
    return softmax(logits)


def towards(policy: NDArray[np.float64], fitness: NDArray[np.float64]) -> NDArray[np.float64]:
    """The policy gradient on the logits where an action is worth its fitness: pi (fitness - mean
    fitness), as a direction.
    """
    ascent = policy * (fitness - policy @ fitness)
    return ascent / np.linalg.norm(ascent)


def test_gradients_with_and_without_the_weight() -> None:
    """Estimates against closed form: in lock step fitness is the prize, by time prize / dt; the
    weight multiplies it by dt.
    """
    policy, sampler = np.array([0.5, 0.3, 0.2]), Sampler(10_000, 20.0)
    by_time = PRIZE / DURATION
    cases = {
        ("lock_step", False): PRIZE,
        ("lock_step", True): PRIZE * DURATION,
        ("repeated", False): by_time,
        ("repeated", True): PRIZE,
    }
    best = {}
    for (name, weighted), fitness in cases.items():
        estimate = gradient(policy, getattr(sampler, name)(policy), weighted)
        estimate /= np.linalg.norm(estimate)
        np.testing.assert_allclose(estimate, towards(policy, fitness), atol=0.07)
        best[name, weighted] = int(estimate.argmax())
    assert best == {
        ("lock_step", False): SLOW,
        ("lock_step", True): SLOWER,
        ("repeated", False): QUICK,
        ("repeated", True): SLOW,
    }


@pytest.mark.parametrize(
    ("sampler", "window", "weighted", "learned"),
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
    sampler: str, window: float, weighted: bool, learned: int
) -> None:
    """SLOW pays most. The weight is needed only where fast actions are over-represented."""
    policy = learn(getattr(Sampler(256, window), sampler), weighted)
    assert policy[learned] > 0.8, policy


def test_environments_that_drop_nothing_sample_the_policy() -> None:
    """A fraction pi(a) of completed steps: RLlib's asynchronous algorithms need no weight."""
    policy, sampler = np.array([0.5, 0.3, 0.2]), Sampler(500, 5.0)
    windows = [sampler.carried(policy)[0] for _ in range(40)][10:]
    np.testing.assert_allclose(
        np.bincount(np.concatenate(windows)) / sum(map(len, windows)), policy, atol=0.02
    )


def test_weights() -> None:
    np.testing.assert_allclose(arrival_weights(np.array([1.0, 3.0])), [0.5, 1.5])
    np.testing.assert_array_equal(arrival_weights(np.zeros(2)), [1.0, 1.0])


# -- RLlib


def pace(num_envs: int, reports: bool = True, by_time: bool = False) -> AgentEnv:
    vector = SyncVectorEnv(
        [lambda: Pace(told=reports)] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP
    )
    vector.metadata = {**vector.metadata, **({"arrival": "time"} if by_time else {})}
    return AgentEnv(vector)


@contextmanager
def built(
    folder: Path,
    algo: str,
    make_env: Callable[[int], AgentEnv],
    num_envs: int,
    rollout: int,
    **params: Any,
) -> Iterator[Any]:
    model = {"fcnet_hiddens": [16]}
    shape = {"num_envs": num_envs, "rollout": rollout}
    config = AgentConfig(algo=algo, params=params, model=model, gamma=GAMMA, **shape)
    setup = replace(settings.imagined(config), rollout=rollout)
    algorithm = rllib.build(setup, make_env, folder)
    try:
        yield algorithm
    finally:
        algorithm.stop()


def learner_batch(algorithm: Any, episodes: list[Any]) -> Any:
    """The losses' input, by RLlib's names."""
    learner = algorithm.learner_group._learner
    return learner._learner_connector(
        rl_module=learner.module,
        batch={},
        episodes=episodes,
        shared_data={},
        metrics=learner.metrics,
    )["default_policy"]


def sampled(algorithm: Any) -> list[Any]:
    episodes = algorithm.env_runner.sample()
    buffer = algorithm.local_replay_buffer if hasattr(algorithm, "local_replay_buffer") else None
    if buffer is None:
        return list(episodes)
    buffer.add(episodes)
    return list(
        buffer.sample(
            num_items=64,
            n_step=algorithm.config.n_step,
            gamma=GAMMA,
            beta=0.4,
            batch_length_T=0,
            lookback=0,
            sample_episodes=True,
        )
    )


@pytest.mark.parametrize(
    "algo",
    [
        "PPO",
        *(pytest.param(algo, marks=pytest.mark.slow) for algo in ("DQN", "SAC", "APPO", "IMPALA")),
    ],
)
def test_every_algorithm_discounts_by_durations(ray_local: None, tmp_path: Path, algo: str) -> None:
    """Losses discount by gamma (1 - terminated), and by gamma ** n_step (1 - terminated) those of
    replay: that is gamma^dt.
    """
    with built(tmp_path, algo, pace, 4, 16) as algorithm:
        batch = learner_batch(algorithm, sampled(algorithm))
        real = (
            batch["loss_mask"].bool()
            if "loss_mask" in batch
            else torch.ones(len(batch["rewards"]), dtype=torch.bool)
        )
        discount = (GAMMA * (1.0 - batch["terminateds"].float()))[real]
        taken = batch["actions"][real].long()
        assert len(taken.unique()) == 3
        torch.testing.assert_close(
            discount, torch.as_tensor(GAMMA**DURATION, dtype=torch.float32)[taken]
        )
        rllib.train(algorithm)  # in which the losses take that column


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["APPO", "IMPALA"])
def test_algorithms_without_weights(ray_local: None, tmp_path: Path, algo: str) -> None:
    words = f"agent.algo={algo} cannot weight samples that arrive by time"
    with (
        built(tmp_path, algo, lambda n: pace(n, by_time=True), 4, 16) as algorithm,
        pytest.raises(UsageError, match=words),
    ):
        learner_batch(algorithm, sampled(algorithm))


def test_advantages_are_those_of_a_semi_markov_process(ray_local: None, tmp_path: Path) -> None:
    with built(tmp_path, "PPO", pace, 3, 20, lambda_=0.9) as algorithm:
        episodes = sampled(algorithm)
        ended = [episode.is_done for episode in episodes]
        assert any(ended) and not all(ended), "cut by the time limit, and by the rollout"
        batch = learner_batch(algorithm, episodes)
        values = (
            algorithm.learner_group._learner.module["default_policy"]
            .compute_values(batch)
            .detach()
            .numpy()
        )
        targets, start = [], 0
        for episode in episodes:
            n = len(episode)  # with the step that RLlib adds for the last value
            v, actions, advantage = (
                values[start : start + n],
                np.asarray(episode.get_actions())[: n - 1],
                0.0,
            )
            start, backwards = start + n, []
            for t in reversed(range(n - 1)):
                gamma = GAMMA ** DURATION[actions[t]]
                advantage = PRIZE[actions[t]] + gamma * v[t + 1] - v[t] + gamma * 0.9 * advantage
                backwards.append(advantage + v[t])
            targets += backwards[::-1]
        np.testing.assert_allclose(
            batch["value_targets"][batch["loss_mask"]].numpy(), targets, rtol=1e-4
        )


def test_ppo_finds_what_is_best_for_a_unit_of_time(ray_local: None, tmp_path: Path) -> None:
    """QUICK is best with gamma^dt; without durations gamma is per step, and SLOW is best."""
    for reports, best in ((True, QUICK), (False, SLOW)):
        learning = {"lr": 1e-2, "entropy_coeff": 0.0, "use_kl_loss": False, "minibatch_size": 128}
        with built(
            tmp_path, "PPO", lambda n, reports=reports: pace(n, reports), 16, 16, **learning
        ) as algorithm:  # type: ignore[misc]
            for _ in range(8):
                rllib.train(algorithm)
            batch = learner_batch(algorithm, sampled(algorithm))
        share = np.bincount(batch["actions"][batch["loss_mask"]].numpy(), minlength=3) / int(
            batch["loss_mask"].sum()
        )
        assert share[best] > 0.9, (reports, share)


@pytest.mark.parametrize("algo", ["PPO", "DQN"])
def test_without_durations_nothing_changes(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    """The weights have the bits of RLlib's own pipeline; with durations they differ."""
    learned = {}
    early = {} if algo == "PPO" else {"num_steps_sampled_before_learning_starts": 16}
    for name, reports in (("own", False), ("installed", False), ("reports", True)):
        with (
            monkeypatch.context() as patch,
            built_plain(patch, tmp_path, algo, reports, plain=name == "own", **early) as algorithm,
        ):
            if algo == "DQN":  # RLlib does not seed it
                algorithm.local_replay_buffer.rng = np.random.default_rng(0)
            for _ in range(2):
                rllib.train(algorithm)
            state = algorithm.learner_group._learner.module["default_policy"].state_dict()
            learned[name] = {key: value.clone() for key, value in state.items()}
    assert all(
        torch.equal(learned["own"][key], value) for key, value in learned["installed"].items()
    )
    assert not all(
        torch.equal(learned["own"][key], value) for key, value in learned["reports"].items()
    )


@contextmanager
def built_plain(
    patch: pytest.MonkeyPatch, folder: Path, algo: str, reports: bool, plain: bool, **params: Any
) -> Iterator[Any]:
    if plain:
        patch.setattr(durations, "install", lambda algorithm: None)
    with built(folder, algo, lambda n: pace(n, reports), 4, 16, **params) as algorithm:
        yield algorithm


def test_advantages_of_samples_that_arrive_by_time_count_by_duration(
    ray_local: None, tmp_path: Path
) -> None:
    """Only with metadata['arrival']='time'; in lock step advantages are only standardised."""
    for by_time in (False, True):
        with built(
            tmp_path, "PPO", lambda n, by_time=by_time: pace(n, by_time=by_time), 4, 16
        ) as algorithm:  # type: ignore[misc]
            batch = learner_batch(algorithm, sampled(algorithm))
        real = batch["loss_mask"]
        took = DURATION[batch["actions"][real].numpy()]
        values = (
            algorithm.learner_group._learner.module["default_policy"].compute_values(batch).detach()
        )
        plain = batch["value_targets"] - values
        plain = ((plain - plain.mean()) / plain.std(correction=0))[real].numpy()
        np.testing.assert_allclose(
            batch["advantages"][real].numpy(),
            plain * (arrival_weights(took) if by_time else 1.0),
            rtol=1e-3,
            atol=1e-4,
        )


def test_steps_of_several_transitions_are_refused_where_durations_discount(
    ray_local: None, tmp_path: Path
) -> None:
    learning = {"n_step": 3, "num_steps_sampled_before_learning_starts": 16}
    with (
        built(tmp_path, "DQN", pace, 4, 16, **learning) as algorithm,
        pytest.raises(UsageError, match=r"params.n_step must be 1 .*got [23]"),
    ):
        rllib.train(algorithm)


# -- an environment's infos


def duration_infos(
    given: list[float | None], ended: list[bool], before: Durations | None = None
) -> dict[str, Any]:
    mask = np.array([g is not None for g in given])
    infos = (
        {"duration": np.array([g or 0.0 for g in given]), "_duration": mask} if mask.any() else {}
    )
    return (before or Durations({})).infos(infos, np.ones(len(given), np.bool_), np.array(ended))


def test_infos() -> None:
    assert duration_infos([None, None], [False, True]) == {}
    np.testing.assert_array_equal(
        duration_infos([2.0, -0.1], [False, False])["duration"], [2.0, 0.0]
    )
    np.testing.assert_array_equal(
        duration_infos([2.0, None], [False, True])["duration"], [2.0, 0.0]
    )
    assert "weight" not in duration_infos([2.0], [False]) and "weight" in duration_infos(
        [2.0], [False], Durations({"arrival": "time"})
    )
    for given in ([2.0, None], [None, 2.0]):
        with pytest.raises(MesocosmError, match="at some steps and not at others"):
            duration_infos(list(given), [False, False])
    with pytest.raises(MesocosmError, match=r"info\['duration'\]=nan; give a finite number"):
        duration_infos([float("nan")], [False])
    with pytest.raises(MesocosmError, match="at some steps and not at others"):
        untimed = Durations({})
        duration_infos([None], [False], untimed)
        duration_infos([1.0], [False], untimed)
