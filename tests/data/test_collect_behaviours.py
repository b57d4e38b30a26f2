"""Behaviours that collect: their shares of the episodes, noise, and trained policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mesocosm.data.collecting.config import CollectConfig
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.policies.behaviours import BehaviourConfig, build, choose
from mesocosm.policies.policy import Layout, Policy
from mesocosm.store.artifacts import Artifact, Storage

from .reality import config, scripted

Collect = Callable[[CollectConfig], Artifact]


def test_behaviours_have_their_shares_of_few_episodes_too() -> None:
    """Of any run of episodes, to within two; and who begins is drawn by the seed."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        weights = rng.exponential(size=rng.integers(2, 8)) + 0.02
        behaviours = [BehaviourConfig(weight=float(weight)) for weight in weights]
        seed, first = int(rng.integers(2**31)), int(rng.integers(10**9))
        chosen = [choose(behaviours, seed, first + k) for k in range(100)]
        for episodes in (5, 20, 100):
            counts = np.bincount(chosen[:episodes], minlength=len(weights))
            assert np.abs(counts - episodes * weights / weights.sum()).max() < 2
    even = [BehaviourConfig() for _ in range(5)]
    assert {choose(even, seed, 0) for seed in range(40)} == set(range(5))


def test_the_mixture_is_a_function_of_seed_and_episode() -> None:
    mix = [
        BehaviourConfig(weight=1),
        BehaviourConfig("noisy", weight=3, function="a:b"),
        BehaviourConfig("scripted", weight=6, function="a:b"),
    ]
    drawn = [choose(mix, 3, k) for k in range(1500)]
    assert drawn[:200] == [choose(mix, 3, k) for k in range(200)]
    assert drawn[:200] != [choose(mix, 4, k) for k in range(200)]
    counts = Counter(drawn)
    assert [round(counts[i] / 1500, 1) for i in range(3)] == [0.1, 0.3, 0.6]


def test_noise(root: str, user_module: None) -> None:
    rng, zeros = np.random.default_rng(0), np.zeros(3, np.float32)
    spaces = facts_of(RealityConfig(env="Pendulum-v1")).spaces
    noisy, wild = (
        build(
            BehaviourConfig("noisy", noise=noise, function="ownenvs:push_left"),
            *spaces,
            Storage(root),
        )
        for noise in (0.1, 5.0)
    )
    drawn = np.array([noisy(zeros, rng) for _ in range(2000)])
    assert drawn.dtype == np.float32
    assert abs(drawn.mean() + 0.5) < 0.02 and abs(drawn.std() - 0.2) < 0.02
    assert all(spaces[1].contains(wild(zeros, rng)) for _ in range(200))
    behaviour = BehaviourConfig("noisy", noise=0.4, function="ownenvs:always_one")
    spaces = facts_of(RealityConfig(env="CartPole-v1")).spaces
    act = build(behaviour, *spaces, Storage(root))
    act.start(0, rng)  # type: ignore[attr-defined]
    assert abs(np.mean([act(np.zeros(4, np.float32), rng) for _ in range(2000)]) - 0.8) < 0.04


@pytest.mark.integration
def test_a_trained_policy_acts(root: str, collect: Collect) -> None:
    spaces = facts_of(RealityConfig(env="CartPole-v1")).spaces
    torch.manual_seed(0)
    layer = {"kind": "linear", "in": 4, "out": 2, "bias": True}
    policy = Policy("PPO", *spaces, Layout("categorical", [layer]))
    with torch.no_grad():  # push towards the side to which the pole falls: far better than chance
        policy.network.trunk[0].weight.copy_(torch.tensor([[0.0, 0, -9, -9], [0, 0, 9, 9]]))
        policy.network.trunk[0].bias.zero_()
    agent = Storage(root).make("agents", "feed0123feed0123", {}, policy.save)
    trained = [BehaviourConfig("trained", policy="agents/feed")]
    noiseless = [BehaviourConfig("noisy", noise=0.0, policy="agents/feed")]
    result, best = (collect(config(root, steps=600, behaviours=b)) for b in (trained, noiseless))
    assert result.meta["inputs"] == {"agents": [agent.id]}
    assert set(result.meta["counts"]["behaviours"]) == {f"trained {agent.name}"}
    assert best.id != result.id
    for artifact in (result, best):
        assert 600 / artifact.meta["counts"]["episodes"] > 60
    with pytest.raises(UsageError, match="needs the observation space"):
        collect(config(root, "Pendulum-v1", behaviours=trained))
    missing = [BehaviourConfig("trained", policy="agents/beef")]
    with pytest.raises(UsageError, match="no artifact agents/beef"):
        collect(config(root, behaviours=missing))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_far", r"returned the action array\(\[7.\].*not in the action space"),
        ("broken", "raised KeyError"),
    ],
)
def test_a_behaviour_that_is_wrong(
    root: str, user_module: None, collect: Collect, function: str, message: str
) -> None:
    with pytest.raises(MesocosmError, match=message):
        collect(config(root, "ownenvs:Line", behaviours=scripted(function)))
