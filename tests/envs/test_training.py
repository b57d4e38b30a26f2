"""Steering a training run: the same to the bit, a declared time, and runs that diverge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mesocosm.envs import known, training_policies
from mesocosm.envs.config import PriceConfig, RealityConfig
from mesocosm.envs.make import facts_of
from mesocosm.envs.training import (
    CONTINUE,
    FROM_BEST,
    FROM_SCRATCH,
    LIMIT,
    STOP,
    DigitsNet,
    TrainingRun,
)

pytest.importorskip("sklearn")
CONFIG = Path(__file__).parents[2] / "configs" / "collect" / "training.yaml"


def episode(seed: int, actions: list[tuple[int, ...]]) -> tuple[TrainingRun, list[Any]]:
    env = TrainingRun()
    steps: list[Any] = [env.reset(seed=seed)]
    for action in actions:
        steps.append(env.step(np.array(action)))
        assert env.observation_space.contains(steps[-1][0])
    return env, steps


def test_an_episode_repeats_to_the_bit() -> None:
    actions = [(CONTINUE, 4, 0, 1, 1), (FROM_BEST, 2, 1, 0, 0), (FROM_SCRATCH, 3, 2, 0, 2)]
    (_, one), (_, two) = episode(3, actions), episode(3, actions)
    for a, b in zip(one, two, strict=True):
        assert all(np.array_equal(a[0][key], b[0][key]) for key in a[0])
        assert a[1:] == b[1:]
    assert one[1][0]["now"][6] == np.float32(0.1), "one run so far"
    assert not np.array_equal(one[0][0]["data"], episode(4, [])[1][0][0]["data"])


def test_the_gradient_is_that_of_the_cross_entropy() -> None:
    net, generator = DigitsNet([5, 7, 6, 3], 0), torch.Generator().manual_seed(0)
    features, labels = torch.randn(9, 5), torch.eye(3)[torch.randint(3, (9,))]
    theta, hidden, start = net.theta.clone().requires_grad_(), features, 0
    for rows, columns in ((6, 7), (8, 6), (7, 3)):
        layer = theta[start : start + rows * columns].view(rows, columns)
        start += rows * columns
        hidden = torch.relu(hidden) if hidden is not features else hidden
        hidden = hidden @ layer[:-1] + layer[-1]
    loss = torch.nn.functional.cross_entropy(hidden, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    assert net.curve((features, labels))[0] == pytest.approx(loss.item(), rel=1e-5)
    before = net.theta.clone()
    net.fit((features, labels), generator, rate=0.5, batch=9, epochs=1, decay=0.1)
    step = theta.grad + 0.1 * before  # type: ignore[operator]
    torch.testing.assert_close(net.theta, before - 0.5 * step)


def test_the_best_network_comes_back_and_a_new_one_is_another() -> None:
    env, steps = episode(0, [(CONTINUE, 4, 0, 2, 0)])
    best = steps[-1][0]["now"].copy()
    env.step(np.array((CONTINUE, 6, 0, 0, 2)))
    env._net.theta.copy_(env._saved)
    env._measure()
    assert env._curve[3] == pytest.approx(float(best[4]))
    env._runs += 1
    env._begin()
    assert not torch.equal(env._net.theta, env._saved)


def test_time_is_declared_and_spans_a_factor_of_a_thousand() -> None:
    env = TrainingRun()
    seconds = []
    for seed in range(40):
        env.reset(seed=seed)
        seconds += [env._seconds(9, 16), env._seconds(1, 256)]
    stop = env.step(np.array((STOP, 0, 0, 0, 0)))
    assert stop[2] and stop[4]["duration"] == 1e-3 and stop[1] == -2e-3
    assert max(seconds) / stop[4]["duration"] > 1000 and max(seconds) < 3.0
    largest = DigitsNet([64, 128, 128, 128, 10], 0)
    env._net, env._train = largest, (torch.zeros(600, 64), torch.zeros(600, 10))
    assert 1.0 < env._seconds(9, 16) < 3.0, "reality.price.longest_s=3 holds"


def test_a_run_that_diverges_is_observed_and_can_be_left() -> None:
    for seed in range(20):
        env, steps = episode(seed, [(CONTINUE, 6, 0, 2, 0), (CONTINUE, 0, 0, 0, 0)])
        if steps[1][4]["diverged"]:
            break
    else:
        raise AssertionError("no run of 20 diverges at the rate 1")
    for step in steps[1:]:
        now = step[0]["now"]
        assert step[4]["diverged"] and np.isfinite(now).all() and step[1] < 0
        assert now[0] == now[2] == LIMIT and now[1] == now[3] == 0
    again = env.step(np.array((FROM_SCRATCH, 0, 0, 0, 0)))
    assert not again[4]["diverged"] and again[0]["now"][0] < LIMIT


def test_the_budget_ends_an_episode() -> None:
    env = TrainingRun(budget_s=0.01)
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step(np.array((CONTINUE, 3, 1, 2, 0)))
    assert terminated and not truncated and info["duration"] > 0.01


@pytest.mark.parametrize("name", ["ConstantRate", "FallingRate", "AdaptiveRate", "RandomSettings"])
def test_the_scripts_act_within_the_space(name: str) -> None:
    act, env = getattr(training_policies, name)(), TrainingRun()
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=1)
    for _ in range(60):
        action = act(observation, rng)
        assert env.action_space.contains(action)
        observation, _, ended, *_ = env.step(action)
        if ended:
            break
    assert ended


def test_its_known_reward_and_ending_are_its_own() -> None:
    """Also where it is stopped, and where the budget is spent."""
    act, rng, rows = training_policies.RandomSettings(), np.random.default_rng(0), list[Any]()
    env = TrainingRun(budget_s=0.4)
    for seed in range(8):
        observation, ended = env.reset(seed=seed)[0], False
        while not ended:
            action = np.array((STOP, 0, 0, 0, 0)) if seed < 3 else act(observation, rng)
            following, reward, ended, *_ = env.step(action)
            rows.append((observation, action, following, reward, ended))
            observation = following
    before, actions, after, rewards, ends = zip(*rows, strict=True)
    raw = [
        {key: torch.from_numpy(np.stack([row[key] for row in part])).double() for key in before[0]}
        for part in (before, after)
    ]
    arguments = raw[0], torch.from_numpy(np.stack(actions)), raw[1]
    expected = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(known.training_reward(*arguments), expected, rtol=1e-5, atol=1e-5)
    assert known.training_terminated(*arguments).tolist() == list(ends)
    assert sum(ends) == 8 and len(ends) > 12


def test_its_spaces_and_its_shipped_config() -> None:
    from mesocosm.config import load
    from mesocosm.data.collecting.config import CollectConfig

    config = load(CollectConfig, [CONFIG])
    assert isinstance(config.reality, RealityConfig)
    assert config.reality.price == PriceConfig(per_second=5.5556e-4, longest_s=3.0)
    facts = facts_of(config.reality)
    assert facts.action_space == TrainingRun().action_space
