"""Open-loop error against worlds whose error is known, and against a real one with and without its
base.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.evaluate.imagine import imagine, side_by_side, starts_of
from mesocosm.evaluate.metrics.fidelity import fidelity, losses, one_step, time_to_end
from mesocosm.evaluate.metrics.log import Log, begin_at
from mesocosm.evaluate.metrics.open_loop import open_loop
from mesocosm.model import mup
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.world import World
from mesocosm.train.prepare import transitions

from .worlds import KnownWorld, Walk, collect


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return collect(tmp_path_factory.mktemp("data") / "walks", 40)


def by_horizon(table: Any) -> dict[str, Any]:
    return {row.horizon: row for row in table.rows}


def test_a_known_error_is_found_at_every_horizon(walks: Dataset) -> None:
    codec, bias = Codec.fit(walks), 0.01
    table = by_horizon(
        open_loop(
            KnownWorld(codec, bias=bias),
            walks,
            horizons=(1, 5, 15, "full"),
            starts=10_000,
            samples=2,
            seed=0,
        )
    )
    episodes = [walks.episode(int(e)) for e in walks.episodes("valid")]
    std = np.concatenate(
        [e.observations for e in (walks.episode(int(e)) for e in walks.episodes("train"))]
    ).std(0)
    for name, row in table.items():
        spans = (
            [
                (e.observations, t, t + int(name))
                for e in episodes
                for t in range(len(e) - int(name) + 1)
            ]
            if name != "full"
            else []
        )
        spans = spans or [(e.observations, 0, len(e)) for e in episodes]
        moved = math.sqrt(np.mean([(((o[b] - o[a]) / std) ** 2).mean() for o, a, b in spans]))
        wrong = math.sqrt(np.mean([((b - a) * bias / std[0]) ** 2 / 2 for _, a, b in spans]))
        assert row.starts == len(spans) and row.episodes == len({id(o) for o, _, _ in spans})
        assert row.persistence == pytest.approx(moved, rel=1e-4)
        assert row.ratio == pytest.approx(wrong / moved, rel=1e-3) == row.single, name
        assert row.interval[0] <= row.ratio <= row.interval[1]
    exact = by_horizon(open_loop(KnownWorld(codec), walks, horizons=(1, "full"), samples=1))
    assert exact["1"].ratio < 1e-5 and exact["full"].ratio < 1e-5


def test_every_imagined_step_is_progress(walks: Dataset) -> None:
    seen: list[str] = []
    world = KnownWorld(Codec.fit(walks))
    open_loop(world, walks, horizons=(3, "full"), starts=4, samples=1, progress=seen.append)
    assert seen[:3] == [f"horizon 3, step {t} of 3" for t in (1, 2, 3)]
    assert seen[3].startswith("horizon full, step 1 of ")


def test_the_mean_of_rollouts_and_a_single_one_are_told_apart(walks: Dataset) -> None:
    row = open_loop(
        KnownWorld(Codec.fit(walks), noise=0.2), walks, horizons=(3,), starts=10_000, samples=16
    ).rows[0]
    assert row.single / row.ratio == pytest.approx(4.0, rel=0.1), (
        "independent noise averages out as the square root of 16"
    )


def test_a_linear_model_is_beside_it(walks: Dataset, tmp_path: Path) -> None:
    rows = by_horizon(
        open_loop(
            KnownWorld(Codec.fit(walks), noise=0.2), walks, horizons=(1, 5, "full"), samples=4
        )
    )
    assert all(row.linear < 1e-3 < row.ratio for row in rows.values()), "o' = o + a is linear"
    noisy = collect(tmp_path / "noisy", 60, noise=0.3)
    rows = by_horizon(open_loop(KnownWorld(Codec.fit(noisy)), noisy, horizons=(1,), samples=2))
    assert rows["1"].linear == pytest.approx(rows["1"].ratio, rel=0.05), "of the same expectation"


@pytest.mark.parametrize(
    ("noise", "low", "high"), [(0.3, 0.85, 0.95), (0.1, 0.2, 0.75), (1.5, 0.98, 1.0)]
)
def test_ninety_percent_intervals_hold_ninety_percent_of_a_calibrated_world(
    tmp_path: Path, noise: float, low: float, high: float
) -> None:
    data = collect(tmp_path / "noisy", 60, noise=0.3)
    table = open_loop(KnownWorld(Codec.fit(data), noise=noise), data, horizons=(1,), starts=10_000)
    row = table.rows[0]
    assert table.nominal == 0.9 and low < row.coverage <= high
    assert row.coverage_interval[0] <= row.coverage <= row.coverage_interval[1]


def test_a_rare_event_shows_in_the_mean_and_not_in_the_typical_error(walks: Dataset) -> None:
    class Rare(KnownWorld):
        def step(self, carry: Any, action: Any, keys: Any) -> Any:
            state, out = super().step(carry, action, keys)
            out.observation.numbers[::40] += 5.0
            return state, out

    row = open_loop(
        Rare(Codec.fit(walks), noise=0.02), walks, horizons=(1,), starts=10_000, samples=1
    ).rows[0]
    assert row.typical < 0.1 and row.ratio > 0.5


def test_what_cannot_be_measured_is_said(walks: Dataset, tmp_path: Path) -> None:
    codec = Codec.fit(walks)
    table = open_loop(KnownWorld(codec), walks, horizons=(500,))
    assert table.rows[0].ratio is None and table.notes == (
        "horizon 500: no validation episode is that long.",
    )
    few = collect(tmp_path / "few", 5, valid_fraction=0.01)
    assert len(few.episodes("valid")) < 2
    table = open_loop(KnownWorld(codec), few, horizons=(1,))
    assert (
        table.split == "train"
        and "on the training split" in table.notes[0]
        and table.rows[0].ratio is not None
    )
    still = collect(tmp_path / "still", 8, valid_fraction=0.4, constant=True)
    table = open_loop(KnownWorld(codec), still, horizons=(1,))
    assert table.rows[0].ratio is None and "persistence makes no error" in table.notes[0]


def test_reward_and_termination_a_step_ahead(walks: Dataset) -> None:
    codec = Codec.fit(walks)
    exact = one_step(KnownWorld(codec), walks)
    assert (
        exact.terminals
        == sum(walks.episode(int(e)).outcome == "terminated" for e in walks.episodes("valid"))
        > 0
    )
    assert (
        exact.precision == exact.recall == 1.0
        and exact.expected_terminals == exact.terminals
        and exact.transitions == walks.count("valid")
    )
    assert exact.reward_r2 == pytest.approx(1.0, abs=1e-6) and exact.reward_accuracy is None
    assert exact.auc == 1.0 and exact.auc_interval == (1.0, 1.0) == exact.recall_interval
    blurred = one_step(KnownWorld(codec, noise=1.0), walks)
    assert (
        0.5 < blurred.auc < 1.0 and blurred.auc_interval[0] < blurred.auc < blurred.auc_interval[1]
    )
    assert blurred.reward_r2_interval[0] < blurred.reward_r2 < blurred.reward_r2_interval[1]
    early = one_step(KnownWorld(codec, bias=-10.0), walks)
    assert (
        early.recall == 0.0
        and early.precision is None
        and "no termination was predicted" in early.notes[0]
        and early.reward_r2 < 0
    )


def test_when_episodes_end(walks: Dataset, tmp_path: Path) -> None:
    codec = Codec.fit(walks)
    exact = time_to_end(KnownWorld(codec), walks)
    assert exact.episodes > 3 and exact.bias == exact.error == exact.missed == 0.0
    never = time_to_end(KnownWorld(codec, bias=-10.0), walks)
    assert never.bias == never.error == never.missed == 1.0, (
        "it goes on at least one step after the end"
    )
    early = time_to_end(KnownWorld(codec, bias=1.0), walks)
    assert (
        early.bias < -1
        and early.error == -early.bias
        and early.missed == 0.0
        and early.error_interval[0] < early.error
    )
    endless = time_to_end(KnownWorld(codec), collect(tmp_path / "short", 9, limit=1, constant=True))
    assert endless.error is None and "no episode terminates" in (endless.note or "")


def test_imagination_of_the_true_dynamics_is_reality(walks: Dataset) -> None:
    world = KnownWorld(Codec.fit(walks))

    class Drift:
        def act(self, observations: Any, explore: bool = False, rng: Any = None) -> Any:
            return np.clip(0.3 - 0.1 * observations, -1, 1)

    env, episodes = Walk(), []
    from mesocosm.envs.config import RealityConfig
    from mesocosm.envs.episode import run_episode

    for k in range(4):
        act = lambda o, rng: Drift().act(o)  # noqa: E731
        episodes.append(
            run_episode(
                env,
                act,
                k=k,
                seed=5,
                behaviour="policy",
                max_steps=None,
                config=RealityConfig(env="walk"),
            )
        )
    shown = side_by_side(world, Drift(), episodes, title="t", seed=0, count=4, samples=2)
    assert shown["names"] == ["observation[0]", "observation[1]"]
    for pair, episode in zip(shown["episodes"], episodes, strict=True):
        assert len(pair["imagined"]) == 2
        for rollout in pair["imagined"]:
            np.testing.assert_allclose(rollout, pair["reality"], atol=1e-5)
            assert len(rollout) == len(episode) + 1
    paths = imagine(world, Drift(), starts_of(world, episodes), horizon=3, seed=0)
    assert [len(p[0]) for p in paths] == [min(3, len(e)) + 1 for e in episodes]


@pytest.fixture(scope="module", params=["sequence", "ensemble"])
def untrained(request: pytest.FixtureRequest, walks: Dataset) -> dict[bool, World]:
    codec, worlds = Codec.fit(walks), {}
    for base in (True, False):
        config = ModelConfig(
            family=request.param, size="10k", members=2, base=base, base_steps=0, context=6
        )
        net = build(codec.spec, config)
        mup.init_(net, 0)
        worlds[base] = World(
            net, Base.fit(codec.spec, config, transitions(walks, codec), seed=0), codec.to_json()
        )
    return worlds


def test_a_real_world_with_the_right_base_is_good_before_training_and_without_it_is_not(
    walks: Dataset, untrained: dict[bool, World]
) -> None:
    good, bad = (
        by_horizon(open_loop(untrained[base], walks, horizons=(1, 5), starts=32, samples=4, seed=1))
        for base in (True, False)
    )
    assert good["1"].ratio < 0.05 and good["5"].ratio < 0.1
    assert bad["1"].ratio > 0.5
    again = by_horizon(
        open_loop(untrained[True], walks, horizons=(1, 5), starts=32, samples=4, seed=1)
    )
    assert again == good, "the same seed gives the same table"


def test_history_is_given_before_a_start(walks: Dataset, untrained: dict[bool, World]) -> None:
    world = untrained[True]
    log = Log(walks, Codec.fit(walks), "valid")
    step = np.array([0, 1, 9])
    episode = np.array([int(np.flatnonzero(log.lengths > 12)[0])] * 3)
    member = torch.zeros(3, dtype=torch.int64)
    carry = begin_at(world, log, episode, step, member, warmup=3)
    assert torch.equal(carry.observation.numbers, log.observation(episode, step).numbers)
    if not world.net.memory:
        assert carry.clock == 0
        return
    assert carry.position == 3 and carry.start_column.tolist() == [3, 2, 0], (
        "columns before an episode's start are hidden"
    )
    assert torch.equal(
        carry.past_observation.numbers[2, :3],
        log.observation(episode[2:], np.array([[6, 7, 8]])).numbers[0],
    )
    assert torch.equal(
        carry.past_action.numbers[1, 2], log.action(episode[:1], np.array([0])).numbers[0]
    )


def test_fidelity_on_real_components_adds_up(walks: Dataset, untrained: dict[bool, World]) -> None:
    result = fidelity(untrained[True], walks, horizons=(1,), starts=16, samples=2)
    assert result.losses["total"] == pytest.approx(
        sum(v for k, v in result.losses.items() if k != "total")
    )
    assert {"dynamics", "reward", "termination", "task"} <= set(result.losses) and all(
        math.isfinite(v) and v >= 0 for v in result.losses.values()
    )
    assert result.losses == pytest.approx(losses(untrained[True], walks, batch=7)[0], rel=1e-4)
    low, high = result.loss_intervals["total"]
    assert low < result.losses["total"] < high
    assert result.losses["dynamics"] < losses(untrained[False], walks)[0]["dynamics"], (
        "the base knows the dynamics"
    )


def test_a_world_of_other_spaces_is_refused(walks: Dataset) -> None:
    world = KnownWorld(Codec.fit(walks))
    world.codec["action_space"] = {"kind": "Discrete", "n": 3, "start": 0, "dtype": "int64"}
    world.codec["scalings"]["action"] = {"mean": [], "scale": [], "precision": []}
    with pytest.raises(UsageError, match=r"walks has action_space Box.*the world Discrete\(3\)"):
        open_loop(world, walks)
