"""The sweep as a user runs it: Ray Tune, DeepSpeed, storage and MLflow are the real ones."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from ray import tune

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.jobs.sweep import JOB
from mesocosm.runs import tracking
from mesocosm.scaling import cells, trials
from mesocosm.scaling.cells import COLUMNS, RESULTS
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.scaling.trials import TrunkTrial
from mesocosm.store.artifacts import Artifact, Storage

pytestmark = pytest.mark.usefixtures("ray_local")
Make = Callable[..., Any]
Whole = tuple[SweepConfig, Artifact, tracking.Run]


def swept(config: SweepConfig) -> tuple[Artifact, tracking.Run]:
    with tracking.start("sweep", config, quiet=True) as job_run:
        return JOB.run(config, job_run), job_run


def table(artifact: Artifact) -> list[dict[str, str]]:
    with open(artifact.path / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cart_root: Make, sweep_of: Make) -> Whole:
    config = sweep_of(cart_root(tmp_path_factory.mktemp("whole")))
    return config, *swept(config)


def test_the_table_has_a_row_a_cell(whole: Whole, golden: Any) -> None:
    config, artifact, job_run = whole
    rows, planned = table(artifact), JOB.plan(config)["cells"]
    assert len(rows) == 4 and list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    for row, cell in zip(rows, planned, strict=True):
        assert cell["state"] == "finished"
        assert [int(row[x]) == cell[x] for x in ("params", "data", "flops")] == [True] * 3
        parts = (float(row[part]) for part in ("dynamics", "reward", "termination", "task"))
        assert float(row["loss"]) == pytest.approx(sum(parts))
    losses = {f"loss {i}": float(row["loss"]) for i, row in enumerate(rows)}
    golden.check("sweep", losses, tolerance=golden.TRAINED)
    assert len({row["trunk"] for row in rows}) == 2
    summary = json.loads((artifact.path / "summary.json").read_text())
    steps, seconds = summary["steps"], summary["seconds"]
    assert steps["run"] < steps["without_trunks"] == sum(row["steps"] for row in planned)
    assert 0 < seconds["training"] < 2 * seconds["wall"] and (artifact.path / "loss.svg").exists()
    assert artifact.meta["inputs"] == {"datasets": ["cart"]}
    assert job_run.storage.list("runs/tune") == []


def test_mlflow_has_a_nested_run_a_cell(whole: Whole) -> None:
    config, artifact, job_run = whole
    client = MlflowClient(tracking_uri=tracking.uri_of(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    entries = client.search_runs([experiment.experiment_id])
    runs = {entry.data.tags["mesocosm.run"]: entry for entry in entries}
    parent = runs[f"sweep/{job_run.id}"]
    nested = [entry for name, entry in runs.items() if name.startswith("cell/")]
    losses = {row["cell"]: float(row["loss"]) for row in table(artifact)}
    assert {e.data.params["cell"]: e.data.metrics["loss"] for e in nested} == losses
    for entry in nested:
        assert entry.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert entry.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"table.csv", "loss.svg", "summary.json"}


def stamps(root: str) -> dict[str, int]:
    """Records and the times when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(root, RESULTS).glob("*.json")}


def test_a_finished_sweep_trains_nothing(whole: Whole) -> None:
    config, artifact, _ = whole
    before = stamps(config.storage.root)
    assert swept(config)[0].id == artifact.id and stamps(config.storage.root) == before


@pytest.mark.slow
def test_another_grid_trains_only_the_missing_cells(whole: Whole, sweep_of: Make) -> None:
    config, artifact, _ = whole
    root = config.storage.root
    before = stamps(root)
    keys = ("grid.data=[300,450,600]", "grid.sizes=[10k]", "concurrent=1")
    larger, job_run = swept(sweep_of(root, *keys))
    after = stamps(root)
    assert before.items() < after.items() and len(after) == len(before) + 1
    assert "2 of 3 cells were finished before" in (job_run.folder / "log.txt").read_text()
    first, second, third = table(larger)
    rows = table(artifact)
    assert first in rows and second["cell"] not in {row["cell"] for row in rows} and third in rows


@pytest.mark.slow
def test_failed_cells_are_named_and_tried_again(
    tmp_path: Path, cart_root: Make, sweep_of: Make
) -> None:
    """The trunk of U = 150 reads a damaged base, which is then repaired."""
    root, keys = cart_root(tmp_path), ("grid.sizes=[10k]", "grid.data=[300]", "concurrent=1")
    config = sweep_of(root, "grid.unique=[150,250]", *keys)
    swept(sweep_of(root, "grid.unique=[150]", *keys, "train.lr=1e-3"))
    (base,) = Path(root, "cells/bases").iterdir()
    data = base.read_bytes()
    base.write_bytes(data[:100])
    message = r"1 of 2 cells failed; .* \(10k, D=\d+, U=150, seed 0\): SafetensorError"
    with pytest.raises(MesocosmError, match=message) as error:
        swept(config)
    assert error.value.exit_code == 1 and len(cells.finished(Storage(root))) == 2
    folder = max(Path(root, "runs/sweep").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert len((folder / "table.csv").read_text().splitlines()) == 2
    nested = Path(root, "runs/cell").glob("*/status.json")
    statuses = [json.loads(path.read_text()) for path in nested]
    (failed,) = (status for status in statuses if status["state"] == "failed")
    assert failed["error"].startswith("SafetensorError")
    base.write_bytes(data)
    assert len(table(swept(config)[0])) == 2


def outcome_of(text: str) -> dict[str, Any]:
    return {"outcome": {"cell": "a", "record": None, "failed": text}, "done": True}


def trials_of(trial: Any, ids: list[str], job_run: Any, cpus: int = 1) -> tuple[Any, list[Any]]:
    """(errors, outcomes) of trials that all run at once."""
    outcomes: list[Any] = []
    trial = tune.with_resources(trial, {"CPU": cpus})
    errors = trials.run_trials(trial, ids, len(ids), job_run, "trunks", outcomes.append)
    return errors, outcomes


@pytest.mark.slow
def test_a_process_that_dies_before_its_first_result(whole: Whole) -> None:
    """Tune stores no config of such a trial."""

    class FailingTrial(TrunkTrial):
        def setup(self, config: dict[str, Any], work: Any = None) -> None:
            if config["id"] == "b":
                raise RuntimeError("no such device")

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return new_config["id"] != "b"

        def step(self) -> dict[str, Any]:
            return outcome_of("as asked")

    errors, outcomes = trials_of(FailingTrial, ["a", "b", "c"], whole[2])
    assert set(errors) == {"b"} and len(outcomes) == 2


def test_credentials_are_in_no_runtime_environment(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune would put the driver's there, and Ray logs it."""
    import ray

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")

    class ReportingTrial(TrunkTrial):
        def setup(self, config: dict[str, Any], work: Any = None) -> None:
            pass

        def step(self) -> dict[str, Any]:
            return outcome_of(str(dict(ray.get_runtime_context().runtime_env)))

    _, (outcome,) = trials_of(ReportingTrial, ["a"], whole[2])
    assert "env_vars" in outcome.failed and "planted" not in outcome.failed


def test_trials_without_resources_do_not_wait_for_ever(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nodes leave after the preflight."""
    monkeypatch.setattr(trials, "PATIENCE", 3.0)
    began = time.monotonic()
    message = r"2 of 2 trunks have waited 3 s for 2 slots .* has .* CPUs free.*same command again"
    with pytest.raises(MesocosmError, match=message):
        trials_of(lambda config: None, ["a", "b"], whole[2], cpus=1000)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["concurrent=6", "grid.seeds=[0,1,2]"], "concurrent=6 asks for 6 CPUs .* has 4"),
        (["large=1", "workers=4"], "workers=4 of a large cell.* asks for 5 CPUs .* has 4"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    keys: list[str], message: str, tmp_path: Path, cart_root: Make, sweep_of: Make
) -> None:
    with pytest.raises(UsageError, match=message):
        swept(sweep_of(cart_root(tmp_path), *keys))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "tolerance"), [(1, 0.0), (2, 1e-4)])
def test_a_large_cell_is_a_pretrain_job_with_the_same_result(
    whole: Whole, sweep_of: Make, workers: int, tolerance: float
) -> None:
    config, artifact, _ = whole
    storage = Storage(config.storage.root)
    small = {row["steps"]: row["loss"] for row in table(artifact) if row["size"] == "10k"}
    options = ("grid.sizes=[10k]", "large=1", f"workers={workers}", "force=true")
    for row in table(swept(sweep_of(storage.root, *options))[0]):
        record = cells.read_record(storage, row["cell"])
        assert record.world is not None
        world = storage.artifact("worlds", record.world)
        assert world.meta["counts"]["steps"] == record.steps
        expected = float(small[row["steps"]])
        assert float(row["loss"]) == pytest.approx(expected, abs=tolerance, rel=0)


def _trial_processes() -> list[int]:
    """The trials of this process's Ray."""
    pids, names = [], (b"ray::TrunkTrial", b"ray::ResourceTrainable")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(names):
                raylet = _parent(folder)
                if int(_parent(Path("/proc", raylet))) == os.getpid():
                    pids.append(int(folder.name))
        except OSError:
            continue
    return pids


def _parent(process: Path) -> str:
    return (process / "stat").read_text().rsplit(")", 1)[1].split()[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_fails_only_its_cells(
    tmp_path: Path, cart_root: Make, sweep_of: Make
) -> None:
    root = cart_root(tmp_path)
    config = sweep_of(root, "grid.data=[300,30000]", "concurrent=1")

    def kill() -> None:
        while not any(path.read_text() for path in Path(root, RESULTS).glob("*.json")):
            time.sleep(0.02)
        for pid in _trial_processes():
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    message = r"1 of 4 cells failed.*\(30k, D=30k, seed 0\): .*\w"
    with pytest.raises(MesocosmError, match=message) as error:
        swept(config)
    killer.join()
    assert "its process died" not in str(error.value), "the message has Ray's reason"
    assert len(cells.finished(Storage(root))) == 3
    assert len(table(swept(config)[0])) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_costs_no_finished_cell(
    tmp_path: Path, cart_root: Make, small: Sequence[str], whole: Whole
) -> None:
    """SIGKILL after the first record; the same command again trains the rest, and the losses are
    the undisturbed sweep's.
    """
    root = cart_root(tmp_path)
    command = [
        sys.executable,
        "-m",
        "mesocosm.cli.main",
        "sweep",
        f"storage.root={root}",
        "tracking.uri=none",
    ]
    command += ["data.datasets=[cart]", *small, "--json"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen(command, **quiet, start_new_session=True)  # type: ignore[call-overload]
    deadline = time.monotonic() + 400
    while not stamps(root):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3.0)  # its Ray ends
    before = stamps(root)
    assert 1 <= len(before) < 4 and not Path(root, "laws").exists()
    done = subprocess.run(command, capture_output=True, check=True, timeout=400)
    summary, after = json.loads(done.stdout), stamps(root)
    assert summary["found"] == len(before)
    assert before.items() < after.items() and len(after) == 4
    resumed, undisturbed = (
        [(row["cell"], row["loss"]) for row in table(artifact)]
        for artifact in (Storage(root).artifact("laws", summary["artifact"]), whole[1])
    )
    assert resumed == undisturbed
