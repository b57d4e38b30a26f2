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
from mesocosm.model.world import World

from .worlds import KnownWorld, Walk, collect, episodes_of, untrained_world


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return collect(tmp_path_factory.mktemp("data") / "walks", 40)


def table(world: Any, data: Dataset, *horizons: int | str, **options: Any) -> dict[str, Any]:
    """The rows of the open-loop table by horizon."""
    rows = open_loop(world, data, horizons=horizons, **options).rows
    return {row.horizon: row for row in rows}


def test_a_known_error_is_measured_at_every_horizon(walks: Dataset) -> None:
    codec, bias = Codec.fit(walks), 0.01
    world = KnownWorld(codec, bias=bias)
    rows = table(world, walks, 1, 5, 15, "full", starts=10_000, samples=2)
    train, valid = (
        [walks.episode(int(e)).observations for e in walks.episodes(split)]
        for split in ("train", "valid")
    )
    std = np.concatenate(train).std(0)
    for name, row in rows.items():
        if name == "full":
            spans = [(path, 0, len(path) - 1) for path in valid]
        else:
            h = int(name)
            spans = [(path, t, t + h) for path in valid for t in range(len(path) - h)]
        moved = math.sqrt(np.mean([(((o[b] - o[a]) / std) ** 2).mean() for o, a, b in spans]))
        wrong = math.sqrt(np.mean([((b - a) * bias / std[0]) ** 2 / 2 for _, a, b in spans]))
        assert row.starts == len(spans) and row.episodes == len({id(o) for o, _, _ in spans})
        assert row.persistence == pytest.approx(moved, rel=1e-4)
        assert row.ratio == pytest.approx(wrong / moved, rel=1e-3) == row.single, name
        assert row.interval[0] <= row.ratio <= row.interval[1]
    exact = table(KnownWorld(codec), walks, 1, "full", samples=1)
    assert exact["1"].ratio < 1e-5 and exact["full"].ratio < 1e-5


def test_every_imagined_step_is_progress(walks: Dataset) -> None:
    seen: list[str] = []
    world = KnownWorld(Codec.fit(walks))
    open_loop(world, walks, horizons=(3, "full"), starts=4, samples=1, progress=seen.append)
    assert seen[:3] == [f"horizon 3, step {t} of 3" for t in (1, 2, 3)]
    assert seen[3].startswith("horizon full, step 1 of ")


def test_independent_noise_averages_out_in_the_mean_of_rollouts(walks: Dataset) -> None:
    world = KnownWorld(Codec.fit(walks), noise=0.2)
    row = table(world, walks, 3, starts=10_000, samples=16)["3"]
    assert row.single / row.ratio == pytest.approx(math.sqrt(16), rel=0.1)


def test_a_linear_model_is_beside_it(walks: Dataset, tmp_path: Path) -> None:
    rows = table(KnownWorld(Codec.fit(walks), noise=0.2), walks, 1, 5, "full", samples=4)
    assert all(row.linear < 1e-3 < row.ratio for row in rows.values()), "o' = o + a is linear"
    noisy = collect(tmp_path / "noisy", 60, noise=0.3)
    row = table(KnownWorld(Codec.fit(noisy)), noisy, 1, samples=2)["1"]
    assert row.linear == pytest.approx(row.ratio, rel=0.05), "of the same expectation"


@pytest.mark.parametrize(
    ("noise", "low", "high"), [(0.3, 0.85, 0.95), (0.1, 0.2, 0.75), (1.5, 0.98, 1.0)]
)
def test_ninety_percent_intervals_hold_ninety_percent_of_a_calibrated_world(
    tmp_path: Path, noise: float, low: float, high: float
) -> None:
    data = collect(tmp_path / "noisy", 60, noise=0.3)
    world = KnownWorld(Codec.fit(data), noise=noise)
    result = open_loop(world, data, horizons=(1,), starts=10_000)
    row = result.rows[0]
    assert result.nominal == 0.9 and low < row.coverage <= high
    assert row.coverage_interval[0] <= row.coverage <= row.coverage_interval[1]


def test_a_rare_event_shows_in_the_mean_and_not_in_the_typical_error(walks: Dataset) -> None:
    class Rare(KnownWorld):
        def step(self, carry: Any, action: Any, keys: Any) -> Any:
            state, out = super().step(carry, action, keys)
            out.observation.numbers[::40] += 5.0
            return state, out

    world = Rare(Codec.fit(walks), noise=0.02)
    row = table(world, walks, 1, starts=10_000, samples=1)["1"]
    assert row.typical < 0.1 and row.ratio > 0.5


def test_a_note_names_figures_that_the_data_cannot_answer(walks: Dataset, tmp_path: Path) -> None:
    world = KnownWorld(Codec.fit(walks))
    result = open_loop(world, walks, horizons=(500,))
    assert result.rows[0].ratio is None
    assert result.notes == ("horizon 500: no validation episode is that long.",)
    few = collect(tmp_path / "few", 5, valid_fraction=0.01)
    assert len(few.episodes("valid")) < 2
    result = open_loop(world, few, horizons=(1,))
    assert result.split == "train" and "on the training split" in result.notes[0]
    assert result.rows[0].ratio is not None
    still = collect(tmp_path / "still", 8, valid_fraction=0.4, constant=True)
    result = open_loop(world, still, horizons=(1,))
    assert result.rows[0].ratio is None and "persistence makes no error" in result.notes[0]


def test_reward_and_termination_a_step_ahead(walks: Dataset) -> None:
    codec = Codec.fit(walks)
    exact = one_step(KnownWorld(codec), walks)
    outcomes = [walks.episode(int(e)).outcome for e in walks.episodes("valid")]
    assert exact.terminals == outcomes.count("terminated") == exact.expected_terminals > 0
    assert exact.precision == exact.recall == 1.0 and exact.transitions == walks.count("valid")
    assert exact.reward_r2 == pytest.approx(1.0, abs=1e-6) and exact.reward_accuracy is None
    assert exact.auc == 1.0 and exact.auc_interval == (1.0, 1.0) == exact.recall_interval
    blurred = one_step(KnownWorld(codec, noise=1.0), walks)
    assert blurred.auc_interval[0] < blurred.auc < blurred.auc_interval[1]
    assert 0.5 < blurred.auc < 1.0
    assert blurred.reward_r2_interval[0] < blurred.reward_r2 < blurred.reward_r2_interval[1]
    early = one_step(KnownWorld(codec, bias=-10.0), walks)
    assert early.recall == 0.0 and early.precision is None and early.reward_r2 < 0
    assert "no termination was predicted" in early.notes[0]


def test_when_episodes_end(walks: Dataset, tmp_path: Path) -> None:
    codec = Codec.fit(walks)
    exact = time_to_end(KnownWorld(codec), walks)
    assert exact.episodes > 3 and exact.bias == exact.error == exact.missed == 0.0
    never = time_to_end(KnownWorld(codec, bias=-10.0), walks)
    assert never.bias == never.error == never.missed == 1.0, "at least one step after the end"
    early = time_to_end(KnownWorld(codec, bias=1.0), walks)
    assert early.bias < -1 and early.error == -early.bias and early.missed == 0.0
    assert early.error_interval[0] < early.error
    endless = time_to_end(KnownWorld(codec), collect(tmp_path / "short", 9, limit=1, constant=True))
    assert endless.error is None and "no episode terminates" in (endless.note or "")


def test_imagination_of_the_true_dynamics_is_reality(walks: Dataset) -> None:
    world = KnownWorld(Codec.fit(walks))

    class Drift:
        def act(self, observations: Any, explore: bool = False, rng: Any = None) -> Any:
            return np.clip(0.3 - 0.1 * observations, -1, 1)

        act_one = act

    episodes = episodes_of(Walk(), Drift(), 4, seed=5)
    [shown] = side_by_side(world, Drift(), episodes, title="t", seed=0, count=4, samples=2)
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
    """A world with a base that knows the dynamics, and one without a base."""
    return {
        base: untrained_world(walks, family=request.param, base=base, context=6)
        for base in (True, False)
    }


@pytest.mark.integration
def test_a_real_world_with_the_right_base_is_good_before_training_and_without_it_is_not(
    walks: Dataset, untrained: dict[bool, World]
) -> None:
    options = {"starts": 32, "samples": 4, "seed": 1}
    good, bad = (table(untrained[base], walks, 1, 5, **options) for base in (True, False))
    assert good["1"].ratio < 0.05 and good["5"].ratio < 0.1
    assert bad["1"].ratio > 0.5
    again = table(untrained[True], walks, 1, 5, **options)
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
    assert carry.position == 3
    assert carry.start_column.tolist() == [3, 2, 0], "columns before a start are hidden"
    past = log.observation(episode[2:], np.array([[6, 7, 8]])).numbers[0]
    assert torch.equal(carry.past_observation.numbers[2, :3], past)
    action = log.action(episode[:1], np.array([0])).numbers[0]
    assert torch.equal(carry.past_action.numbers[1, 2], action)


def test_fidelity_on_real_components_adds_up(walks: Dataset, untrained: dict[bool, World]) -> None:
    result = fidelity(untrained[True], walks, horizons=(1,), starts=16, samples=2)
    nats = dict(result.losses)
    assert nats == pytest.approx(losses(untrained[True], walks, batch=7)[0], rel=1e-4)
    low, high = result.loss_intervals["total"]
    assert low < nats["total"] < high
    total = nats.pop("total")
    assert total == pytest.approx(sum(nats.values()))
    assert {"dynamics", "reward", "termination", "task"} <= set(nats)
    assert all(math.isfinite(v) and v >= 0 for v in nats.values())
    without_base = losses(untrained[False], walks)[0]["dynamics"]
    assert nats["dynamics"] < without_base, "the base knows the dynamics"


def test_a_world_of_other_spaces_is_refused(walks: Dataset) -> None:
    world = KnownWorld(Codec.fit(walks))
    world.codec["action_space"] = {"kind": "Discrete", "n": 3, "start": 0, "dtype": "int64"}
    world.codec["scalings"]["action"] = {"mean": [], "scale": [], "precision": []}
    with pytest.raises(UsageError, match=r"walks has action_space Box.*the world Discrete\(3\)"):
        open_loop(world, walks)
