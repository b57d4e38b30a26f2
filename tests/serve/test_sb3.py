"""Stable-Baselines3 trains in a world."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from mesocosm.errors import UsageError
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.sb3 import WorldVecEnv

DICT = spaces.Dict(
    {"place": spaces.Box(-np.inf, np.inf, (2,), np.float64), "room": spaces.Discrete(4)}
)


def test_steps(make_world: Any) -> None:
    """Steps equal the vector environment's: done, terminal observation, truncation."""
    world = make_world(DICT, spaces.Box(-1, 1, (2,), np.float32), terminal=0.1)
    env = WorldVecEnv(WorldVectorEnv(4, world, horizon=5, autoreset_mode="SameStep"))
    plain = WorldVectorEnv(4, world, horizon=5, autoreset_mode="SameStep")
    env.seed(7)
    first = env.reset()
    expected, _ = plain.reset(seed=7)
    assert all((first[key] == expected[key]).all() for key in DICT)
    plain.action_space.seed(0)
    ended = cut = 0
    for _ in range(25):
        action = plain.action_space.sample()
        observation, reward, terminated, truncated, infos = plain.step(action)
        observations, rewards, done, each = env.step(action)
        assert all((observations[key] == observation[key]).all() for key in DICT)
        np.testing.assert_array_equal(rewards, reward.astype(np.float32))
        np.testing.assert_array_equal(done, terminated | truncated)
        for i in range(4):
            assert ("terminal_observation" in each[i]) == done[i]
            source = infos["final_info"] if done[i] else infos
            assert each[i]["disagreement"] == source["disagreement"][i]
            if done[i]:
                assert all(
                    (each[i]["terminal_observation"][key] == infos["final_obs"][i][key]).all()
                    for key in DICT
                )
                assert each[i]["TimeLimit.truncated"] == truncated[i]
                ended, cut = ended + 1, cut + int(truncated[i])
    assert ended > cut > 0
    env.close()


def test_ppo_learns_in_it(make_world: Any) -> None:
    """A short version of the documented example: PPO through VecMonitor."""
    world = make_world(spaces.Box(-np.inf, np.inf, (3,), np.float32), terminal=0.1)
    env = VecMonitor(WorldVecEnv(WorldVectorEnv(8, world, horizon=20, autoreset_mode="SameStep")))
    agent = PPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=2, seed=0, device="cpu")
    before = [p.clone() for p in agent.policy.parameters()]
    agent.learn(512)
    assert agent.num_timesteps == 512 and len(agent.ep_info_buffer or []) > 8
    assert any((a != b).any() for a, b in zip(before, agent.policy.parameters(), strict=True))
    action, _ = agent.predict(np.zeros((2, 3), np.float32))
    assert action.shape == (2,)


def test_wrong_use(make_world: Any) -> None:
    with pytest.raises(
        UsageError,
        match=("autoreset_mode must be 'SameStep' for Stable-Baselines3, got 'NextStep'"),
    ):
        WorldVecEnv(WorldVectorEnv(2, make_world()))
