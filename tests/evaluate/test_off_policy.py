"""Errors away from the data: a world that is wrong far out, and knows it or does not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment
from mesocosm.datasets.episode import Episode
from mesocosm.evaluate.metrics.off_policy import Clone, off_policy, one_step_errors

from .worlds import KnownWorld, Walk, collect, dataset, episodes_of


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
        apart = torch.from_numpy(wrong).float()
        if not self.knows:
            apart = torch.rand(len(raw), generator=self.generator)
        observation = replace(out.observation, numbers=numbers)
        return state, replace(out, observation=observation, disagreement=apart)


class Down:
    def act_one(self, observation: Any, explore: bool, rng: Any) -> Any:
        return np.array([-0.2, -0.9])


class Uniform:
    def act_one(self, observation: Any, explore: bool, rng: Any) -> Any:
        return rng.uniform(-1, 1, 2)


@pytest.mark.integration
@pytest.mark.parametrize("knows", [True, False])
def test_where_it_is_wrong_and_whether_it_knows(walks: Dataset, knows: bool) -> None:
    world = WrongFarOut(Codec.fit(walks), knows)
    down, random = (episodes_of(Walk(), policy, 12, seed=9) for policy in (Down(), Uniform()))
    played = [("down", down), ("random", random)]
    result = off_policy(world, walks, played, horizons=(1, 5), starts=32, samples=2)
    near, far = result.behaviours
    assert (near.name, far.name) == ("random", "down"), "by their distance from the logs"
    assert near.divergence < far.divergence
    assert near.divergence == pytest.approx(result.logs, abs=0.3)
    assert far.large > 0.5 > near.large and far.error > near.error
    assert (result.auroc > 0.95) if knows else (0.35 < result.auroc < 0.65)
    assert result.auroc_interval[0] <= result.auroc <= result.auroc_interval[1]
    one = {row.horizon: row for row in far.fidelity.open_loop.rows}
    assert one["1"].ratio > 0.1 and far.transitions == sum(map(len, down))
    json.dumps(asdict(result), allow_nan=False)


def test_one_step_errors_of_an_exact_world_are_none(walks: Dataset, tmp_path: Path) -> None:
    result = one_step_errors(KnownWorld(Codec.fit(walks)), walks, "valid")  # type: ignore[arg-type]
    assert result.error.max() < 1e-5 and len(result.error) == walks.count("valid")
    assert result.group.max() + 1 == len(walks.episodes("valid"))


class Diverging(KnownWorld):
    def step(self, carry: Any, action: Any, keys: Any) -> Any:
        state, out = super().step(carry, action, keys)
        return state, replace(out, diverged=torch.ones(len(keys), dtype=torch.bool))


def test_steps_that_diverge_are_the_largest_errors_and_no_sure_ones(walks: Dataset) -> None:
    result = one_step_errors(Diverging(Codec.fit(walks)), walks, "valid")  # type: ignore[arg-type]
    assert result.diverged == len(result.error)
    assert (result.error > 1e300).all() and (result.disagreement > 1e300).all()


@pytest.mark.integration
def test_a_clone_of_random_discrete_actions_knows_their_chance(tmp_path: Path) -> None:
    """On observations without numbers, too."""
    rng, episodes = np.random.default_rng(0), []
    for k in range(60):
        observations, actions = [*rng.integers(0, 4, 21)], [*rng.integers(0, 3, 20)]
        episodes.append(Episode(k, k, "random", observations, actions, np.ones(20), "truncated"))
    spaces = (gym.spaces.Discrete(4), gym.spaces.Discrete(3))
    data = dataset(tmp_path / "d", episodes, Environment(id="x"), spaces, valid_fraction=0.2)
    codec = Codec.fit(data)
    divergence = Clone.fit(data, codec, 0).divergence(data, codec, "valid")
    assert divergence == pytest.approx(np.log(3), abs=0.05)
