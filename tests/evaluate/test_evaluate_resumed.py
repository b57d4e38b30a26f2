"""Interrupted evaluations: what was judged is neither lost nor paid again, and bounds hold for all
attempts together.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mesocosm.config import StorageConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs import tracking

from . import worlds
from .lab import SLOW, Lab, judge_row, summary_of


def interrupt(lab: Lab, config: EvaluateConfig, number: int) -> None:
    """End an evaluation at the `number`-th step of `Walk` in reality, as a signal would."""
    steps, step = itertools.count(1), worlds.Walk.step

    def interrupted(env: worlds.Walk, action: Any) -> Any:
        if next(steps) == number:
            raise KeyboardInterrupt
        return step(env, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds.Walk, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lab.evaluate(config)


def test_steps_of_interrupted_attempts_count(lab: Lab) -> None:
    """The bound is of all attempts."""
    storage = lab.storage
    cfg = lab.config(horizon=12, success="return >= 0", agent="a0", seed=7, judge_steps=60)
    before = set(storage.list("ledgers"))
    interrupt(lab, cfg, 20)
    (id,) = set(storage.list("ledgers")) - before
    totals = lab.judge_totals(id)
    assert (totals.steps, totals.unconfirmed_steps) == (20, 8), "the interrupted episode was paid"
    assert len(storage.files(f"runs/episodes/{id}")) == 1
    message = r"judge_steps must be >= 68, got 60: .* took 20 steps, and this one may take 48"
    with pytest.raises(UsageError, match=message):
        lab.evaluate(cfg)
    assert lab.judge_totals(id).steps == 20


@pytest.mark.slow
def test_the_last_attempt_needs_steps_for_the_missing_episodes_alone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = lab.storage
    cfg = lab.config(horizon=12, success="return >= 0", agent="a0", seed=8, judge_steps=68)
    before = set(storage.list("ledgers"))
    interrupt(lab, cfg, 20)
    (id,) = set(storage.list("ledgers")) - before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        target = "mesocosm.evaluate.suite.task_distribution"
        patch.setattr(target, Mock(side_effect=KeyboardInterrupt))
        lab.evaluate(cfg)
    spent = lab.judge_totals(id).steps
    assert 20 < spent <= 68 and len(storage.files(f"runs/episodes/{id}")) == 5
    artifact = lab.evaluate(cfg)
    assert artifact.id == id and lab.judge_totals(id).steps == spent
    assert "continues after 5 judged episodes" in lab.log
    assert storage.list(f"runs/episodes/{id}") == []
    success = summary_of(artifact)["suite"]["agent"]["success"]
    assert 0 <= success["real"] <= 1 and 0 <= success["world"] <= 1, "without a comparison, too"


@pytest.mark.slow
def test_an_interrupted_evaluation_continues_to_the_same_result(lab: Lab, tmp_path: Path) -> None:
    """It is interrupted while it judges the agent, and again while it compares policies."""
    shutil.copytree(lab.root, tmp_path / "root")
    scripted = BehaviourConfig(kind="scripted", function=SLOW)
    cfg = lab.config(
        horizon=12,
        success="return >= 0",
        agent="a0",
        policies=[BehaviourConfig(kind="random"), scripted],
        graded=1,
        policy_episodes=3,
        imagined=2,
        seed=5,
        episodes=2,
        horizons=[1],
        full=False,
        starts=8,
    )
    artifact = lab.evaluate(cfg)
    whole, lost = lab.judge_totals(artifact.id), 0
    cfg.storage = StorageConfig(str(tmp_path / "root"))
    with tracking.start("evaluate", cfg, quiet=True) as second:
        other = Lab(cfg.storage.root, second)
        for number in (whole.steps // 10, whole.steps // 2):
            interrupt(other, cfg, number)
            totals = other.judge_totals(artifact.id)
            assert lost < totals.unconfirmed_steps <= lost + 12, "one episode is lost"
            lost = totals.unconfirmed_steps
        again = other.evaluate(cfg)
    assert again.id == artifact.id
    totals = other.judge_totals(artifact.id)
    assert totals.steps - totals.unconfirmed_steps == whole.steps and whole.unconfirmed_steps == 0
    assert totals.unconfirmed_steps == lost
    one, two = summary_of(artifact), summary_of(again)
    assert judge_row(two)["steps"] - judge_row(one)["steps"] == lost
    del one["real_steps"], two["real_steps"]
    assert one == two
    assert other.storage.list(f"runs/episodes/{artifact.id}") == []


def test_a_given_ledger_is_bounded_for_this_evaluation_alone(lab: Lab) -> None:
    cfg = lab.config(horizon=12, agent="a0", seed=8, judge_steps=60, ledger="shared")
    Ledger(lab.storage, "shared").reserve("judge", 1000)
    lab.evaluate(cfg)
    assert 1000 < lab.judge_totals("shared").steps <= 1060
