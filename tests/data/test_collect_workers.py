"""Workers that are lost at inconvenient moments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesocosm.data.collecting.ray_workers import DEATHS, LostWorkers, run_on_ray
from mesocosm.data.collecting.workers import CollectTask, LaneRunner, split
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import MesocosmError
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.store.artifacts import Storage

OWN = Path(__file__).parent.parent / "sample_envs"


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)
    monkeypatch.syspath_prepend(str(OWN))


def a_plan(root: str, reality: RealityConfig) -> CollectTask:
    return CollectTask(reality, [BehaviourConfig()], 0, root, "x", "d", "r", str(OWN))


@pytest.mark.slow
def test_a_process_that_dies_while_it_makes_the_environment_ends_the_job(
    root: str, user_module: None, ray_local: None
) -> None:
    reality = RealityConfig(env="ownenvs:Stillborn", kwargs={"survivor": os.getpid()})
    with pytest.raises(
        MesocosmError,
        match=rf"died {DEATHS} times while it made the environment.*ownenvs:Stillborn",
    ):
        run_on_ray(a_plan(root, reality), split(20, 1), 1, lambda attempts, steps: None)


def test_an_episode_that_is_written_while_its_worker_is_given_up_is_not_dropped(
    root: str, user_module: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent worker writes its episode after the driver has read storage."""
    plan = a_plan(root, RealityConfig(env="ownenvs:Line", kwargs={"stretch": 0.0}, horizon=10))
    (lane,) = split(10, 1)
    lane.careful = True
    losses = LostWorkers(plan)
    runner = LaneRunner(plan)
    runner.begin(0, 10)
    read = losses._segments.attempts

    def late(*args: int) -> list[object]:
        attempts = read(*args)  # type: ignore[arg-type]
        if not Storage(root).list("runs/episodes/d"):
            runner.advance(lane)
        return attempts  # type: ignore[return-value]

    monkeypatch.setattr(losses._segments, "attempts", late)
    losses._tries[0] = (0, DEATHS)
    (attempt,) = losses.account(lane, "the environment's process did not answer", died=False)
    assert attempt.reason is None and attempt.steps == 10
    runner.end()
    totals = plan.open_ledger().totals()
    assert totals.steps == 10 and totals.unconfirmed == ()
