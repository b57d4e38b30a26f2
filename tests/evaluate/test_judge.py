"""Judging: whole episodes, metered exactly, the same for the same seed, and refused before a step
where spaces differ.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from mesocosm.envs.config import DrawnOption, RealityConfig
from mesocosm.envs.episode import episode_seed
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import make_env
from mesocosm.errors import BudgetSpent, MesocosmError, UsageError
from mesocosm.evaluate.judge import JudgeResult, JudgeStore, judge
from mesocosm.evaluate.policy_set import Noisy
from mesocosm.policies.policy import Layout, Policy, RandomPolicy
from mesocosm.store.artifacts import Storage

from . import judged_envs
from .judged_envs import Balance

CARTPOLE = RealityConfig(env="CartPole-v1", success="return >= 100")


@pytest.fixture(autouse=True)
def module() -> None:
    """Gives the environments a module name, and counts their episodes anew."""
    sys.modules["judged_module"] = judged_envs
    judged_envs.Faulty.episodes = judged_envs.Outside.episodes = 0


def ledger(root: str, **kwargs: Any) -> Ledger:
    return Ledger(Storage(root), "test", **kwargs)


def confirmed(book: Ledger) -> int:
    totals = book.totals().purposes["judge"]
    return totals.steps - totals.unconfirmed_steps


def faulty(fault: str, every: int = 2) -> RealityConfig:
    kwargs = {"fault": fault, "every": every}
    return RealityConfig(env="judged_module:Faulty", kwargs=kwargs, step_timeout_s=0.2)


def random_policy(reality: RealityConfig) -> RandomPolicy:
    return RandomPolicy(make_env(reality).action_space)


@pytest.mark.integration
def test_every_step_is_metered_and_the_same_seed_gives_the_same_episodes(root: str) -> None:
    book = ledger(root)
    result = judge(Balance(), CARTPOLE, book, episodes=6, seed=3)
    totals = book.totals().purposes
    assert totals["judge"].steps == sum(map(len, result.episodes)) == result.steps
    assert totals["judge"].resets == 6 and totals["judge"].unconfirmed_steps == 0
    assert totals["collect"].steps == totals["select"].steps == 0
    low, high = result.interval or (0, 0)
    assert low <= result.mean <= high
    assert result.successes == sum(r >= 100 for r in result.returns)

    again = judge(Balance(), CARTPOLE, ledger(root), episodes=6, seed=3)
    assert again.returns == result.returns
    assert np.array_equal(again.episodes[2].observations, result.episodes[2].observations)
    assert book.totals().purposes["judge"].steps == 2 * result.steps

    selected = judge(Balance(), CARTPOLE, ledger(root), episodes=6, seed=3, purpose="select")
    assert book.totals().purposes["select"].steps == selected.steps
    judge_seeds, select_seeds = ({e.seed for e in r.episodes} for r in (result, selected))
    collect_seeds = {episode_seed(3, k) for k in range(100)}
    assert judge_seeds.isdisjoint(select_seeds) and collect_seeds.isdisjoint(judge_seeds)
    assert collect_seeds.isdisjoint(select_seeds), "judge, select and collect draw apart"


def test_the_budget_binds_selection_and_a_bound_binds_judging(root: str) -> None:
    reality = RealityConfig(env="CartPole-v1")
    reality.budget.steps = 50
    book = ledger(root, budget=reality.budget)
    with pytest.raises(BudgetSpent):
        judge(Balance(), reality, book, episodes=20, seed=0, purpose="select")
    spent = ledger(root).totals().purposes["select"].steps
    assert spent == 50, "the budget is used to its last step and never exceeded"
    book = ledger(root, budget=reality.budget)
    assert judge(Balance(), reality, book, episodes=2, seed=0).steps > 0, "not a collection"
    with pytest.raises(BudgetSpent):
        judge(Balance(), reality, ledger(root, bounds={"judge": 10}), episodes=2, seed=0)


def test_a_policy_of_other_spaces_costs_no_real_step(root: str) -> None:
    policy, reality = RandomPolicy(gym.spaces.Discrete(2)), RealityConfig(env="InvertedPendulum-v5")
    with pytest.raises(UsageError, match=r"action_space .*InvertedPendulum-v5") as caught:
        judge(policy, reality, ledger(root), episodes=1, seed=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="observation_space"):
        judge(Balance(), RealityConfig(env="Acrobot-v1"), ledger(root), episodes=1, seed=0)
    assert ledger(root).totals().steps == 0


@pytest.mark.parametrize("fault", ["crash", "hang", "nan"])
def test_a_failing_episode_is_dropped_and_counted(root: str, fault: str) -> None:
    reality = faulty(fault)
    result = judge(random_policy(reality), reality, ledger(root), episodes=4, seed=0)
    assert len(result.returns) == 2 and len(result.dropped) == 2
    assert ledger(root).totals().purposes["judge"].steps == result.steps == 5 + 3 + 5 + 3
    assert result.interval == (5.0, 5.0)
    reality = faulty(fault, every=1)
    with pytest.raises(MesocosmError, match="all 2 judged episodes were dropped"):
        judge(random_policy(reality), reality, ledger(root), episodes=2, seed=0)


def test_an_environment_without_a_limit_is_cut(root: str) -> None:
    reality = faulty("", every=10**9)
    options = {"episodes": 1, "seed": 0, "max_episode_steps": 4}
    result = judge(random_policy(reality), reality, ledger(root), **options)
    (episode,) = result.episodes
    assert len(episode) == 4 and episode.outcome == "unfinished"


class Interrupted:
    """A random policy. Calls `at_once` the one time that it is asked for its `number`-th action."""

    def __init__(self, space: gym.Space[Any], number: int, at_once: Callable[[], None]):
        self.policy, self.left, self.at_once = RandomPolicy(space), number, at_once

    def act(self, observations: Any, explore: bool = False, rng: Any = None) -> Any: ...

    def act_one(self, observation: Any, explore: bool = False, rng: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            self.at_once()
        return self.policy.act_one(observation, explore, rng)


def fail() -> None:
    raise ValueError("the cable is loose")


def varied(name: str = "Varied") -> RealityConfig:
    slope, colour = DrawnOption(low=-1.0, high=1.0), DrawnOption(choices=["red", "blue"])
    options = {"slope": slope, "colour": colour}
    return RealityConfig(
        env=f"judged_module:{name}", task=[*options], task_options=options, success="return >= 6"
    )


def plain(value: Any) -> Any:
    """A value with the types and dtypes of all its parts, for comparison."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(plain, value)]
    if isinstance(value, np.ndarray | np.generic):
        return [type(value).__name__, str(value.dtype), value.tolist()]
    return [type(value).__name__, value]


def assert_same(one: JudgeResult, other: JudgeResult) -> None:
    assert plain(asdict(one)) == plain(asdict(other))


@pytest.fixture(params=["local", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.mark.integration
def test_interrupted_judging_continues_after_the_stored_episodes(any_root: str) -> None:
    reality, storage = varied(), Storage(any_root)
    space = make_env(reality).action_space
    undisturbed = judge(RandomPolicy(space), reality, ledger(any_root), episodes=5, seed=1)
    assert undisturbed.steps == 30 and undisturbed.episodes[0].durations is not None
    policy, store = Interrupted(space, 3 * 6 + 4, fail), JudgeStore(storage, "broken")
    segments = store.segments("random", policy, seed=1, limit=6)
    book = Ledger(storage, "broken", bounds={"judge": 100})

    def continued() -> JudgeResult:
        return judge(policy, reality, book, episodes=5, seed=1, segments=segments)

    with pytest.raises(MesocosmError, match="the cable is loose"):
        continued()
    assert confirmed(book) == 3 * 6 and store.confirm(book) == 3
    assert_same(continued(), undisturbed)
    assert confirmed(book) == 30
    unconfirmed = book.totals().purposes["judge"].unconfirmed_steps
    assert unconfirmed == 3, "the steps of the interrupted episode"
    assert policy.left == 22 - 30 - 4, "no other step is paid twice"
    assert_same(continued(), undisturbed)
    assert book.totals().purposes["judge"].steps == 33, "stored episodes take no step"
    assert store.confirm(book) == 5
    store.remove()
    assert storage.list("runs/episodes") == []


KILLED = """
import os, signal
import gymnasium

class Killing(gymnasium.Wrapper):
    count = 0

    def step(self, action):
        Killing.count += 1
        with open("steps", "a") as file:
            file.write(".")
        if Killing.count == int(os.environ.get("KILL_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.env.step(action)

def make():
    return Killing(gymnasium.make("CartPole-v1"))

def main():
    from mesocosm.policies.policy import RandomPolicy
    from mesocosm.evaluate.judge import JudgeStore, judge
    from mesocosm.envs.config import RealityConfig
    from mesocosm.envs.ledger import Ledger
    from mesocosm.store.artifacts import Storage

    storage, reality = Storage("root"), RealityConfig(env="killed_module:make")
    policy = RandomPolicy(make().action_space)
    segments = JudgeStore(storage, "killed").segments("random", policy, seed=0, limit=500)
    return judge(policy, reality, Ledger(storage, "killed"), episodes=8, seed=0, segments=segments)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_a_killed_process_pays_again_for_one_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killed_module.py").write_text(KILLED)
    book = ledger(str(tmp_path / "other"))
    whole = judge(random_policy(CARTPOLE), CARTPOLE, book, episodes=8, seed=0)
    before = sum(map(len, whole.episodes[:5]))
    command = [sys.executable, "killed_module.py"]
    env = os.environ | {"KILL_AT": str(before + 4)}
    killed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    book = Ledger(Storage(str(tmp_path / "root")), "killed")
    assert book.totals().purposes["judge"].unconfirmed_steps >= 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    again = importlib.import_module("killed_module").main()
    assert again.returns == whole.returns
    assert confirmed(book) == whole.steps
    assert (tmp_path / "steps").stat().st_size == whole.steps + 4
    assert book.totals().purposes["judge"].steps >= whole.steps + 4, "all real steps are counted"


def test_an_episode_that_another_process_has_stored_meanwhile_is_used(root: str) -> None:
    reality, options = varied(), {"seed": 1}
    policy = random_policy(reality)
    first, second = (
        JudgeStore(Storage(root), "two").segments("random", policy, seed=1, limit=6)
        for _ in range(2)
    )
    other: list[JudgeResult] = []

    def overtake() -> None:
        book = ledger(root)
        other.append(judge(policy, reality, book, episodes=3, segments=second, **options))

    slow = Interrupted(policy.action_space, 2, overtake)
    result = judge(slow, reality, ledger(root), episodes=4, segments=first, **options)
    assert result.returns[:3] == other[0].returns and len(result.returns) == 4
    assert confirmed(ledger(root)) == 4 * 6
    assert ledger(root).totals().purposes["judge"].unconfirmed_steps == 6


def test_stored_episodes_of_different_policies_do_not_mix(root: str) -> None:
    store = JudgeStore(Storage(root), "several")

    def key(name: str, policy: Any, seed: int = 0, limit: int = 9) -> str:
        return store.segments(name, policy, seed=seed, limit=limit).folder

    network = network_policy(0)
    noisy = [Noisy(network, network.action_space, noise) for noise in (0.5, 0.501)]
    same = key("agent", network)
    assert same == key("agent", network_policy(0)), "the weights count, not the object"
    policies = [network_policy(1), *noisy, RandomPolicy(network.action_space)]
    keys = [same, *(key("agent", policy) for policy in policies), key("agent@2", network)]
    keys += [key("agent", network, seed=1), key("agent", network, limit=8)]
    assert len(set(keys)) == len(keys)


def network_policy(seed: int) -> Policy:
    torch.manual_seed(seed)
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    layout = Layout("categorical", [{"kind": "linear", "in": 2, "out": 2}])
    return Policy("PPO", space, gym.spaces.Discrete(2), layout)


def test_dropped_episodes_are_stored_and_a_store_of_nothing_else_is_removed(root: str) -> None:
    reality = faulty("crash")
    store = JudgeStore(Storage(root), "faulty")
    policy = Interrupted(gym.spaces.Discrete(2), 5 + 3 + 5 + 1, fail)
    segments = store.segments("random", policy, seed=0, limit=5)
    with pytest.raises(MesocosmError, match="the cable is loose"):
        judge(policy, reality, ledger(root), episodes=4, seed=0, segments=segments)
    result = judge(policy, reality, ledger(root), episodes=4, seed=0, segments=segments)
    assert len(result.dropped) == 1 and len(result.episodes) == 3
    assert result.steps == 5 + 3 + 5 + 5
    broken = faulty("crash", every=1)
    segments = store.segments("broken", policy, seed=0, limit=5)
    with pytest.raises(MesocosmError, match="all 2 judged episodes were dropped"):
        judge(policy, broken, ledger(root), episodes=2, seed=0, segments=segments)
    assert Storage(root).list(segments.folder) == [], "they are judged again"


def test_an_episode_with_a_value_outside_its_space_is_dropped_from_the_store(root: str) -> None:
    reality = varied("Outside")
    policy = random_policy(reality)
    segments = JudgeStore(Storage(root), "outside").segments("random", policy, seed=0, limit=6)
    result = judge(policy, reality, ledger(root), episodes=3, seed=0, segments=segments)
    assert len(result.episodes) == 2 and "observation.mode" in result.dropped[0]
    totals = ledger(root).totals().purposes["judge"]
    assert totals.steps == result.steps == 18 and totals.unconfirmed_steps == 0
