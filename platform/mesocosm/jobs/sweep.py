"""The sweep job: a grid of cells, trained on Ray Tune, into a table and its law.

A cell's record is in storage as soon as it is done, so that the same command run again, or one with
another grid, trains what is missing.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mesocosm.cluster import ray_session
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import fingerprint
from mesocosm.data.format.dataset import Dataset
from mesocosm.errors import ArtifactError, MesocosmError, UsageError
from mesocosm.runs import tracking
from mesocosm.scaling import cells
from mesocosm.scaling.cells import Record
from mesocosm.scaling.grid import SCHEMA, Cell, Grid, Trunk, lay_out, precision
from mesocosm.scaling.progress_table import Board, Nested, name, short
from mesocosm.scaling.sweep_config import SweepConfig, what
from mesocosm.scaling.trunk import Outcome, Work
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train import prepare
from mesocosm.train.engine import least_gib
from mesocosm.versions import VERSIONS

__all__ = ["SweepConfig", "plan", "run"]

TABLE, SUMMARY, LAW, PLOT = "table.csv", "summary.json", "law.json", "loss.svg"
PATIENCE = 900.0
"""Seconds for which trials may wait while none runs: nodes have left, and an autoscaler has had
time to bring others.
"""


def plan(config: SweepConfig) -> dict[str, Any]:
    """The cells, and what they would cost on `config.cluster`. Raises UsageError as `run` does
    before it starts.
    """
    grid = lay_out(config, *_given(config))
    done = set() if config.force else cells.finished(Storage(config.storage.root))
    missing = [cell for cell in grid.cells if cell.id not in done]
    trunks = grid.trunks(missing)
    to_run = {cell.id: trunk.ran(i) for trunk in trunks for i, cell in enumerate(trunk.cells)} | {
        cell.id: cell.steps for cell in missing if cell.large
    }
    expected, price = grid.expected(missing), grid.cluster.price_per_hour
    together, alone = grid.hours(missing), grid.hours(missing, alone=True)
    a_second = together * price / max(sum(expected.values()), 1e-9)
    rows = [
        {
            "cell": cell.id[:8],
            "size": cell.size,
            "params": cell.params,
            "total": cell.total_params,
            "data": cell.data,
            "unique": cell.unique,
            "epochs": round(cell.epochs, 2),
            "seed": cell.seed,
            "steps": cell.steps,
            "flops": cell.flops,
            "trunk": "a job" if cell.large else cell.trunk[:6],
            "steps to run": to_run.get(cell.id, 0),
            "worker hours": round(expected.get(cell.id, 0.0) / 3600, 4),
            "price": round(expected.get(cell.id, 0.0) * a_second, 4),
            "state": "finished" if cell.id in done else "to do",
        }
        for cell in grid.cells
    ]
    return {
        "sweep": f"laws/{_id(config, grid.dataset, grid.cluster)}",
        "datasets": ", ".join(grid.dataset.ids),
        "cluster": config.cluster,
        "precision": grid.precision,
        "cells": rows,
        "finished": f"{len(grid.cells) - len(missing)} of {len(grid.cells)} cells",
        "trunks": len(trunks),
        "steps": sum(to_run.values()),
        "steps without trunks": sum(cell.steps for cell in missing),
        "flops": (
            sum(trunk.flops for trunk in trunks) + sum(cell.flops for cell in missing if cell.large)
        ),
        "flops without trunks": sum(cell.flops for cell in missing),
        "memory_gib": round(_least_gib(config, grid, trunks), 2),
        "hours": round(together, 4),
        "hours without trunks": round(alone, 4),
        "price": f"{together * price:g} {grid.cluster.currency}",
        "price without trunks": f"{alone * price:g} {grid.cluster.currency}",
    }


def run(config: SweepConfig, run: tracking.Run) -> Artifact:
    """Train what is missing of the grid, and make its table. Raises UsageError before anything
    starts, MesocosmError naming the cells that failed after all others are done.
    """
    began = time.perf_counter()
    dataset, named = _given(config)
    id = _id(config, dataset, named)
    run.record(inputs={"datasets": dataset.ids}, artifact=f"laws/{id}")
    with run.making("laws", id, config) as artifact:
        if artifact is None:
            return _make(config, run, dataset, named, id, began)
        run.say(f"found {artifact.name}")
        return artifact


def _make(
    config: SweepConfig,
    run: tracking.Run,
    dataset: Dataset,
    named: ClusterConfig,
    id: str,
    began: float,
) -> Artifact:
    with (
        ThreadPoolExecutor(1) as beside
    ):  # Ray takes seconds to start, and counting FLOPs as many. Ray's daemons die with the thread that began them
        counted = beside.submit(lay_out, config, dataset, named)
        ray_session.ensure(config.ray)
        importlib.import_module("mesocosm.jobs.sweep_trial")
        grid = counted.result()
    done = set() if config.force else cells.finished(run.storage)
    found = {cell.id: cells.read(run.storage, cell.id) for cell in grid.cells if cell.id in done}
    missing = [cell for cell in grid.cells if cell.id not in found]
    if found:
        run.say(f"{len(found)} of {len(grid.cells)} cells were finished before")
    board, nested = Board(run, grid, found), Nested(run)
    for cell in grid.cells:
        if cell.id in found:
            nested.add(cell, found[cell.id], None)
    try:
        if missing:
            _train(config, run, grid, missing, board, nested)
        return _finished(config, run, grid, id, board, nested, len(found), began)
    finally:
        nested.close()


def _train(
    config: SweepConfig,
    run: tracking.Run,
    grid: Grid,
    missing: Sequence[Cell],
    board: Board,
    nested: Nested,
) -> None:
    """The small cells by trunks, then the large ones, each kind with the whole cluster to itself: a
    worker group that waits for CPUs which idle trials hold would wait for ever.
    """
    trunks, large = grid.trunks(missing), [cell for cell in missing if cell.large]
    lanes = min(config.concurrent, len(trunks))
    share = (
        1 / -(-lanes // grid.cluster.gpus) if lanes and grid.cluster.gpus else 0.0
    )  # so many fit on each
    ray_session.preflight(what=f"concurrent={config.concurrent}", cpus=lanes, gpus=share * lanes)
    if large:
        said = f"workers={config.workers} of a large cell, with one CPU for its driver,"
        ray_session.preflight(
            what=said, cpus=config.workers + 1, gpus=config.workers if grid.cluster.gpus else 0
        )
    by_id = {cell.id: cell for cell in grid.cells}
    heard: set[str] = set()

    def hear(outcome: Outcome) -> None:
        if (
            not heard
        ):  # once the trials are under way, what the end needs is imported: a second or two
            threading.Thread(
                target=importlib.import_module, args=("mesocosm.scaling.report",), daemon=True
            ).start()
        heard.add(outcome.cell)
        board.add(outcome)
        nested.add(by_id[outcome.cell], outcome.record, outcome.failed)

    def end(some: Iterable[Cell], lost: dict[str, str]) -> None:
        """Of those that a process which died had not told of, some may be in storage."""
        unheard = [cell for cell in some if cell.id not in heard]
        kept = cells.finished(run.storage) if unheard and not config.force else set()
        for cell in unheard:
            record = cells.read(run.storage, cell.id) if cell.id in kept else None
            why = lost.get(
                cell.id if cell.large else cell.trunk, "its process ended without a word"
            )
            hear(Outcome(cell.id, record, None if record else why))

    with board:
        if trunks:
            end(
                [cell for trunk in trunks for cell in trunk.cells],
                _small(config, run, grid, trunks, lanes, share, hear),
            )
        if large:
            end(large, _large(config, run, grid, large, hear))


def _small(
    config: SweepConfig,
    run: tracking.Run,
    grid: Grid,
    trunks: Sequence[Trunk],
    lanes: int,
    share: float,
    hear: Callable[[Outcome], None],
) -> dict[str, str]:
    from ray import tune

    from mesocosm.jobs.sweep_trial import TrunkTrial

    work = Work(
        run.storage.root,
        grid.dataset.ids,
        grid.codec.to_json(),
        {trunk.id: trunk for trunk in trunks},
        share > 0,
        config.force,
    )
    trial = tune.with_resources(
        tune.with_parameters(TrunkTrial, work=work),
        {"CPU": 1, "GPU": share} if share else {"CPU": 1},
    )
    return _tuned(trial, [trunk.id for trunk in trunks], lanes, run, "trunks", hear)


def _large(
    config: SweepConfig,
    run: tracking.Run,
    grid: Grid,
    large: Sequence[Cell],
    hear: Callable[[Outcome], None],
) -> dict[str, str]:
    from ray import tune

    from mesocosm.jobs.sweep_trial import large_trial

    jobs = {}
    for cell in large:
        job = config.pretraining(
            cell.size, cell.seed, cell.narrowed, cell.steps, cell.rise, cell.fall, grid.precision
        )
        job.force, job.train.workers, job.train.gpus_per_worker = (
            config.force,
            config.workers,
            1.0 if grid.cluster.gpus else 0.0,
        )
        jobs[cell.id] = (cell, job)
    have = ray_session.most()
    room = int(have["CPU"] // (config.workers + 1))
    if grid.cluster.gpus:
        room = min(room, int(have.get("GPU", 0) // config.workers))
    trial = tune.with_resources(large_trial(jobs, config.force), {"CPU": 1})
    return _tuned(trial, list(jobs), max(1, min(config.concurrent, room)), run, "large", hear)


def _tuned(
    trial: Any,
    ids: Sequence[str],
    lanes: int,
    run: tracking.Run,
    name: str,
    hear: Callable[[Outcome], None],
) -> dict[str, str]:
    """Run a trial an id, `lanes` at once; the errors of those that died, by id. Nothing that Tune
    writes is read again.
    """
    for variable, value in (
        ("RAY_AIR_NEW_OUTPUT", "0"),
        ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1"),
        ("TUNE_DISABLE_SIGINT_HANDLER", "1"),
        ("TUNE_GLOBAL_CHECKPOINT_S", "1000000"),
        (
            "TUNE_RESULT_BUFFER_LENGTH",
            "1000",
        ),  # a trial goes on without waiting for Tune to have read each short cell
        ("TUNE_RESULT_BUFFER_MIN_TIME_S", "5"),
        ("TUNE_PRINT_ALL_TRIAL_ERRORS", "0"),
        ("RAY_CHDIR_TO_TRIAL_DIR", "0"),
    ):
        os.environ.setdefault(variable, value)
    from ray import tune
    from ray.tune.execution import class_cache

    from mesocosm.jobs.sweep_trial import KEY

    # Tune (2.60) copies these of the driver's environment into its trials' runtime environment,
    # which Ray logs; nodes have credentials of their own.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
        name for name in list(class_cache.ENV_VARS_TO_PROPAGATE) if name.startswith("AWS_")
    )

    class Listener(tune.Callback):  # type: ignore[misc]
        ran = time.monotonic()

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if any(trial.status == "RUNNING" for trial in trials):
                self.ran = time.monotonic()
            elif time.monotonic() - self.ran > PATIENCE:
                waiting = sum(trial.status == "PENDING" for trial in trials)
                ray_session.stuck(
                    f"{waiting} of {len(ids)} {name} have waited {PATIENCE:.0f} s for {lanes} lanes"
                    " and none runs"
                )

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            told = result["outcome"]
            hear(Outcome(**told | {"record": told["record"] and Record(**told["record"])}))

        def __reduce__(self) -> tuple[Any, ...]:
            return (
                tune.Callback,
                (),
            )  # Tune pickles its callbacks for a resume that here is storage's

    filesystem, base = run.storage.arrow()
    folder = f"runs/tune/{run.id}-{name}"
    tuner = tune.Tuner(
        trial,
        param_space={KEY: tune.grid_search(list(ids))},
        tune_config=tune.TuneConfig(max_concurrent_trials=lanes, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"{run.id}-{name}",
            storage_path=f"{base}/runs/tune",
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[Listener()],
        ),
    )
    try:
        results = tuner.fit()
    finally:
        run.storage.remove(folder)
    ended = [
        results[i] for i in range(len(results))
    ]  # in the grid's order; of a trial that never answered, `config` is none or another's
    return {
        id: _last_line(trial.error)
        for id, trial in zip(ids, ended, strict=True)
        if trial.error is not None
    }


def _finished(
    config: SweepConfig,
    run: tracking.Run,
    grid: Grid,
    id: str,
    board: Board,
    nested: Nested,
    found: int,
    began: float,
) -> Artifact:
    """The artifact; raises MesocosmError where cells failed, with the table of the others in the
    run's folder.
    """
    records = list(board.records.values())
    cells.write_table(records, run.folder / TABLE)
    wall = time.perf_counter() - began
    lanes = min(config.concurrent, len({cell.trunk for cell in grid.cells}))
    summary = {
        "cells": len(grid.cells),
        "found": found,
        "failed": board.failed,
        "steps": {"run": board.steps, "without_trunks": board.alone},
        "seconds": {
            "wall": wall,
            "training": board.seconds,
            "bases": board.bases,
            "concurrent": lanes,
        },
        "outside_training": 1 - (board.seconds + board.bases) / (wall * lanes),
    }
    run.record(**{key: summary[key] for key in ("cells", "found", "seconds")})
    run.say(f"  {board.line}  [{wall:.1f} s, {board.seconds:.1f} s of training by {lanes} at once]")
    if board.failed:
        named = [
            f"{name(cell)}: {board.failed[cell.id]}"
            for cell in grid.cells
            if cell.id in board.failed
        ]
        table = run.folder / TABLE
        again = (
            f"run the same command again to try them again, or `mesocosm fit {table}` for a law of"
            " the others"
        )
        raise MesocosmError(
            f"{len(named)} of {len(grid.cells)} cells failed; {again}. {'; '.join(named)}"
        )
    meta = {
        "inputs": {"datasets": grid.dataset.ids},
        "config": what(config),
        "job": "sweep",
        "run": run.id,
        "codec": grid.codec.id,
        "cells": sorted(board.records),
    }

    def fill(folder: Path) -> None:
        cells.write_table(records, folder / TABLE)
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1))
        (folder / PLOT).write_text(_plot(records))
        _fit(folder, run, what(config))

    artifact = run.storage.make("laws", id, meta, fill, force=config.force)
    for path in sorted(artifact.path.iterdir()):
        if path.name != "COMMIT.json":
            run.artifact(path)
    return artifact


def _fit(folder: Path, run: tracking.Run, swept: dict[str, Any]) -> None:
    """The law of `folder`'s table, beside it; a table that cannot say one is kept without, and the
    run says why.
    """
    from mesocosm.scaling import fit, report
    from mesocosm.scaling.table import Table

    try:
        table = Table.read(folder / TABLE)
        law = fit.fit(table, command=f"mesocosm fit {TABLE} --out {LAW}", swept=swept)
    except UsageError as error:
        run.say(f"no law: {error}")
        return
    law.write(folder / LAW)
    (folder / LAW).with_suffix(".svg").write_text(report.draw(law, table))
    run.log(
        {f"law/{name}": value for name, value in law.params.items()}
        | {"law/a": law.optimal.a, "law/b": law.optimal.b}
    )
    if not run.quiet:
        for part in report.renderables(law):
            tracking.console.print(part)


def _least_gib(config: SweepConfig, grid: Grid, trunks: Sequence[Trunk]) -> float:
    """Of host memory, where the largest trunks train at once, or the largest large cell."""
    on_gpu = grid.cluster.gpus > 0
    at_once = sorted(
        (
            least_gib(trunk.cells[0].total_params, trunk.options, 1, on_gpu=on_gpu)
            for trunk in trunks
        ),
        reverse=True,
    )[: config.concurrent]
    options = config.training(1, 0, 1, grid.precision)
    large = [
        least_gib(cell.total_params, options, config.workers, on_gpu=on_gpu)
        for cell in grid.cells
        if cell.large
    ]
    return max(sum(at_once), *large, 0.0)


def _given(config: SweepConfig) -> tuple[Dataset, ClusterConfig]:
    """Raises UsageError where the config, the cluster or the datasets are not as they must be."""
    config.validate()
    named = cluster_spec.read(config.cluster)
    try:
        return prepare.open_datasets(Storage(config.storage.root), config.data.datasets), named
    except ArtifactError as error:
        raise UsageError(str(error)) from error


def _id(config: SweepConfig, dataset: Dataset, named: ClusterConfig) -> str:
    return fingerprint(
        "sweep",
        what(config),
        dataset.ids,
        precision(config, named),
        VERSIONS["pretrain"],
        VERSIONS["sweep"],
        SCHEMA,
    )


def _last_line(error: BaseException) -> str:
    """Of a trial's error: what Ray puts before our own sentence is left out."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return line.removeprefix("mesocosm.errors.MesocosmError: ")


def _plot(records: Iterable[Record]) -> str:
    """Loss against transitions, a line a size and U, the mean over seeds: SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    from mesocosm.plotting import STYLE, document

    lines: dict[tuple[int, str, int], dict[int, list[Record]]] = {}
    trunks: dict[tuple[int, str, int, int], list[Record]] = {}
    for record in records:
        trunks.setdefault((record.params, record.size, record.unique, record.seed), []).append(
            record
        )
    for (params, size, unique, _), some in trunks.items():
        for place, record in enumerate(
            sorted(some, key=lambda record: record.steps)
        ):  # a D may be a step more or less with another seed's U
            lines.setdefault((params, size, unique), {}).setdefault(place, []).append(record)
    several = len({unique for _, _, unique in lines}) > 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["viridis"].resampled(len(lines) + 1)
        for i, ((_, size, unique), by_place) in enumerate(sorted(lines.items())):
            points = sorted(
                (sum(r.data for r in some) / len(some), sum(r.loss for r in some) / len(some))
                for some in by_place.values()
            )
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                color=colours(i),
                label=f"{size}, U={short(unique)}" if several else size,
            )
        axes.set_xscale("log")
        axes.set_xlabel("transitions seen")
        axes.set_ylabel("nats a transition, validation, mean of seeds")
        axes.legend()
        return document(figure, "sweep")
