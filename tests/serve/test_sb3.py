"""Stable-Baselines3 trains in a world."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from mesocosm.errors import UsageError
from mesocosm.serve.sb3 import WorldVecEnv
from mesocosm.serve.world_env import WorldVectorEnv

from .worlds import DICT, untrained


def test_steps() -> None:
    """Steps equal the vector environment's: done, terminal observation, truncation."""
    world = untrained(DICT, spaces.Box(-1, 1, (2,), np.float32), terminal=0.1)
    options: Any = {"horizon": 5, "autoreset_mode": "SameStep"}
    env = WorldVecEnv(WorldVectorEnv(4, world, **options))
    plain = WorldVectorEnv(4, world, **options)

    def assert_equal(actual: Any, expected: Any) -> None:
        assert all((actual[key] == expected[key]).all() for key in DICT)

    env.seed(7)
    assert_equal(env.reset(), plain.reset(seed=7)[0])
    plain.action_space.seed(0)
    ended = cut = 0
    for _ in range(25):
        action = plain.action_space.sample()
        observation, reward, terminated, truncated, infos = plain.step(action)
        observations, rewards, done, env_infos = env.step(action)
        assert_equal(observations, observation)
        np.testing.assert_array_equal(rewards, reward.astype(np.float32))
        np.testing.assert_array_equal(done, terminated | truncated)
        for i, info in enumerate(env_infos):
            assert ("terminal_observation" in info) == done[i]
            source = infos["final_info"] if done[i] else infos
            assert info["disagreement"] == source["disagreement"][i]
            if done[i]:
                assert_equal(info["terminal_observation"], infos["final_obs"][i])
                assert info["TimeLimit.truncated"] == truncated[i]
                ended, cut = ended + 1, cut + int(truncated[i])
    assert ended > cut > 0
    env.close()


def test_ppo_learns_in_it() -> None:
    """A short version of the documented example: PPO through VecMonitor."""
    world = untrained(terminal=0.1)
    env = VecMonitor(WorldVecEnv(WorldVectorEnv(8, world, horizon=20, autoreset_mode="SameStep")))
    agent = PPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=2, seed=0, device="cpu")
    before = [p.clone() for p in agent.policy.parameters()]
    agent.learn(512)
    assert agent.num_timesteps == 512 and len(agent.ep_info_buffer or []) > 8
    assert any((a != b).any() for a, b in zip(before, agent.policy.parameters(), strict=True))
    action, _ = agent.predict(np.zeros((2, 3), np.float32))
    assert action.shape == (2,)


def test_wrong_mode() -> None:
    with pytest.raises(UsageError, match=r"autoreset_mode must be 'SameStep' .* got 'NextStep'"):
        WorldVecEnv(WorldVectorEnv(2, untrained()))
