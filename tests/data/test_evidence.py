"""Evidence of logs: how freely actions vary, and which rewards occur."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.data.analysis.evidence import FEWEST, Evidence, evidence
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (2,), np.float64)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float64)
CHOICE = spaces.Discrete(3)
WORDS = spaces.Text(4, charset="ab")
Policy = Callable[[Any, np.random.Generator], Any]
Logs = Callable[..., Evidence]


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    """`logs(space, policy, episodes=30, length=20, rewards=None)`: the evidence of a walk."""

    def result(
        space: Any, policy: Policy, episodes: int = 30, length: int = 20, rewards: Any = None
    ) -> Evidence:
        rng, done = np.random.default_rng(0), []
        for k in range(episodes):
            walk = list(rng.normal(size=(length + 1, 2)).cumsum(0))
            actions = [policy(observation, rng) for observation in walk[:-1]]
            earned = np.zeros(length) if rewards is None else np.array(rewards(k), np.float64)
            done.append(Episode(k, k, "logger", walk, actions, earned, "truncated"))
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        facts: dict[str, Any] = {"environment": Environment(id="walk"), "action_space": space}
        write_dataset(
            folder, done, id="d", seed=0, observation_space=OBSERVATIONS, valid_fraction=0, **facts
        )
        return evidence(Dataset([folder]))

    return result


def steady(o: Any, rng: np.random.Generator) -> Any:
    return np.tanh(0.2 * o)


def noisy(o: Any, rng: np.random.Generator) -> Any:
    return np.clip(steady(o, rng) + 0.5 * rng.normal(size=2), -1, 1)


def uniform(o: Any, rng: np.random.Generator) -> Any:
    return rng.uniform(-1, 1, 2)


def half(o: Any, rng: np.random.Generator) -> Any:
    return np.array([steady(o, rng)[0], rng.uniform(-1, 1)])


def constant(o: Any, rng: np.random.Generator) -> Any:
    return np.array([0.5, rng.uniform(-1, 1)])


@pytest.mark.parametrize(
    ("policy", "fixed"),
    [
        (steady, ["action[0]", "action[1]"]),
        (noisy, []),
        (uniform, []),
        (half, ["action[0]"]),
        (constant, ["action[0]"]),
    ],
)
def test_numbers_that_follow_from_the_observation(
    logs: Logs, policy: Policy, fixed: list[str]
) -> None:
    shown = logs(BOX, policy)
    assert shown.known and shown.fixed == fixed, shown.free
    text = shown.unidentified()
    assert (text is None) == (not fixed)
    if text is not None:
        assert all(name in text for name in fixed) and "ignores" in text
    if policy is uniform:
        assert all(share > 0.8 for share in shown.free.values())


def test_categories_and_texts(logs: Logs) -> None:
    switch = logs(CHOICE, lambda o, rng: np.int64(o[0] > 0))
    assert switch.fixed == ["action"], switch.free
    often = logs(
        CHOICE, lambda o, rng: np.int64(rng.integers(3) if rng.random() < 0.3 else o[0] > 0)
    )
    assert not often.fixed and 0.2 < often.free["action"] < 0.8
    assert logs(WORDS, lambda o, rng: "ab" if o[0] > 0 else "b").fixed == ["action"]
    assert not logs(WORDS, lambda o, rng: str(rng.choice(["ab", "b", "aab"]))).fixed


def test_an_action_that_is_held_is_not_one_that_follows(logs: Logs) -> None:
    """Neighbours in time have the same action, so they are no witnesses."""
    last: list[Any] = [None, 0]

    def held(o: Any, rng: np.random.Generator) -> Any:
        if last[1] % 5 == 0:
            last[0] = uniform(o, rng)
        last[1] += 1
        return last[0]

    shown = logs(BOX, held)
    assert not shown.fixed and all(share > 0.5 for share in shown.free.values())


def test_few_transitions_say_nothing(logs: Logs) -> None:
    shown = logs(BOX, steady, episodes=3, length=FEWEST // 3 - 1)
    assert not shown.known and shown.unidentified() is None
    one = logs(BOX, steady, episodes=1, length=300)
    assert one.fixed == ["action[0]", "action[1]"], "a single episode is compared with itself"


def test_rewards_are_explained_by_the_best_steps_of_the_logs(logs: Logs) -> None:
    goal = logs(BOX, uniform, length=20, rewards=lambda k: [0.0] * 19 + [float(k % 2)])
    assert (goal.best_return, goal.low_rate, goal.high_rate) == (1.0, 0.0, 0.1)
    for steps in (15.0, 9.0, 4.0, 1.0):
        assert goal.unexplained(1.0, steps) is None, "the goal, sooner"
    assert goal.unexplained(2.0, 4.0) is not None, "more than the goal"
    text = goal.unexplained(15.0, 15.0)
    assert text is not None and "1 a step" in text and "0.1" in text
    alive = logs(BOX, uniform, length=6, rewards=lambda k: [1.0] * 5 + [0.0])
    assert alive.high_rate == 1.0 and alive.unexplained(500.0, 500.0) is None, (
        "the end's step is apart"
    )
    assert alive.unexplained(700.0, 500.0) is not None
    costs = logs(BOX, uniform, length=20, rewards=lambda k: [-1.0] * 20)
    assert costs.unexplained(-5.0, 5.0) is None, "a cost that is paid for fewer steps"


def test_more_than_any_logged_episode_is_unexplained_where_actions_are_not_free(logs: Logs) -> None:
    rewards: Any = lambda k: [1.0] * 20  # noqa: E731
    fixed, free = logs(BOX, steady, rewards=rewards), logs(BOX, uniform, rewards=rewards)
    assert free.unexplained(100.0, 100.0) is None
    text = fixed.unexplained(100.0, 100.0)
    assert text is not None and "best logged episode 20" in text
    assert fixed.unexplained(20.0, 20.0) is None
