"""The sweep job: a grid of cells, trained on Ray Tune, into a table and its law.

A cell's record is stored when the cell finishes. The same command again, or one with another grid,
trains the missing cells.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mesocosm.cluster import ray_session
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import fingerprint
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.job import Job, Plan, Resources
from mesocosm.runs.tracking import Run, console
from mesocosm.scaling import cells
from mesocosm.scaling.grid import SCHEMA, Cell, Grid, Trunk, lay_out, resolved_precision
from mesocosm.scaling.progress_table import CellRuns, ProgressTable, cell_text
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.scaling.trunk import CellOutcome, TrunkWork
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train import prepare
from mesocosm.versions import VERSIONS

TABLE, SUMMARY, LAW, PLOT = "table.csv", "summary.json", "law.json", "loss.svg"


@dataclass(frozen=True, kw_only=True)
class SweepPlan(Plan[SweepConfig]):
    dataset: Dataset
    cluster: ClusterConfig

    @cached_property
    def grid(self) -> Grid:
        """The cells and their work. Counting FLOPs takes seconds."""
        return lay_out(self.config, self.dataset, self.cluster)


class Sweep(Job[SweepConfig, SweepPlan]):
    """Train the missing cells of the grid, write its table, and fit its law.

    Raises:
        MesocosmError: Cells failed. It is raised after the others finish, and names them.
    """

    name, kind, config = "sweep", "laws", SweepConfig

    def resolve(self, config: SweepConfig, storage: Storage) -> SweepPlan:
        config.validate()
        cluster = cluster_spec.read(config.cluster)
        data = prepare.open_data(storage, config.data, config.model)
        config = replace(config, data=data.config)
        facts = config.table_identity()
        trained = facts, data.dataset.ids, resolved_precision(config, cluster)
        versions = VERSIONS["pretrain"], VERSIONS["sweep"]
        return SweepPlan(
            config=config,
            inputs=data.inputs,
            facts=facts,
            id=fingerprint("sweep", *trained, *versions, SCHEMA),
            dataset=data.dataset,
            cluster=cluster,
        )

    def summary(self, plan: SweepPlan) -> dict[str, Any]:
        """The cells, their hours and their price on the cluster."""
        storage = Storage(plan.config.storage.root)
        done = set() if plan.config.force else cells.finished(storage)
        return {"sweep": f"laws/{plan.id}"} | plan.grid.summary(done)

    def resources(self, plan: SweepPlan) -> Resources:
        small = plan.grid.trunks(cell for cell in plan.grid.cells if not cell.large)
        at_once = min(plan.config.concurrent, len(small))
        return {f"concurrent={plan.config.concurrent}": (at_once, 0)}

    def make(self, plan: SweepPlan, run: Run) -> Artifact:
        return _Sweep(self, plan, run).make()


class _Sweep:
    """A running sweep."""

    def __init__(self, job: Sweep, plan: SweepPlan, run: Run):
        self.began = time.perf_counter()
        self.job, self.plan, self.run = job, plan, run
        self.config = config = plan.config
        # Ray takes seconds to start, and so does counting FLOPs. Ray's daemons die with the thread
        # that starts them, so this thread starts them.
        with ThreadPoolExecutor(1) as thread:
            grid = thread.submit(lambda: plan.grid)
            ray_session.ensure(config.ray)
            importlib.import_module("mesocosm.scaling.trials")
            self.grid: Grid = grid.result()
        self.cells = {cell.id: cell for cell in self.grid.cells}
        done = set() if config.force else cells.finished(run.storage)
        self.finished = {id: cells.read_record(run.storage, id) for id in self.cells if id in done}
        if self.finished:
            run.say(f"{len(self.finished)} of {len(self.cells)} cells were finished before")
        self.progress, self.runs = ProgressTable(run, self.grid, self.finished), CellRuns(run)
        self.reported: set[str] = set()

    def make(self) -> Artifact:
        try:
            for cell in self.finished:
                self.runs.add(self.cells[cell], self.finished[cell], None)
            if missing := [cell for id, cell in self.cells.items() if id not in self.finished]:
                self.train(missing)
            return self.finish()
        finally:
            self.runs.close()

    def train(self, missing: Sequence[Cell]) -> None:
        """Train the small cells by trunks, then the large ones.

        Each kind uses the whole cluster: a worker group would wait forever for the CPUs of idle
        trials.
        """
        config, gpus = self.config, self.grid.cluster.gpus
        trunks = self.grid.trunks(missing)
        small, large = ([t for t in trunks if t.large == kind] for kind in (False, True))
        at_once = min(config.concurrent, len(small))
        share = 1 / -(-at_once // gpus) if at_once and gpus else 0.0  # trunks share each GPU
        key = f"concurrent={config.concurrent}"
        ray_session.preflight(key=key, cpus=at_once, gpus=share * at_once)
        if large:
            key = f"workers={config.workers} of a large cell, with one CPU for its driver,"
            workers = config.workers if gpus else 0
            ray_session.preflight(key=key, cpus=config.workers + 1, gpus=workers)
        with self.progress:
            if small:
                self.report_lost(small, self.train_trunks(small, at_once, share))
            if large:
                self.report_lost(large, self.train_large(large))

    def report(self, outcome: CellOutcome) -> None:
        if not self.reported:  # while trials run, import what the end needs: it takes seconds
            report = ("mesocosm.scaling.report",)
            threading.Thread(target=importlib.import_module, args=report, daemon=True).start()
        self.reported.add(outcome.cell)
        self.progress.add(outcome)
        self.runs.add(self.cells[outcome.cell], outcome.record, outcome.failed)

    def report_lost(self, trunks: Sequence[Trunk], errors: dict[str, str]) -> None:
        """Report the cells that a process did not report before it died. Some are in storage."""
        done = set() if self.config.force else cells.finished(self.run.storage)
        for trunk in trunks:
            for id in [cell.id for cell in trunk.cells if cell.id not in self.reported]:
                record = cells.read_record(self.run.storage, id) if id in done else None
                error = errors.get(trunk.id, "its process died")
                self.report(CellOutcome(id, record, None if record else error))

    def train_trunks(self, trunks: Sequence[Trunk], at_once: int, share: float) -> dict[str, str]:
        from ray import tune

        from mesocosm.scaling import trials

        root, force = self.run.storage.root, self.config.force
        work = TrunkWork.of(root, self.grid, trunks, gpu=share > 0, force=force)
        resources = {"CPU": 1.0} | ({"GPU": share} if share else {})
        trial = tune.with_parameters(trials.TrunkTrial, work=work)
        trial = tune.with_resources(trial, resources)
        return trials.run_trials(trial, list(work.trunks), at_once, self.run, "trunks", self.report)

    def train_large(self, trunks: Sequence[Trunk]) -> dict[str, str]:
        from ray import tune

        from mesocosm.scaling import trials

        config, gpus = self.config, self.grid.cluster.gpus
        jobs = {}
        for trunk in trunks:
            gpu = 1.0 if gpus else 0.0
            options = replace(trunk.options, workers=config.workers, gpus_per_worker=gpu)
            job = config.pretraining(trunk.model.size, trunk.seed, trunk.unique, options)
            jobs[trunk.id] = (trunk.cells[0], replace(job, force=config.force))
        free = ray_session.most()
        room = int(free["CPU"] // (config.workers + 1))
        if gpus:
            room = min(room, int(free.get("GPU", 0) // config.workers))
        at_once = max(1, min(config.concurrent, room))
        trial = tune.with_resources(trials.large_trial(jobs), {"CPU": 1})
        return trials.run_trials(trial, list(jobs), at_once, self.run, "large", self.report)

    def finish(self) -> Artifact:
        """Make the artifact. Raises MesocosmError where cells failed; the run's folder has the
        table of the others.
        """
        config, run, progress = self.config, self.run, self.progress
        records = list(progress.records.values())
        cells.write_table(records, run.folder / TABLE)
        wall = time.perf_counter() - self.began
        at_once = min(config.concurrent, len({cell.trunk for cell in self.grid.cells}))
        summary = {
            "cells": len(self.cells),
            "found": len(self.finished),
            "failed": progress.failed,
            "steps": {"run": progress.steps, "without_trunks": progress.alone},
            "seconds": {
                "wall": wall,
                "training": progress.seconds,
                "bases": progress.bases,
                "concurrent": at_once,
            },
            "outside_training": 1 - (progress.seconds + progress.bases) / (wall * at_once),
        }
        run.record(**{key: summary[key] for key in ("cells", "found", "seconds")})
        seconds = f"{wall:.1f} s, {progress.seconds:.1f} s of training by {at_once} at once"
        run.say(f"  {progress.line}  [{seconds}]")
        if failed := progress.failed:
            texts = [
                f"{cell_text(self.cells[id])}: {failed[id]}" for id in self.cells if id in failed
            ]
            fix = f"`mesocosm fit {run.folder / TABLE}` for a law of the others"
            message = f"{len(texts)} of {len(self.cells)} cells failed; run the same command again"
            raise MesocosmError(f"{message} to try them again, or {fix}. {'; '.join(texts)}")

        def fill(folder: Path) -> None:
            from mesocosm.scaling import sweep_figure

            cells.write_table(records, folder / TABLE)
            (folder / SUMMARY).write_text(json.dumps(summary, indent=1))
            (folder / PLOT).write_text(sweep_figure.figure(records))
            _fit(folder, run, self.plan.facts)

        meta = {"codec": self.grid.codec.id, "cells": sorted(progress.records)}
        artifact = self.job.commit(self.plan, run, fill, **meta)
        for path in sorted(artifact.path.iterdir()):
            if path.name != "COMMIT.json":
                run.artifact(path)
        return artifact


def _fit(folder: Path, run: Run, swept: dict[str, Any]) -> None:
    """Write the law of the folder's table, unless the table determines none."""
    from mesocosm.scaling import fit, report
    from mesocosm.scaling.table import CellTable

    try:
        table = CellTable.read(folder / TABLE)
        law = fit.fit(table, command=f"mesocosm fit {TABLE} --out {LAW}", swept=swept)
    except UsageError as error:
        run.say(f"no law: {error}")
        return
    law.write(folder / LAW)
    (folder / LAW).with_suffix(".svg").write_text(report.draw(law, table))
    values = law.params | {"a": law.optimal.a, "b": law.optimal.b}
    run.log({f"law/{name}": value for name, value in values.items()})
    if not run.quiet:
        for part in report.renderables(law):
            console.print(part)


JOB = Sweep()
