"""The ledger stays exact after Ctrl-C, or failing storage, at every write of a collection."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mesocosm.data.collecting import workers
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.collecting.workers import CollectTask, Lane, Report, run_here, split
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.envs.amounts import LedgerTotals
from mesocosm.envs.config import BudgetConfig, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.segments import Segments
from mesocosm.errors import StorageError
from mesocosm.jobs import collect as collecting
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

OWN = Path(__file__).parent.parent / "sample_envs"


class Disturbed(Storage):
    """Disturbs the `number`-th creation of a file, counted over all threads."""

    counter = itertools.count(1)
    number = 0

    def create(self, path: str, data: bytes) -> bool:
        return self.disturb(next(Disturbed.counter), path, data)

    def disturb(self, k: int, path: str, data: bytes) -> bool:
        """Create the file as the k-th."""
        raise NotImplementedError


class Interrupted(Disturbed):
    def disturb(self, k: int, path: str, data: bytes) -> bool:
        created = super(Disturbed, self).create(path, data)
        if k == Disturbed.number:
            signal.raise_signal(signal.SIGINT)
        return created


class Failing(Disturbed):
    """Fails for two creations: the job's, and its retry."""

    def disturb(self, k: int, path: str, data: bytes) -> bool:
        if 0 <= k - Disturbed.number < 2:
            raise StorageError("S3 does not answer")
        return super(Disturbed, self).create(path, data)


Collect = Callable[[type[Disturbed], int, type[BaseException]], tuple[int, int, LedgerTotals]]


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collect:
    """Collects until the error. Returns (steps taken, steps stored, the ledger's totals)."""
    monkeypatch.chdir(OWN)
    monkeypatch.syspath_prepend(str(OWN))
    monkeypatch.setenv("STEPS_FILE", str(tmp_path / "steps"))
    monkeypatch.setenv("STEP_S", "0.003")
    monkeypatch.setattr(workers, "SEGMENT_S", 0.02)
    root = str(tmp_path / "root")

    def run(
        kind: type[Disturbed], number: int, error: type[BaseException]
    ) -> tuple[int, int, LedgerTotals]:
        reality = RealityConfig(env="ownenvs:Counted", kwargs={"stretch": 0.0}, horizon=10)
        plan = CollectTask(reality, [BehaviourConfig()], 0, root, "x", "d", "r", str(OWN))
        monkeypatch.setattr(Disturbed, "counter", itertools.count(1))
        monkeypatch.setattr(Disturbed, "number", number)
        with monkeypatch.context() as patch:
            patch.setattr(workers, "Storage", kind)
            with pytest.raises(error):
                run_here(plan, split(100_000, 1), lambda attempts, steps: None)
        ledger = Ledger(Storage(root), "x")
        stored = plan.segments().attempts(0, 0, ledger)
        asked = (tmp_path / "steps").stat().st_size if (tmp_path / "steps").exists() else 0
        return asked, sum(attempt.steps for attempt in stored), ledger.totals()

    return run


@pytest.mark.parametrize("number", range(1, 13))
def test_a_ctrl_c_in_any_write_leaves_the_ledger_exact(collect: Collect, number: int) -> None:
    asked, stored, totals = collect(Interrupted, number, KeyboardInterrupt)
    unconfirmed = sum(r.steps for r in totals.unconfirmed)
    assert totals.steps == asked and totals.steps - unconfirmed == stored
    assert unconfirmed < 10  # the episode under way


@pytest.mark.parametrize("number", range(2, 11))
def test_storage_that_fails_in_any_write_leaves_stored_steps_confirmed(
    collect: Collect, number: int
) -> None:
    asked, stored, totals = collect(Failing, number, StorageError)
    unconfirmed = sum(r.steps for r in totals.unconfirmed)
    assert totals.steps >= asked and totals.steps - unconfirmed == stored


@pytest.mark.integration
def test_a_budget_that_was_raised_makes_up_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a refusal and an interrupt, the rerun with a larger budget is not short."""
    cfg = CollectConfig(steps=100, workers=0, ledger="ours")
    cfg.reality = RealityConfig(env="CartPole-v1", budget=BudgetConfig(150))
    cfg.storage.root = str(tmp_path / "root")
    close = DatasetWriter.close

    def interrupted(writer: DatasetWriter, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def spend(plan: CollectTask, chosen: Sequence[Lane], report: Report) -> None:
        Ledger(Storage(cfg.storage.root), "ours").reserve("collect", 142)
        run_here(plan, chosen, report)

    monkeypatch.setattr(collecting, "run_here", spend)
    monkeypatch.setattr(DatasetWriter, "close", interrupted)
    with pytest.raises(KeyboardInterrupt), tracking.start("collect", cfg, quiet=True) as run:
        collecting.JOB.run(cfg, run)
    stored = Segments(Storage(cfg.storage.root), Storage(cfg.storage.root).list("runs/episodes")[0])
    refused = [
        a.spent
        for lane in (0, 1)
        for a in stored.attempts(lane, 0, Ledger(Storage(cfg.storage.root), "ours"))
    ]
    assert any(refused)
    monkeypatch.setattr(collecting, "run_here", run_here)
    monkeypatch.setattr(DatasetWriter, "close", close)
    cfg.reality.budget.steps = 1000
    with tracking.start("collect", cfg, quiet=True) as run:
        result = collecting.JOB.run(cfg, run)
    assert result.meta["counts"]["steps"] == 100 and result.meta["short"] is None
