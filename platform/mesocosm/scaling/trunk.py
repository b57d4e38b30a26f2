"""Train trunks and their branches in one warm process. Imports no Ray.

The process keeps what all trunks share: imports, a group of one rank, the open dataset, the codec.
Each trunk has its own engine. A cell's record is stored as soon as its branch is validated.
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
from mesocosm.scaling.cells import CellRecord
from mesocosm.scaling.grid import Cell, Trunk
from mesocosm.store.artifacts import Storage
from mesocosm.train import engine, prepare
from mesocosm.train.engine import Rank
from mesocosm.train.schedule import factor
from mesocosm.train.training import Diverged, RankTrainer


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
    codec: dict[str, Any]
    trunks: dict[str, Trunk]
    gpu: bool
    force: bool


class TrunkWorker:
    """A process that trains one trunk after the other."""

    def __init__(self, work: TrunkWork):
        self.work = work
        self.storage = Storage(work.root)
        self.rank = single_rank("cuda" if work.gpu else "cpu")
        self.dataset = prepare.open_datasets(self.storage, work.datasets)
        self.codec = Codec.from_json(work.codec)

    def train(self, id: str) -> Iterator[CellOutcome]:
        """Train the cells of trunk `id` and store their records.

        A cell that diverges or cannot be stored is a failed outcome, and so are the cells that
        depend on it.

        Raises:
            MesocosmError: anything else, in one line. The process (a CUDA context) must not train
                another trunk.
        """
        trunk = self.work.trunks[id]
        left = list(trunk.cells)
        try:
            dataset = prepare.narrowed(self.dataset, trunk.unique, trunk.seed)
            base, seconds = cells.fit_base(
                self.storage, dataset, self.codec, trunk.model, trunk.seed
            )
            training, _ = RankTrainer.start(
                dataset, self.codec, trunk.model, trunk.options, trunk.seed, self.rank, lambda: base
            )
            try:
                for cell, branch in zip(trunk.cells, branches(training, trunk.cells), strict=True):
                    record, failed = self._record(cell, branch)
                    left.remove(cell)
                    yield CellOutcome(cell.id, record, failed, seconds)
                    seconds = 0.0
            finally:
                training.engine.destroy()
        except MesocosmError as error:
            for cell in left:
                yield CellOutcome(cell.id, None, error_line(error))
        except Exception as error:
            raise MesocosmError(error_line(error)) from error

    def _record(self, cell: Cell, branch: Branch) -> tuple[CellRecord | None, str | None]:
        if branch.failed is not None:
            return None, branch.failed
        record = CellRecord.of(cell, branch.metrics, seconds=branch.seconds, ran=branch.ran)
        try:
            return cells.save_record(self.storage, record, force=self.work.force), None
        except Exception as error:  # this cell fails, the trunk continues
            return None, f"its record could not be stored: {error_line(error)}"


def error_line(error: Exception) -> str:
    text = str(error) if isinstance(error, MesocosmError) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


@dataclass(frozen=True)
class Branch:
    """A trained branch, or why it failed."""

    metrics: dict[str, float]
    """Metrics of `RankTrainer.validate`. Empty where it failed."""
    seconds: float
    ran: int
    failed: str | None


def branches(training: RankTrainer, leaves: Sequence[Cell]) -> Iterator[Branch]:
    """Train the trunk, and at each cell's fork its decay to the cell's last step.

    `leaves` ascend in steps. A branch that diverges fails alone. A trunk that diverges fails all
    cells that are left.
    """
    done = 0
    for i, leaf in enumerate(leaves):
        began, before = time.perf_counter(), done
        try:
            while done < leaf.fork:
                multiplier = factor(done + 1, leaf.steps, leaf.warmup, leaf.decay)
                training.step(done + 1, multiplier, last=False)
                done += 1
        except Diverged as error:
            for lost in leaves[i:]:
                seconds, failed = time.perf_counter() - began, f"{error}, before cell {lost.id[:8]}"
                yield Branch({}, seconds, done + 1 - before, f"{failed} decays")
            return
        if leaf is leaves[-1]:
            yield _decayed(training, leaf, began, before)
            return
        with training.fork():
            branch = _decayed(training, leaf, began, before)
        yield branch


def _decayed(training: RankTrainer, leaf: Cell, began: float, before: int) -> Branch:
    """Train from the fork to the cell's last step.

    `began` and `before` are the time and the trunk's step after the previous cell.
    """
    number, metrics = leaf.fork, dict[str, float]()
    try:
        for number in range(leaf.fork + 1, leaf.steps + 1):
            multiplier = factor(number, leaf.steps, leaf.warmup, leaf.decay)
            training.step(number, multiplier, last=number == leaf.steps)
        metrics = training.validate()
        failed = training.watch.check(leaf.steps, validation_loss=metrics["valid/loss"])
    except Diverged as error:
        failed = str(error)
    return Branch(metrics, time.perf_counter() - began, number - before, failed)


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
