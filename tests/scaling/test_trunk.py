"""A trunk's branches, with real engines in a group of one, equal separate runs digit for digit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mesocosm.cluster.spec import ClusterConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.model.base import Base
from mesocosm.scaling import cells as stored
from mesocosm.scaling.grid import Cell, Grid, Trunk, lay_out
from mesocosm.scaling.trunk import TrunkWork, TrunkWorker, branches, single_rank
from mesocosm.store.artifacts import Storage
from mesocosm.train import prepare
from mesocosm.train.rank_trainer import Diverged, RankTrainer
from mesocosm.train.schedule import factor, length, lr_factor, share

Make = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def group(one_rank: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield


def started(grid: Grid, trunk: Trunk) -> RankTrainer:
    dataset = prepare.narrowed(grid.dataset, trunk.unique, trunk.seed)
    base, rank = Base(grid.codec.spec, trunk.model), single_rank("cpu")
    settings = (grid.codec, trunk.model, trunk.options, trunk.seed, rank, lambda: base)
    return RankTrainer.start(dataset, *settings)[0]


def run_alone(grid: Grid, trunk: Trunk, cell: Cell) -> dict[str, float]:
    """The validation metrics of a separate run with the cell's schedule."""
    training = started(grid, trunk)
    options = grid.config.training(cell.steps, cell.warmup, cell.decay, grid.precision)
    for number in range(1, cell.steps + 1):
        multiplier = lr_factor(number, cell.steps, options.warmup, options.decay)
        training.step(number, multiplier, last=number == cell.steps)
    metrics = training.validate()
    training.engine.destroy()
    return metrics


def test_steps_to_shares_and_back() -> None:
    for steps in (1, 2, 3, 7, 100, 999):
        for some in {0, 1, steps // 2, steps}:
            assert length(share(some, steps), steps) == some


def test_before_its_decay_a_run_equals_a_longer_one() -> None:
    assert [factor(n, 20, 4, 6) for n in range(1, 15)] == [
        factor(n, 90, 4, 30) for n in range(1, 15)
    ]
    assert factor(16, 20, 4, 6) < 1


@pytest.mark.parametrize(
    "options",
    [
        ("model.family=sequence",),
        ("model.family=ensemble",),
        pytest.param(("train.precision=bf16",), marks=pytest.mark.slow),
        ("train.corrupt_history=1",),
        ("train.decay=1", "train.warmup=0"),
    ],
    ids=["sequence", "ensemble", "bf16", "corrupted", "all decay"],
)
def test_a_branch_equals_a_separate_run(
    sweep_of: Make, cart: Dataset, options: Sequence[str]
) -> None:
    config = sweep_of("unused", "grid.sizes=[10k]", "grid.data=[300,600,900]", *options)
    grid = lay_out(config, cart, ClusterConfig())
    (trunk,) = grid.trunks(grid.cells)
    training = started(grid, trunk)
    trained = list(branches(training, trunk.cells))
    training.engine.destroy()
    assert [outcome.failed for outcome in trained] == [None] * 3
    assert [outcome.record.ran for outcome in trained] == [trunk.ran(i) for i in range(3)]
    for cell, outcome in zip(trunk.cells, trained, strict=True):
        measured = run_alone(grid, trunk, cell)
        parts = {f"valid/{name}": value for name, value in outcome.record.parts.items()}
        assert parts | {"valid/loss": outcome.record.loss} == measured, f"{cell.steps} steps"
    assert len({outcome.record.loss for outcome in trained}) == 3


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_fork_is_undone(sweep_of: Make, cart: Dataset, precision: str) -> None:
    """The optimiser's moments and torch's random state are restored, also after a divergence."""
    config = sweep_of("unused", "grid.sizes=[10k]", f"train.precision={precision}")
    grid = lay_out(config, cart, ClusterConfig())
    (trunk,) = grid.trunks(grid.cells)

    def losses(disturbed: bool) -> list[float]:
        training = started(grid, trunk)
        values = []
        for number in range(1, 9):
            if disturbed and number in (1, 4, 6):
                with training.fork():
                    torch.rand(3)
                    training.step(number, 0.5, last=False)
                with pytest.raises(Diverged), training.fork():
                    training.watch.best = -1e9 if number == 4 else training.watch.best
                    for again in range(number, number + 40):
                        training.step(again, 1e7, last=True)
            metrics = training.step(number, 1.0, last=False)
            assert metrics is not None
            values += [metrics["loss"], metrics["gradient_norm"], float(torch.rand(1))]
        training.engine.destroy()
        return values

    assert losses(True) == losses(False)


def train(root: str, grid: Grid, cells: Sequence[Cell]) -> list[Any]:
    (trunk,) = grid.trunks(cells)
    work = TrunkWork.of(root, grid, [trunk], gpu=False, force=False)
    return list(TrunkWorker(work).train(trunk.id))


@pytest.fixture
def laid_out(sweep_of: Make, tmp_path: Path, cart_root: Make) -> Callable[..., tuple[str, Grid]]:
    """`laid_out(*overrides)` gives (a new root, the grid)."""

    def of(*overrides: str) -> tuple[str, Grid]:
        root = cart_root(tmp_path / "root")
        dataset = Dataset([Storage(root).artifact("datasets", "cart").path])
        config = sweep_of(root, "grid.sizes=[10k]", *overrides)
        return root, lay_out(config, dataset, ClusterConfig())

    return of


def test_a_worker_stores_a_record_for_each_cell(laid_out: Make) -> None:
    root, grid = laid_out("grid.unique=[250]")
    first, second = train(root, grid, grid.cells)
    assert stored.finished(Storage(root)) == {cell.id for cell in grid.cells}
    assert first.record == stored.read_record(Storage(root), grid.cells[0].id)
    assert first.record.loss == pytest.approx(sum(first.record.parts.values()))
    assert first.record.loss != second.record.loss and first.record.unique == 250
    assert first.base_seconds > 0 == second.base_seconds
    (again,) = train(root, grid, grid.cells[1:])
    assert again.base_seconds == 0, "the base is read from storage"
    assert again.record == second.record, "the first record stands"


def test_a_missing_cell_in_the_middle_is_the_same(
    laid_out: Make, tmp_path: Path, cart_root: Make
) -> None:
    root, grid = laid_out("grid.data=[300,600,900]")
    _, second, _ = train(root, grid, grid.cells)
    (alone,) = train(cart_root(tmp_path / "other"), grid, grid.cells[1:2])
    assert alone.record.loss == second.record.loss and alone.record.ran > second.record.ran


def test_a_record_that_cannot_be_stored_fails_its_cell_only(
    laid_out: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, grid = laid_out("grid.data=[300,600,900]")
    ids, save = [cell.id for cell in grid.cells], stored.save_record

    def full(storage: Storage, record: stored.CellRecord, **options: Any) -> stored.CellRecord:
        if record.cell == ids[1]:
            raise OSError(28, "No space left on device")
        return save(storage, record, **options)

    monkeypatch.setattr(stored, "save_record", full)
    outcomes = train(root, grid, grid.cells)
    assert [outcome.cell for outcome in outcomes] == ids
    message = "its record could not be stored: OSError: [Errno 28] No space left on device"
    assert [outcome.failed for outcome in outcomes] == [None, message, None]
    assert stored.finished(Storage(root)) == {ids[0], ids[2]}


def test_a_trunk_that_diverges_fails_its_cells(laid_out: Make) -> None:
    root, grid = laid_out("train.lr=1e6")
    outcomes = train(root, grid, grid.cells)
    assert [outcome.cell for outcome in outcomes] == [cell.id for cell in grid.cells]
    assert all(o.record is None and "at step" in o.failed for o in outcomes)
    assert not stored.finished(Storage(root))
