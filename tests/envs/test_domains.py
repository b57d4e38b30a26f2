"""Environments that come with Mesocosm."""

import gymnasium
import numpy as np

from mesocosm.envs.builtin import halfcheetah, reacher
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of


def test_reacher_names_its_target_and_is_reacher_otherwise() -> None:
    plain, named = gymnasium.make("Reacher-v5"), reacher()
    plain.action_space.seed(0)
    left, _ = plain.reset(seed=3)
    right, _ = named.reset(seed=3)
    first = right["target"]
    for _ in range(50):
        np.testing.assert_array_equal(left[[0, 1, 2, 3, 6, 7, 8, 9]], right["arm"])
        np.testing.assert_array_equal(left[4:6], right["target"])
        np.testing.assert_array_equal(first, right["target"])
        action = plain.action_space.sample()
        left, reward, _, _, _ = plain.step(action)
        right, same, _, ended, _ = named.step(action)
        assert reward == same
    assert ended


def test_reacher_has_a_task_a_time_limit_and_observations_of_its_space() -> None:
    env = reacher()
    assert env.observation_space.contains(env.reset(seed=0)[0])
    facts = facts_of(RealityConfig(env="mesocosm.envs.builtin:reacher", task=["target"]))
    assert facts.max_episode_steps == 50
    assert set(facts.observation_space.spaces) == {"arm", "target"}


def test_halfcheetahs_actuators_err_by_the_seed_and_are_exact_without_noise() -> None:
    plain, exact, worn, again = (
        gymnasium.make("HalfCheetah-v5"),
        halfcheetah(noise=0.0),
        halfcheetah(),
        halfcheetah(),
    )
    every = (plain, exact, worn, again)
    for env in every:
        env.reset(seed=3)
    plain.action_space.seed(0)
    for _ in range(5):
        action = plain.action_space.sample()
        (left, r0, *_), (right, r1, *_), (noisy, *_), (same, *_) = (
            env.step(action) for env in every
        )
        np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(noisy, same)
        assert r0 == r1 and np.abs(left - noisy).max() > 1e-3
    assert (
        facts_of(RealityConfig(env="mesocosm.envs.builtin:halfcheetah")).max_episode_steps == 1000
    )


def test_artifacts_of_earlier_versions_name_the_module_by_its_old_path() -> None:
    facts = facts_of(RealityConfig(env="mesocosm.reality.domains:reacher", task=["target"]))
    assert facts.max_episode_steps == 50
