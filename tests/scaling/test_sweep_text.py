"""Sweeps of text worlds: a branch equals a separate run, and the loss is in bits per byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from mesocosm import config
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.jobs import collect
from mesocosm.runs import tracking
from mesocosm.scaling.grid import lay_out
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.scaling.trunk import TrunkWork, TrunkWorker, single_rank
from mesocosm.store.artifacts import Storage
from mesocosm.train.schedule import lr_factor
from mesocosm.train.text_rank_trainer import TextTrainer

EXPERT = "mesocosm.envs.text.chores_policies:ChoresExpert"
SMALL = ("model.family=language", "model.members=1", "model.context=768", "model.vocabulary=300")
SMALL += ("grid.sizes=[10k]", "grid.data=[60,120]", "train.batch=1", "train.warmup=1")


@pytest.fixture(scope="module", autouse=True)
def group(one_rank: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield


def test_a_branch_equals_a_separate_run_and_is_judged_in_bits(tmp_path: Path) -> None:
    root = tmp_path / "root"
    keys = (f"storage.root={root}", "reality.env=mesocosm.envs.text:ChoresEasy-v0", "steps=200")
    expert = f'behaviours=[{{kind: noisy, noise: 0.2, function: "{EXPERT}"}}]'
    logs = config.load(collect.CollectConfig, overrides=(*keys, "workers=0", expert))
    with tracking.start("collect", logs, quiet=True) as run:
        dataset = collect.JOB.run(logs, run)
    overrides = (f"storage.root={root}", f"data.datasets=[{dataset.id}]", *SMALL)
    sweep = config.load(SweepConfig, overrides=overrides)
    data = Dataset([dataset.path])
    grid = lay_out(sweep, data, ClusterConfig())
    (trunk,) = grid.trunks(grid.cells)
    work = TrunkWork.of(str(root), grid, [trunk], gpu=False, force=False)
    outcomes = list(TrunkWorker(work).train(trunk.id))
    assert [outcome.failed for outcome in outcomes] == [None, None]
    cell, record = trunk.cells[1], outcomes[1].record
    assert record is not None and record.family == "language"
    options = sweep.training(cell.steps, cell.warmup, cell.decay, grid.precision)
    settings = (grid.codec, trunk.model, options, trunk.seed, single_rank("cpu"), None)
    alone, _ = TextTrainer.start(data, *settings)
    for number in range(1, cell.steps + 1):
        multiplier = lr_factor(number, cell.steps, options.warmup, options.decay)
        alone.step(number, multiplier, last=number == cell.steps)
    metrics = alone.validate()
    alone.engine.destroy()
    assert record.loss == metrics["valid/bits_per_byte"]
    assert record.parts["dynamics"] == metrics["valid/dynamics"]
    assert set(record.parts) == {"dynamics", "reward", "termination", "task"}


def test_a_sweep_trains_from_scratch(tmp_path: Path) -> None:
    keys = ("data.datasets=[x]", *SMALL, "model.pretrained=folder")
    sweep = config.load(SweepConfig, overrides=(f"storage.root={tmp_path}", *keys))
    with pytest.raises(UsageError, match="pretrained must be left out of a sweep"):
        sweep.validate()
    assert not Storage(str(tmp_path)).list("worlds")
