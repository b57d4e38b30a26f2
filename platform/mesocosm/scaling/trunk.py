"""Trunks and their branches, in one warm process. Imports no Ray.

The process keeps what all trunks share: the imports, a group of one rank, the open dataset, the
codec. A trunk's engine is made and destroyed; each cell's record is in storage when its branch has
been validated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mesocosm.data.loading.codec import Codec
from mesocosm.errors import MesocosmError
from mesocosm.scaling import cells
from mesocosm.scaling.cells import Record
from mesocosm.scaling.grid import Cell, Trunk
from mesocosm.store.artifacts import Storage
from mesocosm.train import engine, prepare
from mesocosm.train.engine import Rank
from mesocosm.train.schedule import factor
from mesocosm.train.training import Diverged, Training


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    cell: str
    record: Record | None
    """None: it failed."""
    failed: str | None
    base_seconds: float = 0.0
    """Spent fitting the base, before the trunk's first cell."""


@dataclass(frozen=True)
class Work:
    """What the driver hands to every process: plain data."""

    root: str
    datasets: list[str]
    codec: dict[str, Any]
    trunks: dict[str, Trunk]
    gpu: bool
    force: bool


class Warm:
    """A process in which one trunk after the other is grown."""

    def __init__(self, work: Work):
        self.work = work
        self.storage = Storage(work.root)
        self.own = alone("cuda" if work.gpu else "cpu")
        self.dataset = prepare.open_datasets(self.storage, work.datasets)
        self.codec = Codec.from_json(work.codec)

    def grow(self, id: str) -> Iterator[Outcome]:
        """Train the cells of trunk `id`, and keep their records. A cell that cannot be trained, or
        kept, is an outcome, and so are those that it spoils. Raises MesocosmError, one line, for
        whatever else goes wrong: the process (a CUDA context) is not to be trusted with another
        trunk.
        """
        trunk = self.work.trunks[id]
        left = list(trunk.cells)
        try:
            dataset = prepare.narrowed(self.dataset, trunk.unique, trunk.seed)
            base, spent = cells.base(self.storage, dataset, self.codec, trunk.model, trunk.seed)
            training, _ = Training.start(
                dataset, self.codec, trunk.model, trunk.options, trunk.seed, self.own, lambda: base
            )
            try:
                for cell, grown in zip(trunk.cells, branches(training, trunk.cells), strict=True):
                    record, trouble = None, grown.trouble
                    if trouble is None:
                        made = Record.of(cell, grown.measured, seconds=grown.seconds, ran=grown.ran)
                        try:
                            record = cells.keep(self.storage, made, force=self.work.force)
                        except Exception as error:  # of this cell alone: the trunk goes on
                            trouble = f"its record could not be kept: {said(error)}"
                    left.remove(cell)
                    yield Outcome(cell.id, record, trouble, spent)
                    spent = 0.0
            finally:
                training.engine.destroy()
        except MesocosmError as error:
            for cell in left:
                yield Outcome(cell.id, None, said(error))
        except Exception as error:
            raise MesocosmError(said(error)) from error


def said(error: Exception) -> str:
    """One line."""
    text = str(error) if isinstance(error, MesocosmError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


@dataclass(frozen=True)
class Grown:
    measured: dict[str, float]
    """`Training.validate`, empty where there was `trouble`."""
    seconds: float
    ran: int
    trouble: str | None


def branches(training: Training, leaves: Sequence[Cell]) -> Iterator[Grown]:
    """Train the trunk, and at each cell's fork its decay, to the cell's last step; `leaves` ascend
    in steps. A branch that diverges spoils itself, a trunk that does all that are left.
    """
    at = 0
    for leaf, following in zip(leaves, [*leaves[1:], None], strict=True):
        began, before = time.perf_counter(), at
        try:
            while at < leaf.fork:
                training.step(at + 1, factor(at + 1, leaf.steps, leaf.rise, leaf.fall), last=False)
                at += 1
        except Diverged as trouble:
            for lost in leaves[leaves.index(leaf) :]:
                yield Grown(
                    {},
                    time.perf_counter() - began,
                    at + 1 - before,
                    f"{trouble}, before cell {lost.id[:8]} decays",
                )
            return
        if following is None:
            yield _decayed(training, leaf, began, before)
            return
        with training.fork():
            grown = _decayed(training, leaf, began, before)
        yield grown


def _decayed(training: Training, leaf: Cell, began: float, before: int) -> Grown:
    """From the fork to the cell's end. `began` and `before`: when, and after which step, the
    trunk's last cell was done.
    """
    number = leaf.fork
    try:
        for number in range(leaf.fork + 1, leaf.steps + 1):
            training.step(
                number, factor(number, leaf.steps, leaf.rise, leaf.fall), last=number == leaf.steps
            )
        measured = training.validate()
        trouble = training.watch.check(leaf.steps, validation_loss=measured["valid/loss"])
    except Diverged as error:
        measured, trouble = {}, str(error)
    return Grown(measured, time.perf_counter() - began, number - before, trouble)


def alone(device: str) -> Rank:
    """A group of this process only, made once; one thread on the CPU."""
    if device == "cpu":
        torch.set_num_threads(1)
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        engine.import_deepspeed()
        backend = "nccl" if device == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=0, world_size=1, store=store)
    return Rank(0, 0, 1, torch.device(device))
