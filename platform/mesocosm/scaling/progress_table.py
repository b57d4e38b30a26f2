"""The progress of a running sweep: a live table on a terminal, lines elsewhere, and a nested MLflow
run for each cell.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError
from mesocosm.runs.tracking import Run, console
from mesocosm.scaling.cells import CellRecord
from mesocosm.scaling.forms import loss_unit
from mesocosm.scaling.grid import Cell, Grid, worker_seconds
from mesocosm.scaling.trunk import CellOutcome, error_line

EVERY = 15.0
"""Seconds between lines without a terminal."""
PATIENCE = 60.0
"""Seconds to wait at the end for MLflow to take the cells."""


def short(number: float) -> str:
    """12300 -> 12.3k."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def cell_text(cell: Cell) -> str:
    u = "" if cell.unique_limit is None else f", U={short(cell.unique_limit)}"
    return f"{cell.id[:8]} ({cell.size}, D={short(cell.data)}{u}, seed {cell.seed})"


class ProgressTable:
    """Counts and shows the finished and failed cells. A context manager."""

    def __init__(self, run: Run, grid: Grid, records: dict[str, CellRecord]):
        self._run, self._grid = run, grid
        self._cells = {cell.id: cell for cell in grid.cells}
        self.records, self.failed = dict(records), dict[str, str]()
        self.seconds = self.bases = 0.0
        """Worker seconds of this run: training and validating, and fitting bases."""
        self.steps = self.alone = 0
        """Steps that ran, and that the same cells would take without trunks."""
        self._flops = self._expected_done = 0.0
        self._expected = worker_seconds(grid.trunks(c for c in grid.cells if c.id not in records))
        self._printed = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> ProgressTable:
        if not self._run.quiet and console.is_terminal:
            self._live = Live(
                get_renderable=self.table, console=console, transient=True, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, outcome: CellOutcome) -> None:
        """Count a cell that finished or failed."""
        cell, record = self._cells[outcome.cell], outcome.record
        self.bases += outcome.base_seconds
        if record is None:
            self.failed[cell.id] = outcome.failed or "no reason was reported"
            self._run.say(f"cell {cell_text(cell)} failed: {self.failed[cell.id]}")
        else:
            self.records[cell.id] = record
            self.seconds += record.seconds * (self._grid.config.workers if cell.large else 1)
            self.steps += record.ran
            self.alone += cell.steps
            self._flops += cell.flops / cell.steps * record.ran
            self._expected_done += self._expected[cell.id]
            count, best = len(self.records), self.best.loss
            metrics = {"cells": count, "loss": record.loss, "best_loss": best}
            self._run.log({f"sweep/{name}": x for name, x in metrics.items()}, step=count)
        due = time.monotonic() - self._printed > EVERY
        if self._live is None and not self._run.quiet and due:
            self._printed = time.monotonic()
            console.print(f"  {self.line}")

    @property
    def best(self) -> CellRecord:
        return min(list(self.records.values()), key=lambda record: record.loss)

    @property
    def line(self) -> str:
        parts = [f"{len(self.records)}/{len(self._cells)} cells"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.records:
            cell = f"{self.best.size}, {short(self.best.data)} transitions"
            unit = loss_unit(self.best.family)
            parts.append(f"best loss {self.best.loss:.3f} {unit} ({cell})")
        if self.seconds:
            parts.append(f"{short(self._flops / self.seconds)}FLOP/s a worker")
        if (left := self.hours_left) is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    @property
    def hours_left(self) -> float | None:
        """The estimate for the other cells, scaled by how long the finished ones took. None before
        the first.
        """
        if not self._expected_done:
            return None
        trunks = {cell.trunk for cell in self._grid.cells if cell.id not in self.records}
        workers = min(self._grid.config.concurrent, max(1, len(trunks)))
        left = sum(self._expected.values()) - self._expected_done
        left -= sum(self._expected[id] for id in self.failed)
        return left * (self.seconds / self._expected_done) / workers / 3600

    def table(self) -> RenderableType:
        """The line above a table of mean losses by size and D (or C)."""
        config = self._grid.config.grid
        targets = sorted(config.data or config.flops)
        table = Table(box=None, pad_edge=False)
        table.add_column("size")
        for target in targets:
            unit = "" if config.data else "FLOP"
            table.add_column(f"{short(target)}{unit}", justify="right")
        for size in config.sizes:
            of_size = [cell for cell in self._grid.cells if cell.size == size]
            groups = ([cell for cell in of_size if cell.target == target] for target in targets)
            table.add_row(size, *map(self._loss, groups))
        return Group(Text(self.line), table)

    def _loss(self, cells: list[Cell]) -> Text:
        losses = [self.records[cell.id].loss for cell in cells if cell.id in self.records]
        text, style = "-", "dim"
        if losses:
            text, style = f"{sum(losses) / len(losses):.3f}", ""
            if len(losses) < len(cells):
                text += f" {len(losses)}/{len(cells)}"
        failed = any(cell.id in self.failed for cell in cells)
        return Text(text, style="red" if failed else style)


@dataclass
class CellConfig(JobConfig):
    """The parameters of a cell's nested run."""

    cell: str = ""
    trunk: str = ""
    family: str = ""
    size: str = ""
    data: int = 0
    unique: int = 0
    steps: int = 0
    lr: float = 0.0


class CellRuns:
    """Nested runs, made by a thread: MLflow takes a tenth of a second for each cell."""

    def __init__(self, run: Run):
        self._run, self._lost = run, ""
        self._queue: queue.SimpleQueue[tuple[Cell, CellRecord | None, str | None] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="cells", daemon=True)
        self._thread.start()

    def add(self, cell: Cell, record: CellRecord | None, failed: str | None) -> None:
        self._queue.put((cell, record, failed))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(PATIENCE)
        reason = "MLflow is slow" if self._thread.is_alive() else self._lost
        if reason:
            text = f"some cells have no nested run in MLflow ({reason})"
            self._run.say(f"{text}; their records are in storage")

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._make(*item)
            except MesocosmError:
                pass  # a failed cell, whose run has ended as failed
            except Exception as error:
                self._lost = error_line(error)

    def _make(self, cell: Cell, record: CellRecord | None, failed: str | None) -> None:
        parent, names = self._run, ("seed", "trunk", "size", "data", "unique", "steps", "lr")
        config = CellConfig(
            storage=parent.config.storage,
            tracking=parent.config.tracking,
            cell=cell.id,
            family=cell.identity["family"],
            **{name: getattr(cell, name) for name in names},
        )
        with parent.child("cell", config, id=f"{parent.id}-{cell.id[:8]}") as child:
            if record is None:
                raise MesocosmError(failed or "no result")
            values = ("loss", "params", "data", "unique", "flops", "seconds")
            metrics = {name: getattr(record, name) for name in values}
            metrics |= {f"valid/{part}": value for part, value in record.parts.items()}
            child.log(metrics, step=record.steps)
            child.record(cell=record.cell, world=record.world)
