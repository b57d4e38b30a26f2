"""Robot arms: goals in the observation, experts, known rewards, and episodes that repeat."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from mesocosm.envs import known, robot_policies
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env, task_keys
from mesocosm.errors import UsageError

META_WORLD = "mesocosm.envs.robotics:MetaWorld"
EXPERTS = {
    "fetch-push": robot_policies.fetch_push,
    "fetch-pick": robot_policies.fetch_pick_and_place,
    "reach": robot_policies.meta_world_reach,
    "push": robot_policies.meta_world_push,
    "drawer-open": robot_policies.meta_world_drawer_open,
}
FETCH = {"fetch-push": "FetchPush-v4", "fetch-pick": "FetchPickAndPlace-v4"}


def config(task: str) -> RealityConfig:
    """The reality of configs/collect."""
    if task in FETCH:
        pytest.importorskip("gymnasium_robotics")
        return RealityConfig(env=f"gymnasium_robotics:{FETCH[task]}", task=["desired_goal"])
    pytest.importorskip("metaworld")
    return RealityConfig(env=META_WORLD, kwargs={"task": task}, task=["goal"], horizon=40)


def play(env: Any, policy: Any, seed: int) -> list[Any]:
    """An episode as (observation, action, reward, next observation, info)."""
    rng = np.random.default_rng(seed)
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    result, over = [], False
    while not over:
        action = policy(observation, rng) if policy else env.action_space.sample()
        following, reward, terminated, over, info = env.step(action)
        assert not terminated and following in env.observation_space
        result.append((observation, action, reward, following, info))
        observation = following
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("task", EXPERTS)
def test_the_expert_succeeds_where_random_actions_do_not(task: str) -> None:
    reality = config(task)
    env = make_env(reality)
    assert task_keys(reality, env.observation_space) == reality.task
    goals = set()
    for seed in range(3):
        solved, drawn = play(env, EXPERTS[task], seed), play(env, None, seed)
        key = "is_success" if task in FETCH else "success"
        assert solved[-1][-1][key] and not drawn[-1][-1][key]
        goal = [tuple(each[3][reality.task[0]]) for each in solved]
        goals |= set(goal)
        assert len(set(goal)) == 1
    assert len(goals) == 3
    env.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("task", ["fetch-push", "reach", "drawer-open"])
def test_an_episode_repeats_after_others(task: str) -> None:
    env, other = make_env(config(task)), make_env(config(task))
    play(other, None, seed=5)
    np.testing.assert_equal(play(env, EXPERTS[task], 1), play(other, EXPERTS[task], 1))
    for each in (env, other):
        each.close()


@pytest.mark.slow
@pytest.mark.parametrize("task", FETCH)
@pytest.mark.parametrize("dense", [False, True])
def test_the_reward_of_fetch_is_known(task: str, dense: bool) -> None:
    reality = config(task)
    kwargs = {"reward_type": "dense" if dense else "sparse"}
    env = make_env(RealityConfig(env=reality.env, kwargs=kwargs))
    steps = play(env, EXPERTS[task], 0) + play(env, None, 1)
    before, after = (
        {
            name: torch.from_numpy(np.stack([step[i][name] for step in steps]))
            for name in steps[0][0]
        }
        for i in (0, 3)
    )
    action = torch.from_numpy(np.stack([step[1] for step in steps]))
    function = known.fetch_dense_reward if dense else known.fetch_reward
    reward = function(before, action, after).numpy()
    np.testing.assert_allclose(reward, [step[2] for step in steps], rtol=1e-12)
    assert len(set(reward.tolist())) > 1 and not known.never(before, action, after).any()
    env.close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(UsageError, match=r"Meta-World is missing; pip install 'mesocosm\[robotics"):
        make_env(RealityConfig(env=META_WORLD))


def test_wrong_arguments_are_refused() -> None:
    pytest.importorskip("metaworld")
    with pytest.raises(UsageError, match=r"reality.kwargs.task must be .*'drawer'"):
        make_env(RealityConfig(env=META_WORLD, kwargs={"task": "drawer"}))
    with pytest.raises(UsageError, match=r"reality.kwargs.repeat must be >= 1, got 0"):
        make_env(RealityConfig(env=META_WORLD, kwargs={"repeat": 0}))
