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

from mesocosm.errors import UsageError
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.metrics.ranking import LEAST, PER_FIFTH, ranking
from mesocosm.policies.policy import RandomPolicy
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
