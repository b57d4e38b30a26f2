"""Graded policies fill the range whatever the task's answer to noise; noise acts as it does in
collection; agents of the data are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of, make_env
from mesocosm.errors import UsageError
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.judge import judge
from mesocosm.evaluate.metrics.ranking import LEAST, PER_FIFTH, ranking
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.policy import SNAPSHOTS, RandomPolicy
from mesocosm.store.artifacts import Artifact, Storage


@pytest.mark.parametrize(
    "answer",
    [
        lambda n: 1000 * (1 - n / 2),
        lambda n: 1000 / (1 + (n / 0.3) ** 8),  # a cliff
        lambda n: 100 * np.exp(-8 * n),
        lambda n: -5 - 60 * np.tanh(20 * n),
    ],
)
def test_every_fifth_of_the_range_is_filled(answer: Callable[[float], float]) -> None:
    noises: dict[float, float] = {}
    most = policy_set.MOST_NOISE
    while (level := policy_set.next_noise(noises, list(noises.values()), most)) is not None:
        assert level not in noises
        noises[level] = float(answer(level))
    assert LEAST <= len(noises) <= 22, "and no more are bought than are needed"
    fifths = ranking(list(noises.values()), list(noises.values())).fifths
    assert min(fifths) >= PER_FIFTH, fifths


def test_a_task_that_noise_does_not_touch_is_given_up() -> None:
    assert policy_set.next_noise({0.0: 7.0, 2.0: 7.0}, [7.0, 7.0], 2.0) is None


class Still:
    """Always the same action."""

    def __init__(self, action: Any):
        self.action = action

    def act(self, observations: Any, explore: bool = False, rng: Any = None) -> Any:
        return np.stack([self.action] * len(observations))

    def act_one(self, observation: Any, explore: bool = False, rng: Any = None) -> Any:
        return self.action


def test_noise_is_what_a_behaviour_calls_noise() -> None:
    box, rng = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 10])), np.random.default_rng(0)
    noisy = policy_set.Noisy(Still(np.float32([0.0, 5.0])), box, 0.1)
    drawn = noisy.act(np.zeros((4000, 1)), rng=rng)
    assert drawn.shape == (4000, 2) and drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.std(0), [0.2, 0.5], rtol=0.05)
    one = noisy.act_one(np.zeros(1), rng=rng)
    assert box.contains(one) and not np.array_equal(one, [0.0, 5.0])
    discrete = policy_set.Noisy(Still(np.int64(3)), gym.spaces.Discrete(5), 0.4)
    drawn = discrete.act(np.zeros((1000, 1)), rng=rng)
    assert 0.25 < (drawn != 3).mean() < 0.4, "four of five random actions are others"
    assert discrete.action_space.contains(discrete.act_one(np.zeros(1), rng=rng))
    assert isinstance(RandomPolicy(box).act_one(None, rng=rng), np.ndarray)


CHORES = "mesocosm.envs.text.chores_policies:ChoresExpert"
EASY = RealityConfig(env="mesocosm.envs.text:ChoresEasy-v0", success="info.success")


def chores_policy(root: str, kind: str = "scripted", noise: float = 0.1) -> policy_set.Scripted:
    config = BehaviourConfig(kind, function=CHORES, noise=noise)
    named = policy_set.named(config, Storage(root), *facts_of(EASY).spaces)
    assert isinstance(named.policy, policy_set.Scripted)
    return named.policy


def side_by_side(policy: policy_set.Scripted, rows: int) -> tuple[Any, list[list[str]]]:
    """(returns, commands) of one episode of each of `rows` environments that step together."""
    env = gym.vector.SyncVectorEnv([lambda: make_env(EASY)] * rows)
    policy.reset(rows, 0)
    texts, _ = env.reset(seed=0)
    rng, over, returns = np.random.default_rng(0), np.zeros(rows, np.bool_), np.zeros(rows)
    commands: list[list[str]] = [[] for _ in range(rows)]
    while not over.all():
        actions = policy.act(texts, rng=rng)
        texts, rewards, terminated, truncated, _ = env.step(actions)
        for row in np.flatnonzero(~over):
            commands[row].append(actions[row])
        returns += np.where(over, 0.0, rewards)
        over |= terminated | truncated
    return returns, commands


def test_an_expert_with_memory_acts_in_each_environment_alone(root: str) -> None:
    returns, _ = side_by_side(chores_policy(root), 6)
    np.testing.assert_allclose(returns, 1.0)


def test_an_experts_noise_is_drawn_from_the_candidates(root: str) -> None:
    noisy = chores_policy(root, "noisy", noise=1.0)
    returns, commands = side_by_side(noisy, 6)
    verbs = {command.split()[0] for episode in commands for command in episode}
    assert verbs <= {"go", "open", "close", "take", "put", "look", "clean", "cool", "heat"}, verbs
    assert returns.mean() < 0.9 and commands[0] != commands[1]
    again = side_by_side(noisy, 6)
    np.testing.assert_array_equal(again[0], returns)
    assert again[1] == commands, "a reset forgets everything"


def test_an_expert_is_judged_alike_after_other_episodes(root: str) -> None:
    expert, noisy = chores_policy(root), chores_policy(root, "noisy", noise=0.3)
    for policy in (expert, noisy):
        results = [
            judge(policy, EASY, Ledger(Storage(root), name), episodes=4, seed=0) for name in "ab"
        ]
        assert results[0].returns == results[1].returns
    assert judge(expert, EASY, Ledger(Storage(root), "k"), episodes=8, seed=1).successes == 8


def test_an_imagined_text_out_of_all_bounds_still_gets_a_command(root: str) -> None:
    text = (
        "You are in the middle of a kitchen. Around you are a table, a sink. You carry a"
        " 77 " + "very " * 20 + "mug. Your task is to put the mug on the sink. You are at the sink."
    )
    policies = [chores_policy(root), chores_policy(root, "noisy", noise=1.0)]
    for policy in policies:
        policy.reset(8)
        commands = policy.act((text,) * 8, rng=np.random.default_rng(0))
        assert all(policy.action_space.contains(command) for command in commands)


def test_an_agent_that_collected_the_worlds_data_is_no_test_of_it(root: str) -> None:
    storage = Storage(root)
    collector: dict[str, Any] = {"inputs": {"agents": ["ab12"]}}
    former = {**collector, "metrics": {"kept_former": 1.0}}
    for name, meta in (("ab12", {"inputs": {}}), ("cd34", collector), ("ef56", former)):
        storage.make("agents", name, meta, lambda folder: (folder / "x").write_text("x") and None)
    data = Artifact(kind="datasets", id="d1", path=Path("."), uri="", meta=collector)
    policy_set.held_out(["agents/cd34", "agents/cd34@5"], storage, [data])
    # A snapshot 0 is the agent that training began with.
    for same in ("agents/ab12@5", "agents/ef56", "agents/cd34@0"):
        message = r"agents/ab12 collected datasets/d1.*judge another agent"
        with pytest.raises(UsageError, match=message):
            policy_set.held_out([same], storage, [data])


@pytest.mark.parametrize(("config", "first"), [({}, "agent@5"), ({"rival": True}, "agent@0")])
def test_snapshot_0_of_an_agent_that_went_on_is_the_earlier_agent(
    config: dict[str, Any], first: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is judged only where the earlier agent was a rival and training began anew."""

    def write(folder: Path) -> None:
        for iteration in ("0", "5"):
            (folder / SNAPSHOTS / iteration).mkdir(parents=True)

    storage = Storage(root)
    meta = {"inputs": {"agents": ["ab12"]}, "config": {"iterations": 10, **config}}
    storage.make("agents", "cd34", meta, write)
    monkeypatch.setattr(policy_set, "policy_of", lambda *_: None)
    names = [p.name for p in policy_set.snapshots(storage.artifact("agents", "cd34"), storage)]
    assert names[0] == first and names[-2:] == ["agent@5", "agent"]
