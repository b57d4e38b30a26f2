"""The horizon of environments that truncate themselves and register no limit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from mesocosm.datasets.dataset import Environment, write_dataset
from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.datasets.horizon import horizon_of, logged_horizon
from mesocosm.errors import UsageError
from mesocosm.store.artifacts import Artifact, Storage


def store(root: str, name: str, *episodes: tuple[int, Outcome]) -> None:
    """Store a dataset of episodes of the given lengths and outcomes."""
    logged = []
    for k, (n, outcome) in enumerate(episodes):
        observations, rewards = [np.zeros(1)] * (n + 1), np.zeros(n)
        logged.append(Episode(k, k, "random", observations, [0] * n, rewards, outcome))
    facts: dict[str, Any] = {
        "environment": Environment(id="Own-v0"),
        "observation_space": gym.spaces.Box(-1.0, 1.0, (1,), np.float64),
        "action_space": gym.spaces.Discrete(2),
    }
    fill = partial(write_dataset, episodes=logged, id=name, seed=0, valid_fraction=0.2, **facts)
    Storage(root).make("datasets", name, {}, lambda folder: fill(folder) and None)


def world(*datasets: str) -> Artifact:
    return Artifact("worlds", "w0", Path(), "", {"inputs": {"datasets": list(datasets)}})


def test_one_common_length_of_the_truncated_episodes_is_the_horizon(root: str) -> None:
    store(root, "own", *[(60, "truncated")] * 9, (5, "terminated"), (80, "unfinished"))
    horizon = logged_horizon(Storage(root), ["own"])
    assert horizon is not None and horizon.steps == 60 and horizon.inferred
    assert horizon.source == "all 9 truncated episodes of the data have this length"


def test_of_several_lengths_the_longest_is_the_horizon(root: str) -> None:
    store(root, "a", (60, "truncated"), (40, "truncated"))
    store(root, "b", (70, "truncated"), (90, "terminated"))
    horizon = logged_horizon(Storage(root), ["a", "b", "deleted"])
    assert horizon is not None and horizon.steps == 70 and "longest of 3" in horizon.source


def test_a_given_limit_wins_over_the_logs(root: str) -> None:
    store(root, "own", (60, "truncated"))
    assert horizon_of(Storage(root), world("own"), 100, "horizon").steps == 100
    assert horizon_of(Storage(root), world("own"), None, "horizon").steps == 60


@pytest.mark.parametrize("datasets", [["ends"], ["deleted"], []])
def test_without_a_truncated_episode_the_horizon_must_be_set(
    datasets: list[str], root: str
) -> None:
    store(root, "ends", (5, "terminated"), (80, "unfinished"))
    with pytest.raises(UsageError, match=r"reality\.horizon must be set for worlds/w0"):
        horizon_of(Storage(root), world(*datasets), None, "reality.horizon")
