"""Trials on Ray Tune: a trunk of small cells in a process that is used again, or a large cell as a
pretrain job. A cell that fails has no record; `jobs.sweep` trains such cells when it runs again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ray import tune

from mesocosm import compat
from mesocosm.cluster import ray_session
from mesocosm.runs import tracking
from mesocosm.runs.tracking import Run
from mesocosm.scaling.cells import CellRecord, save_record
from mesocosm.scaling.grid import Cell
from mesocosm.scaling.trunk import CellOutcome, TrunkWork, TrunkWorker, error_line
from mesocosm.store.artifacts import Storage
from mesocosm.train import pretrain
from mesocosm.train.config import PretrainConfig

KEY = "id"
"""A trial's config holds the id of its trunk, or of its large cell."""
PATIENCE = 900.0
"""Seconds that trials may wait while none runs: nodes have left, and an autoscaler needs time to
start others.
"""
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    # A trial does not wait for Tune to read each short cell.
    "TUNE_RESULT_BUFFER_LENGTH": "1000",
    "TUNE_RESULT_BUFFER_MIN_TIME_S": "5",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

Report = Callable[[CellOutcome], None]


class TrunkTrial(tune.Trainable):  # type: ignore[misc]
    """Trains a trunk: a result for each cell, done after the last."""

    def setup(self, config: dict[str, Any], work: TrunkWork | None = None) -> None:
        assert work is not None
        self._worker = TrunkWorker(work)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._left = len(self._worker.work.trunks[new_config[KEY]].cells)
        self._outcomes: Iterator[CellOutcome] = self._worker.train(new_config[KEY])
        return True

    def step(self) -> dict[str, Any]:
        outcome = next(self._outcomes)
        self._left -= 1
        if not self._left:
            next(self._outcomes, None)  # destroys the engine
        return {"outcome": asdict(outcome), "done": not self._left}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: storage has the finished cells."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""


def large_trial(jobs: dict[str, tuple[Cell, PretrainConfig]]) -> Callable[[dict[str, Any]], None]:
    """A trial that drives the pretrain job of one large cell, and reports one result."""

    def drive(config: dict[str, Any]) -> None:
        cell, job = jobs[config[KEY]]
        try:
            outcome = CellOutcome(cell.id, _pretrained(cell, job), None)
        except Exception as error:
            outcome = CellOutcome(cell.id, None, error_line(error))
        tune.report({"outcome": asdict(outcome)})

    return drive


def _pretrained(cell: Cell, job: PretrainConfig) -> CellRecord:
    with tracking.start("pretrain", job, quiet=True) as run:
        world = pretrain.JOB.run(job, run)
    metrics, seconds = world.meta["metrics"], world.meta["seconds"]
    record = CellRecord.of(cell, metrics, seconds=seconds, ran=cell.steps, world=world.name)
    return save_record(Storage(job.storage.root), record, force=job.force)


class _Listener(tune.Callback):  # type: ignore[misc]
    """Reports outcomes, and ends a sweep whose trials cannot run."""

    def __init__(self, name: str, count: int, at_once: int, report: Report):
        self.name, self.count, self.at_once, self.report = name, count, at_once, report
        self.ran = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if any(trial.status == "RUNNING" for trial in trials):
            self.ran = time.monotonic()
        elif time.monotonic() - self.ran > PATIENCE:
            waiting = sum(trial.status == "PENDING" for trial in trials)
            message = f"{waiting} of {self.count} {self.name} have waited {PATIENCE:.0f} s"
            ray_session.stuck(f"{message} for {self.at_once} slots and none runs")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        outcome = dict(result["outcome"])
        if outcome["record"] is not None:
            outcome["record"] = CellRecord(**outcome["record"])
        self.report(CellOutcome(**outcome))

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune pickles its callbacks to resume an experiment. Here storage does that.
        return tune.Callback, ()


def run_trials(
    trial: Any, ids: Sequence[str], at_once: int, run: Run, name: str, report: Report
) -> dict[str, str]:
    """Run a trial for each id. Nothing that Tune writes is read again.

    Args:
        trial: a Tune trainable with resources.
        ids: of trunks or large cells.
        at_once: the most trials that run at once.
        run: the sweep's run.
        name: what the trials are, in messages and folders.
        report: called with each cell's outcome.

    Returns:
        The errors of the trials that died, by id.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    compat.keep_aws_keys_from_trials()
    filesystem, base = run.storage.arrow()
    folder = f"{run.id}-{name}"
    tuner = tune.Tuner(
        trial,
        param_space={KEY: tune.grid_search(list(ids))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
        run_config=tune.RunConfig(
            name=folder,
            storage_path=f"{base}/runs/tune",
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_Listener(name, len(ids), at_once, report)],
        ),
    )
    try:
        results = tuner.fit()
    finally:
        run.storage.remove(f"runs/tune/{folder}")
    # Results are in the grid's order. A trial that never answered has no config, or another's.
    errors = {id: results[i].error for i, id in enumerate(ids)}
    return {id: _last_line(error) for id, error in errors.items() if error is not None}


def _last_line(error: BaseException) -> str:
    """The last line of a trial's error, without the class that Ray puts before our sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return line.removeprefix("mesocosm.errors.MesocosmError: ")
