"""What people see of a running sweep: a live table where there is a terminal, lines where there is
none. And what MLflow sees: a nested run a cell.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError
from mesocosm.runs.tracking import Run, console
from mesocosm.scaling.cells import Record
from mesocosm.scaling.grid import Cell, Grid
from mesocosm.scaling.trunk import Outcome, said

EVERY = 15.0
"""Seconds between lines where there is no terminal."""
PATIENCE = 60.0
"""Seconds that the end waits for MLflow to take the cells."""


def short(number: float) -> str:
    """12300 -> 12.3k."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def hours(value: float) -> str:
    return f"{value:.1f} h" if value >= 1 else f"{value * 60:.0f} min"


class Board:
    """Told of each cell that is done."""

    def __init__(self, run: Run, grid: Grid, found: dict[str, Record]):
        self._run, self._grid = run, grid
        self._cells = {cell.id: cell for cell in grid.cells}
        self.records = dict(found)
        self.failed: dict[str, str] = {}
        self.seconds = self.bases = 0.0
        """Training and validating, and fitting bases, in this run, of all workers."""
        self.steps = self.alone = 0
        """That were run, and that the same cells would have taken without trunks."""
        self._flops = 0.0
        self._expected = grid.expected(cell for cell in grid.cells if cell.id not in found)
        self._of_done = 0.0
        self._printed = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if not self._run.quiet and console.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=console, transient=True, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, outcome: Outcome) -> None:
        """A cell is done or has failed."""
        cell = self._cells[outcome.cell]
        self.bases += outcome.base_seconds
        if outcome.record is None:
            self.failed[cell.id] = outcome.failed or "for no reason that was given"
            self._run.say(f"cell {name(cell)} failed: {self.failed[cell.id]}")
        else:
            self.records[cell.id] = outcome.record
            self.seconds += outcome.record.seconds * self._grid.workers(cell)
            self.steps += outcome.record.ran
            self.alone += cell.steps
            self._flops += cell.flops / cell.steps * outcome.record.ran
            self._of_done += self._expected[cell.id]
            facts = {
                "sweep/cells": len(self.records),
                "sweep/loss": outcome.record.loss,
                "sweep/best_loss": self.best.loss,
            }
            self._run.log(facts, step=len(self.records))
        if self._live is None and not self._run.quiet and time.monotonic() - self._printed > EVERY:
            self._printed = time.monotonic()
            console.print(f"  {self.line}")

    @property
    def best(self) -> Record:
        return min(list(self.records.values()), key=lambda record: record.loss)

    @property
    def line(self) -> str:
        told = [f"{len(self.records)}/{len(self._cells)} cells"]
        if self.failed:
            told.append(f"{len(self.failed)} failed")
        if self.records:
            told.append(
                f"best loss {self.best.loss:.3f} nats ({self.best.size}, {short(self.best.data)}"
                " transitions)"
            )
        if self.seconds:
            told.append(f"{short(self._flops / self.seconds)}FLOP/s a worker")
        if (left := self.hours_left) is not None:
            told.append(f"{hours(left)} left")
        return ", ".join(told)

    @property
    def hours_left(self) -> float | None:
        """The estimate for what is left, corrected by how the cells that were done compare with
        theirs; None before the first.
        """
        if not self._of_done:
            return None
        lanes = min(
            self._grid.config.concurrent,
            max(1, len({cell.trunk for cell in self._grid.cells if cell.id not in self.records})),
        )
        left = (
            sum(self._expected.values())
            - self._of_done
            - sum(self._expected[id] for id in self.failed)
        )
        return left * (self.seconds / self._of_done) / lanes / 3600

    def _table(self) -> RenderableType:
        config = self._grid.config.grid
        asked = sorted(config.data or config.flops)
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.add_column("size")
        for value in asked:
            table.add_column(f"{short(value)}{'' if config.data else 'FLOP'}", justify="right")
        by_place: dict[tuple[str, float], list[Cell]] = {}
        for cell in self._grid.cells:
            by_place.setdefault((cell.size, cell.asked), []).append(cell)
        for size in config.sizes:
            table.add_row(size, *(self._place(by_place[size, value]) for value in asked))
        return Group(Text(self.line), table)

    def _place(self, cells: list[Cell]) -> Text:
        losses = [self.records[cell.id].loss for cell in cells if cell.id in self.records]
        text = f"{sum(losses) / len(losses):.3f}" if losses else "-"
        failed = any(cell.id in self.failed for cell in cells)
        return Text(
            text if len(losses) in (0, len(cells)) else f"{text} {len(losses)}/{len(cells)}",
            style="red" if failed else "" if losses else "dim",
        )


def name(cell: Cell) -> str:
    """As it is called in sentences."""
    u = "" if cell.narrowed is None else f", U={short(cell.narrowed)}"
    return f"{cell.id[:8]} ({cell.size}, D={short(cell.data)}{u}, seed {cell.seed})"


@dataclass
class CellConfig(JobConfig):
    """A cell as its nested run shows it."""

    cell: str = ""
    trunk: str = ""
    family: str = ""
    size: str = ""
    data: int = 0
    unique: int = 0
    steps: int = 0
    lr: float = 0.0


class Nested:
    """Nested runs, made by a thread of their own: MLflow takes a tenth of a second a cell."""

    def __init__(self, run: Run):
        self._run = run
        self._lost = ""
        self._queue: queue.SimpleQueue[tuple[Cell, Record | None, str | None] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name="cells", daemon=True)
        self._thread.start()

    def add(self, cell: Cell, record: Record | None, failed: str | None) -> None:
        self._queue.put((cell, record, failed))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(PATIENCE)
        if self._lost:
            self._run.say(
                f"not every cell has a nested run in MLflow ({self._lost}); their records are in"
                " storage"
            )
        if self._thread.is_alive():
            self._run.say(
                "MLflow is slow: some cells have no nested run there; their records are in storage"
            )

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._make(*item)
            except MesocosmError:
                pass  # how a failed cell ends its run
            except Exception as error:
                self._lost = said(error)

    def _make(self, cell: Cell, record: Record | None, failed: str | None) -> None:
        where = self._run.config
        shown = {
            "cell": cell.id,
            "trunk": cell.trunk,
            "family": cell.what["family"],
            "size": cell.size,
            "data": cell.data,
            "unique": cell.unique,
        }
        config = CellConfig(
            seed=cell.seed,
            storage=where.storage,
            tracking=where.tracking,
            steps=cell.steps,
            lr=cell.lr,
            **shown,
        )
        with self._run.child("cell", config, id=f"{self._run.id}-{cell.id[:8]}") as child:
            if record is None:
                raise MesocosmError(failed or "no result")
            counted = {
                key: getattr(record, key)
                for key in ("params", "data", "unique", "flops", "seconds")
            }
            child.log(
                {"loss": record.loss}
                | {f"valid/{part}": value for part, value in record.parts.items()}
                | counted,
                step=record.steps,
            )
            child.record(cell=f"{record.cell}", world=record.world)
