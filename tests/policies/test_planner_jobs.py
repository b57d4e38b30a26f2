"""Planners that collect and that are judged."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import StorageConfig
from mesocosm.data.collecting.config import CollectConfig, check
from mesocosm.data.planners import load_planner, planner_policy
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.judge import judge, policy_identity
from mesocosm.jobs import collect
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.runs import tracking
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage

from .stored import AGENT, OLD, WORLD, store

PLANNER = BehaviourConfig("planner", policy=f"agents/{AGENT}")
CARTPOLE = RealityConfig(env="CartPole-v1")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path))
    store(storage)
    return storage


@pytest.mark.integration
def test_a_planner_collects(storage: Storage) -> None:
    config = CollectConfig(
        storage=StorageConfig(storage.root),
        reality=CARTPOLE,
        steps=25,
        lanes=1,
        workers=0,
        behaviours=[BehaviourConfig("planner", policy="agents/feed")],
    )
    with tracking.start("collect", config, quiet=True) as run:
        artifact = collect.JOB.run(config, run)
    assert artifact.meta["inputs"]["agents"] == [AGENT]
    assert artifact.meta["counts"]["behaviours"].keys() == {f"planner agents/{AGENT}"}
    assert Dataset([artifact.path]).transitions == 25


@pytest.mark.integration
def test_a_planner_is_judged_alike_alone_and_after_another_episode(storage: Storage) -> None:
    spaces = WorldVectorEnv(1, storage.artifact("worlds", WORLD).path, backend="local")
    named = policy_set.named(
        PLANNER, storage, spaces.single_observation_space, spaces.single_action_space
    )
    assert isinstance(named.policy, PlannerPolicy) and named.name == f"planner agents/{AGENT}"
    results = [
        judge(named.policy, CARTPOLE, Ledger(storage, name), episodes=2, seed=0)
        for name in ("one", "two")
    ]
    assert results[0].returns == results[1].returns
    assert named.policy.actions == sum(result.steps for result in results)
    assert named.policy.ms_per_action > 0
    kind, network, _ = policy_identity(named.policy)
    assert (kind, network) == ("planner", "network")


@pytest.mark.integration
def test_a_planner_is_imagined_alike_again(storage: Storage) -> None:
    planned = PlannerPolicy(load_planner(storage, AGENT))

    def returns() -> np.ndarray:
        env = WorldVectorEnv(6, planned.planner.world, horizon=8)  # type: ignore[attr-defined]
        return imagined_episodes([planned, planned], env, 3)[0]

    np.testing.assert_array_equal(returns(), returns())


def test_what_cannot_plan_is_refused(storage: Storage) -> None:
    with pytest.raises(UsageError, match=r"behaviours\[0\].*needs one of behaviours\[0\].policy"):
        check(CollectConfig(reality=CARTPOLE, behaviours=[BehaviourConfig("planner")]))
    env = gymnasium.make("CartPole-v1")
    spaces = env.observation_space, env.action_space
    with pytest.raises(ArtifactError, match=r"value\.json.*train the agent again, with --force"):
        planner_policy(storage, f"agents/{OLD}", *spaces)
    with pytest.raises(UsageError, match="plans in a world with the action space Discrete"):
        planner_policy(storage, AGENT, spaces[0], Discrete(3))
    with pytest.raises(UsageError, match="plans in a world with the observation space Box"):
        planner_policy(storage, AGENT, Box(0, 1, (4,)), spaces[1])
    storage.make("agents", "cafe0123cafe0123", {}, lambda folder: None)
    with pytest.raises(UsageError, match=r"agents/cafe.* names no world in which to plan"):
        load_planner(storage, "agents/cafe")
