"""Errors away from the data: a world that is wrong far out, and knows it or does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.episode import run_episode
from mesocosm.evaluate.metrics.off_policy import Clone, off_policy, one_step_errors

from .worlds import KnownWorld, Walk, collect


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return collect(tmp_path_factory.mktemp("data") / "walks", 60)


class WrongFarOut(KnownWorld):
    """Off by as much as the second coordinate is below -3; its disagreement is that, or noise."""

    def __init__(self, codec: Codec, knows: bool):
        super().__init__(codec)
        self.knows = knows

    def step(self, carry: Any, action: Any, keys: Any) -> Any:
        state, out = super().step(carry, action, keys)
        raw = self.fitted.decode_observation(carry.observation)
        wrong = np.maximum(0.0, -3.0 - raw[:, 1])
        numbers = out.observation.numbers.clone()
        numbers[:, 0] += torch.from_numpy(wrong).float()
        apart = (
            torch.from_numpy(wrong).float()
            if self.knows
            else torch.rand(len(raw), generator=self.generator)
        )
        return state, replace(
            out, observation=replace(out.observation, numbers=numbers), disagreement=apart
        )


def played(act: Callable[[Any, Any], Any], episodes: int = 12) -> list[Episode]:
    env = Walk()
    return [
        run_episode(
            env, act, k=k, seed=9, behaviour="b", max_steps=None, config=RealityConfig(env="walk")
        )
        for k in range(episodes)
    ]


def down(observation: Any, rng: np.random.Generator) -> Any:
    return np.array([-0.2, -0.9])


def random(observation: Any, rng: np.random.Generator) -> Any:
    return rng.uniform(-1, 1, 2)


@pytest.mark.parametrize("knows", [True, False])
def test_where_it_is_wrong_and_whether_it_knows(walks: Dataset, knows: bool) -> None:
    world = WrongFarOut(Codec.fit(walks), knows)
    result = off_policy(
        world,
        walks,
        [("down", played(down)), ("random", played(random))],
        horizons=(1, 5),
        starts=32,
        samples=2,
    )
    assert [row.name for row in result.behaviours] == ["random", "down"], (
        "by their distance from the logs"
    )
    near, far = result.behaviours
    assert near.divergence < far.divergence and near.divergence == pytest.approx(
        result.logs, abs=0.3
    )
    assert far.large > 0.5 > near.large and far.error > near.error
    assert (result.auroc > 0.95) if knows else (0.35 < result.auroc < 0.65)
    assert result.auroc_interval[0] <= result.auroc <= result.auroc_interval[1]
    one = {row.horizon: row for row in far.fidelity.open_loop.rows}
    assert one["1"].ratio > 0.1 and far.transitions == sum(len(e) for e in played(down))
    json.dumps(asdict(result), allow_nan=False)


def test_one_step_errors_of_an_exact_world_are_none(walks: Dataset, tmp_path: Path) -> None:
    result = one_step_errors(KnownWorld(Codec.fit(walks)), walks, "valid")  # type: ignore[arg-type]
    assert (
        result.error.max() < 1e-5
        and len(result.error) == walks.count("valid")
        and result.group.max() + 1 == len(walks.episodes("valid"))
    )


class Diverging(KnownWorld):
    def step(self, carry: Any, action: Any, keys: Any) -> Any:
        state, out = super().step(carry, action, keys)
        return state, replace(out, diverged=torch.ones(len(keys), dtype=torch.bool))


def test_steps_that_diverge_are_the_largest_errors_and_no_sure_ones(walks: Dataset) -> None:
    result = one_step_errors(Diverging(Codec.fit(walks)), walks, "valid")  # type: ignore[arg-type]
    assert (
        result.diverged == len(result.error)
        and (result.error > 1e300).all()
        and (result.disagreement > 1e300).all()
    )


def test_a_clone_of_random_discrete_actions_knows_their_chance(tmp_path: Path) -> None:
    """On observations without numbers, too."""
    observations, actions, rng = (
        gym.spaces.Discrete(4),
        gym.spaces.Discrete(3),
        np.random.default_rng(0),
    )
    episodes = [
        Episode(
            k,
            k,
            "random",
            [np.int64(v) for v in rng.integers(0, 4, 21)],
            [np.int64(v) for v in rng.integers(0, 3, 20)],
            np.ones(20),
            "truncated",
        )
        for k in range(60)
    ]
    facts: dict[str, Any] = {
        "environment": Environment(id="x"),
        "observation_space": observations,
        "action_space": actions,
    }
    write_dataset(tmp_path / "d", episodes, id="d", seed=0, valid_fraction=0.2, **facts)
    data = Dataset([tmp_path / "d"])
    codec = Codec.fit(data)
    assert Clone.fit(data, codec, 0).divergence(data, codec, "valid") == pytest.approx(
        np.log(3), abs=0.05
    )
