"""The trials that Ray Tune runs: a trunk of small cells in a process that is used again, or a large
cell as a pretrain job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from ray import tune

from mesocosm.runs import tracking
from mesocosm.scaling import cells
from mesocosm.scaling.cells import Record
from mesocosm.scaling.grid import Cell
from mesocosm.scaling.trunk import Outcome, Warm, Work, said
from mesocosm.store.artifacts import Storage
from mesocosm.train import pretrain as pretraining
from mesocosm.train.config import PretrainConfig

KEY = "id"
"""Of a trial's config: the trunk, or the large cell."""


class TrunkTrial(tune.Trainable):  # type: ignore[misc]
    """A result a cell; done with the last."""

    def setup(self, config: dict[str, Any], work: Work | None = None) -> None:
        assert work is not None
        self._warm = Warm(work)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._left = len(self._warm.work.trunks[new_config[KEY]].cells)
        self._grown: Iterator[Outcome] = self._warm.grow(new_config[KEY])
        return True

    def step(self) -> dict[str, Any]:
        outcome = next(self._grown)
        self._left -= 1
        if not self._left:
            next(self._grown, None)  # ends the engine
        return {"outcome": asdict(outcome), "done": not self._left}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: storage has the finished cells."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""


def large_trial(
    jobs: dict[str, tuple[Cell, PretrainConfig]], force: bool
) -> Callable[[dict[str, Any]], None]:
    """A trial that drives the pretrain job of one large cell, and reports one result."""

    def drive(config: dict[str, Any]) -> None:
        cell, job = jobs[config[KEY]]
        began = time.perf_counter()
        try:
            outcome = Outcome(cell.id, _pretrained(cell, job, force), None)
        except Exception as error:
            outcome = Outcome(cell.id, None, said(error))
        tune.report({"outcome": asdict(outcome), "seconds": time.perf_counter() - began})

    return drive


def _pretrained(cell: Cell, job: PretrainConfig, force: bool) -> Record:
    with tracking.start("pretrain", job, quiet=True) as run:
        world = pretraining.run(job, run)
    record = Record.of(
        cell, world.meta["metrics"], seconds=world.meta["seconds"], ran=cell.steps, world=world.name
    )
    return cells.keep(Storage(job.storage.root), record, force=force)
