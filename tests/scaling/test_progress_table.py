"""The progress of a running sweep: the line, the table, the hours left."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mesocosm.cluster.spec import ClusterConfig, NodeGroup
from mesocosm.datasets.dataset import Dataset
from mesocosm.runs import tracking
from mesocosm.scaling.cells import CellRecord
from mesocosm.scaling.grid import Cell, lay_out, worker_seconds
from mesocosm.scaling.progress_table import ProgressTable, duration, short
from mesocosm.scaling.trunk import CellOutcome


def finished(cell: Cell, loss: float, ran: int, seconds: float) -> CellOutcome:
    metrics = {"valid/loss": loss, "valid/dynamics": loss}
    return CellOutcome(cell.id, CellRecord.of(cell, metrics, seconds=seconds, ran=ran), None)


@pytest.mark.integration
def test_progress_counts_and_estimates(
    root: str, sweep_of: Callable[..., Any], cart: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_of(root, "grid.sizes=[10k]", "grid.seeds=[0,1]", "concurrent=1")
    grid = lay_out(config, cart, ClusterConfig([NodeGroup(flops_per_s=1e9, gpus=0)]))
    trunks, error = grid.trunks(grid.cells), "the loss is nan at step 3"
    expected = worker_seconds(trunks)
    with tracking.start("sweep", config, quiet=True) as run:
        progress = ProgressTable(run, grid, {})
        assert progress.line == "0/4 cells" and progress.hours_left is None
        first, second = trunks[0].cells
        progress.add(finished(first, 3.5, first.steps, 10 * expected[first.id]))
        left = sum(expected.values()) - expected[first.id]
        assert progress.hours_left == pytest.approx(10 * left / 3600), "ten times slower"
        assert progress.line.startswith("1/4 cells, best loss 3.500 nats (10k, ")
        assert "100MFLOP/s a worker" in progress.line
        progress.add(CellOutcome(second.id, None, error))
        out = Console(file=io.StringIO(), width=100)
        out.print(progress.table())
        text = out.file.getvalue()
        assert "3.500 1/2" in text and "1 failed" in text
        assert [line.split()[0] for line in text.splitlines()[1:]] == ["size", "10k"]
        for cell in trunks[1].cells:
            progress.add(finished(cell, 2.0, 1, 1.0))
        assert progress.failed == {second.id: error}
        assert progress.hours_left == pytest.approx(0, abs=1e-9)
    message = (
        f"cell {second.id[:8]} (10k, D={short(second.data)}, seed {second.seed}) failed: {error}"
    )
    assert message in (Path(run.folder) / "log.txt").read_text()


def test_numbers_are_short() -> None:
    numbers = {7: "7", 12_300: "12.3k", 4.2e6: "4.2M", 1.5e9: "1.5G", 2e13: "20T"}
    assert {number: short(number) for number in numbers} == numbers
    assert (duration(0.25), duration(2.04)) == ("15 min", "2.0 h")
