"""Judging: whole episodes, metered exactly, the same for the same seed, and refused before a step where spaces differ."""

from __future__ import annotations

import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from mesocosm.agents.policy import random_policy
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError
from mesocosm.evaluation.judge import judge
from mesocosm.reality.config import RealityConfig
from mesocosm.reality.env import episode_seed, make_env
from mesocosm.reality.ledger import Ledger
from mesocosm.storage import Storage

CARTPOLE = RealityConfig(env="CartPole-v1", success="return >= 100")


class Balance:
    """A hand-made CartPole policy: push towards where the pole falls."""

    observation_space = gym.make("CartPole-v1").observation_space
    action_space = gym.spaces.Discrete(2)

    def act(self, observations: Any, explore: bool = False, rng: np.random.Generator | None = None) -> Any:
        return (observations @ np.array([0.0, 0.0, 1.0, 0.5]) > 0).astype(np.int64)

    def act_one(self, observation: Any, explore: bool = False, rng: np.random.Generator | None = None) -> Any:
        return self.act(np.asarray(observation)[None])[0]


class Faulty(gym.Env[Any, Any]):
    """Ends after five steps; every second episode crashes, hangs or gives NaN at its third."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    episodes = 0

    def __init__(self, fault: str, every: int = 2):
        self.fault, self.every = fault, every

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.t = 0
        type(self).episodes += 1
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        value = 0.0
        if self.t == 3 and type(self).episodes % self.every == 0:
            if self.fault == "crash":
                raise RuntimeError("the arm fell off")
            if self.fault == "hang":
                time.sleep(60)
            value = np.nan
        return np.array([value], np.float32), 1.0, self.t == 5, False, {}


def ledger(root: str, **kwargs: Any) -> Ledger:
    return Ledger(Storage(root), "test", **kwargs)


def test_every_step_is_metered_and_the_same_seed_gives_the_same_episodes(root: str) -> None:
    book = ledger(root)
    result = judge(Balance(), CARTPOLE, book, episodes=6, seed=3)
    totals = book.totals().purposes
    assert totals["judge"].steps == sum(result.lengths) == result.steps
    assert totals["judge"].resets == result.resets == 6 and totals["judge"].unconfirmed_steps == 0
    assert totals["collect"].steps == totals["select"].steps == 0
    low, high = result.interval or (0, 0)
    assert low <= result.mean <= high
    assert result.successes == sum(r >= 100 for r in result.returns)

    again = judge(Balance(), CARTPOLE, ledger(root), episodes=6, seed=3)
    assert again.returns == result.returns
    assert np.array_equal(np.stack(again.episodes[2].observations), np.stack(result.episodes[2].observations))
    assert book.totals().purposes["judge"].steps == 2 * result.steps

    selected = judge(Balance(), CARTPOLE, ledger(root), episodes=6, seed=3, purpose="select")
    assert book.totals().purposes["select"].steps == selected.steps
    seeds = [{e.seed for e in r.episodes} for r in (result, selected)] + [{episode_seed(3, k) for k in range(100)}]
    assert not (seeds[0] & seeds[1] | seeds[0] & seeds[2] | seeds[1] & seeds[2]), "judge, select and collect draw apart"


def test_the_budget_binds_selection_and_a_bound_binds_judging(root: str) -> None:
    reality = RealityConfig(env="CartPole-v1")
    reality.budget.steps = 50
    with pytest.raises(BudgetSpent):
        judge(Balance(), reality, ledger(root, budget=reality.budget), episodes=20, seed=0, purpose="select")
    assert ledger(root).totals().purposes["select"].steps == 50, "the budget is used to its last step and never exceeded"
    assert judge(Balance(), reality, ledger(root, budget=reality.budget), episodes=2, seed=0).steps > 0, "judging is not collection"
    with pytest.raises(BudgetSpent):
        judge(Balance(), reality, ledger(root, bounds={"judge": 10}), episodes=2, seed=0)


def test_a_policy_of_other_spaces_costs_no_real_step(root: str) -> None:
    with pytest.raises(UsageError, match=r"action_space .*InvertedPendulum-v5") as caught:
        judge(random_policy(gym.spaces.Discrete(2)), RealityConfig(env="InvertedPendulum-v5"), ledger(root), episodes=1, seed=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="observation_space"):
        judge(Balance(), RealityConfig(env="Acrobot-v1"), ledger(root), episodes=1, seed=0)
    assert ledger(root).totals().steps == 0


@pytest.mark.parametrize("fault", ["crash", "hang", "nan"])
def test_a_failing_episode_is_dropped_and_counted(root: str, fault: str) -> None:
    sys.modules["faulty_module"] = sys.modules[__name__]
    Faulty.episodes = 0
    reality = RealityConfig(env="faulty_module:Faulty", kwargs={"fault": fault}, step_timeout_s=0.2)
    result = judge(random_policy(make_env(reality).action_space), reality, ledger(root), episodes=4, seed=0)
    assert len(result.returns) == 2 and len(result.dropped) == 2
    assert ledger(root).totals().purposes["judge"].steps == result.steps == 5 + 3 + 5 + 3
    assert result.to_json()["note"], "equal returns are said to be so"
    assert result.interval == (5.0, 5.0)
    with pytest.raises(MesocosmError, match="all 2 judged episodes were dropped"):
        judge(
            random_policy(make_env(reality).action_space),
            RealityConfig(env=reality.env, kwargs={"fault": fault, "every": 1}, step_timeout_s=0.2),
            ledger(root),
            episodes=2,
            seed=0,
        )


def test_an_environment_without_a_limit_is_cut(root: str) -> None:
    sys.modules["faulty_module"] = sys.modules[__name__]
    reality = RealityConfig(env="faulty_module:Faulty", kwargs={"fault": "", "every": 10**9})
    result = judge(random_policy(gym.spaces.Discrete(2)), reality, ledger(root), episodes=1, seed=0, max_episode_steps=4)
    assert result.lengths == (4,) and result.to_json()["cut"] == 1
