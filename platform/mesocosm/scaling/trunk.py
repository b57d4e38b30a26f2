"""Train trunks and their branches in one warm process. Imports no Ray.

Trunks share the process's imports, its group of one rank, the open dataset and the codec. Each has
an engine. A cell's record is stored as soon as its branch is validated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from mesocosm.data.loading.codec import Codec
from mesocosm.errors import MesocosmError
from mesocosm.scaling import cells
from mesocosm.scaling.cells import CellRecord
from mesocosm.scaling.grid import Cell, Grid, Trunk
from mesocosm.store.artifacts import Storage
from mesocosm.train import engine, prepare
from mesocosm.train.engine import Rank
from mesocosm.train.rank_trainer import Diverged, RankTrainer
from mesocosm.train.schedule import factor
from mesocosm.train.text_rank_trainer import trainer_of


@dataclass(frozen=True)
class CellOutcome:
    """The result of a cell: a record, or the reason of its failure."""

    cell: str
    record: CellRecord | None
    failed: str | None
    base_seconds: float = 0.0
    """Time to fit the base, before the trunk's first cell."""


@dataclass(frozen=True)
class TrunkWork:
    """The message of the driver to every process: plain data."""

    root: str
    datasets: list[str]
    tokenizer: str | None
    codec: dict[str, Any]
    trunks: dict[str, Trunk]
    gpu: bool
    force: bool

    @staticmethod
    def of(root: str, grid: Grid, trunks: Sequence[Trunk], *, gpu: bool, force: bool) -> TrunkWork:
        """The message for trunks of a grid."""
        return TrunkWork(
            root=root,
            datasets=grid.dataset.ids,
            tokenizer=grid.config.data.tokenizer,
            codec=grid.codec.to_json(),
            trunks={trunk.id: trunk for trunk in trunks},
            gpu=gpu,
            force=force,
        )


class TrunkWorker:
    """A process that trains one trunk after the other."""

    def __init__(self, work: TrunkWork):
        self.work = work
        self.storage = Storage(work.root)
        self.rank = single_rank("cuda" if work.gpu else "cpu")
        self.dataset = prepare.open_datasets(self.storage, work.datasets, tokenizer=work.tokenizer)
        family = next(iter(work.trunks.values())).model.family
        self.codec = prepare.codec_from_json(work.codec, family)

    def train(self, id: str) -> Iterator[CellOutcome]:
        """Train the cells of trunk `id` and store their records.

        A cell that diverges or cannot be stored is a failed outcome, and so are the cells that
        depend on it.

        Raises:
            MesocosmError: anything else, in one line. The process (a CUDA context) must not train
                another trunk.
        """
        trunk = self.work.trunks[id]
        left = [cell.id for cell in trunk.cells]
        try:
            dataset = prepare.narrowed(self.dataset, trunk.unique, trunk.seed)
            base, seconds = None, 0.0
            if isinstance(self.codec, Codec):
                base, seconds = cells.fit_base(
                    self.storage, dataset, self.codec, trunk.model, trunk.seed
                )
            settings = trunk.model, trunk.options, trunk.seed, self.rank
            training, _ = trainer_of(self.codec).start(
                dataset, self.codec, *settings, None if base is None else lambda: base
            )
            try:
                for outcome in branches(training, trunk.cells):
                    left.remove(outcome.cell)
                    yield replace(self._stored(outcome), base_seconds=seconds)
                    seconds = 0.0
            finally:
                training.engine.destroy()
        except MesocosmError as error:
            for cell in left:
                yield CellOutcome(cell, None, error_line(error))
        except Exception as error:
            raise MesocosmError(error_line(error)) from error

    def _stored(self, outcome: CellOutcome) -> CellOutcome:
        if outcome.record is None:
            return outcome
        try:
            record = cells.save_record(self.storage, outcome.record, force=self.work.force)
            return replace(outcome, record=record)
        except Exception as error:  # this cell fails, the trunk continues
            text = f"its record could not be stored: {error_line(error)}"
            return CellOutcome(outcome.cell, None, text)


def error_line(error: Exception) -> str:
    text = str(error) if isinstance(error, MesocosmError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


def branches(training: RankTrainer, leaves: Sequence[Cell]) -> Iterator[CellOutcome]:
    """Train the trunk, and at each cell's fork its decay to the cell's last step.

    `leaves` ascend in steps. A branch that diverges fails alone. A trunk that diverges fails all
    cells that are left.
    """
    before = 0
    for i, cell in enumerate(leaves):
        began = time.perf_counter()
        try:
            for number in range(before + 1, cell.fork + 1):
                multiplier = factor(number, cell.steps, cell.warmup, cell.decay)
                training.step(number, multiplier, last=False)
        except Diverged as error:
            for lost in leaves[i:]:
                text = f"{error}, before cell {lost.id[:8]} decays"
                yield CellOutcome(lost.id, None, text)
            return
        # The last branch is not undone.
        with nullcontext() if cell is leaves[-1] else training.fork():
            outcome = _decayed(training, cell, began, before)
        yield outcome
        before = cell.fork


def _decayed(training: RankTrainer, cell: Cell, began: float, before: int) -> CellOutcome:
    """Train from the fork to the cell's last step.

    `began` and `before` are the time and the trunk's step after the previous cell.
    """
    try:
        for number in range(cell.fork + 1, cell.steps + 1):
            multiplier = factor(number, cell.steps, cell.warmup, cell.decay)
            training.step(number, multiplier, last=number == cell.steps)
        metrics = training.validate()
        failed = training.watch.check(cell.steps, validation_loss=metrics["valid/loss"])
    except Diverged as error:
        failed = str(error)
    if failed is not None:
        return CellOutcome(cell.id, None, failed)
    seconds = time.perf_counter() - began
    record = CellRecord.of(cell, metrics, seconds=seconds, ran=cell.steps - before)
    return CellOutcome(cell.id, record, None)


def single_rank(device: str) -> Rank:
    """A process group of this process only, made once. It uses one thread on the CPU."""
    if device == "cpu":
        torch.set_num_threads(1)
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        engine.import_deepspeed()
        backend = "nccl" if device == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=0, world_size=1, store=store)
    return Rank(0, 0, 1, torch.device(device))
