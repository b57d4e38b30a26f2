"""Environments that come with Mesocosm."""

import gymnasium
import numpy as np
import pytest

from mesocosm.envs.builtin import halfcheetah, reacher
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of


def test_reacher_names_its_target_and_is_reacher_otherwise() -> None:
    plain, named = gymnasium.make("Reacher-v5"), reacher()
    plain.action_space.seed(0)
    left, _ = plain.reset(seed=3)
    right, _ = named.reset(seed=3)
    assert named.observation_space.contains(right)
    target = right["target"]
    for _ in range(50):
        np.testing.assert_array_equal(left[[0, 1, 2, 3, 6, 7, 8, 9]], right["arm"])
        np.testing.assert_array_equal(left[4:6], right["target"])
        np.testing.assert_array_equal(target, right["target"])
        action = plain.action_space.sample()
        left, reward, _, _, _ = plain.step(action)
        right, same, _, ended, _ = named.step(action)
        assert reward == same
    assert ended


@pytest.mark.parametrize("module", ["mesocosm.envs.builtin", "mesocosm.reality.domains"])
def test_reacher_has_a_task_and_a_time_limit_under_its_name_and_its_earlier_name(
    module: str,
) -> None:
    facts = facts_of(RealityConfig(env=f"{module}:reacher", task=["target"]))
    assert facts.max_episode_steps == 50
    assert set(facts.observation_space.spaces) == {"arm", "target"}


def test_halfcheetahs_actuators_err_by_the_seed_and_are_exact_without_noise() -> None:
    plain, exact = gymnasium.make("HalfCheetah-v5"), halfcheetah(noise=0.0)
    envs = [plain, exact, halfcheetah(), halfcheetah()]
    for env in envs:
        env.reset(seed=3)
    plain.action_space.seed(0)
    for _ in range(5):
        action = plain.action_space.sample()
        observations, rewards = zip(*(env.step(action)[:2] for env in envs), strict=True)
        np.testing.assert_array_equal(observations[0], observations[1])
        np.testing.assert_array_equal(observations[2], observations[3])
        assert rewards[0] == rewards[1] and np.abs(observations[0] - observations[2]).max() > 1e-3
    config = RealityConfig(env="mesocosm.envs.builtin:halfcheetah")
    assert facts_of(config).max_episode_steps == 1000
