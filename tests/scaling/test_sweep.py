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

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.jobs.sweep import JOB
from mesocosm.runs import tracking
from mesocosm.scaling import cells, trials
from mesocosm.scaling.cells import COLUMNS
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.scaling.trials import TrunkTrial
from mesocosm.store.artifacts import Artifact, Storage

pytestmark = pytest.mark.usefixtures("ray_local")
Make = Callable[..., Any]


def swept(config: SweepConfig) -> tuple[Artifact, tracking.Run]:
    with tracking.start("sweep", config, quiet=True) as job_run:
        return JOB.run(config, job_run), job_run


def table(artifact: Artifact) -> list[dict[str, str]]:
    with open(artifact.path / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, cart_root: Make, sweep_of: Make
) -> tuple[SweepConfig, Artifact, tracking.Run]:
    config = sweep_of(cart_root(tmp_path_factory.mktemp("whole")))
    return config, *swept(config)


def test_the_table_has_a_row_a_cell(
    whole: tuple[SweepConfig, Artifact, tracking.Run], golden: Any
) -> None:
    config, artifact, job_run = whole
    rows = table(artifact)
    planned = JOB.plan(config)["cells"]
    assert len(rows) == 4 and list(rows[0])[: len(COLUMNS)] == list(COLUMNS)
    assert [(int(row["params"]), int(row["data"]), int(row["flops"])) for row in rows] == [
        (row["params"], row["data"], row["flops"]) for row in planned
    ]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(
            sum(float(row[part]) for part in ("dynamics", "reward", "termination", "task"))
        )
    golden.check("sweep", {f"loss {i}": float(row["loss"]) for i, row in enumerate(rows)})
    assert len({row["trunk"] for row in rows}) == 2 and {row["state"] for row in planned} == {
        "finished"
    }
    summary = json.loads((artifact.path / "summary.json").read_text())
    assert (
        summary["steps"]["run"]
        < summary["steps"]["without_trunks"]
        == sum(row["steps"] for row in planned)
    )
    assert (
        0 < summary["seconds"]["training"] < 2 * summary["seconds"]["wall"]
        and (artifact.path / "loss.svg").exists()
    )
    assert (
        artifact.meta["inputs"] == {"datasets": ["cart"]}
        and job_run.storage.list("runs/tune") == []
    )


def test_mlflow_has_a_nested_run_a_cell(whole: tuple[SweepConfig, Artifact, tracking.Run]) -> None:
    config, artifact, job_run = whole
    client = MlflowClient(tracking_uri=tracking.uri_of(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    runs = {
        entry.data.tags["mesocosm.run"]: entry
        for entry in client.search_runs([experiment.experiment_id])
    }
    parent = runs[f"sweep/{job_run.id}"]
    losses = {row["cell"]: float(row["loss"]) for row in table(artifact)}
    nested = {
        entry.data.params["cell"]: entry for name, entry in runs.items() if name.startswith("cell/")
    }
    assert {cell: entry.data.metrics["loss"] for cell, entry in nested.items()} == losses
    assert all(
        entry.data.tags["mlflow.parentRunId"] == parent.info.run_id
        and entry.info.status == "FINISHED"
        for entry in nested.values()
    )
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        "table.csv",
        "loss.svg",
        "summary.json",
    }


def test_another_grid_trains_only_the_missing_cells(
    whole: tuple[SweepConfig, Artifact, tracking.Run], sweep_of: Make
) -> None:
    config, artifact, _ = whole
    root = config.storage.root
    assert swept(config)[0].id == artifact.id
    stamps = {path.name: path.stat().st_mtime_ns for path in Path(root, "cells/results").iterdir()}
    larger, job_run = swept(
        sweep_of(root, "grid.data=[300,450,600]", "grid.sizes=[10k]", "concurrent=1")
    )
    after = {path.name: path.stat().st_mtime_ns for path in Path(root, "cells/results").iterdir()}
    assert stamps.items() < after.items() and len(after) == len(stamps) + 1
    assert "2 of 3 cells were finished before" in (job_run.folder / "log.txt").read_text()
    before = {row["cell"]: row for row in table(artifact)}
    assert [row["cell"] in before for row in table(larger)] == [True, False, True]
    assert all(row == before[row["cell"]] for row in table(larger) if row["cell"] in before)


def test_failed_cells_are_named_and_tried_again(
    tmp_path: Path, cart_root: Make, sweep_of: Make
) -> None:
    """The trunk of U = 150 finds a damaged base, which is then mended."""
    root = cart_root(tmp_path)
    config = sweep_of(
        root, "grid.unique=[150,250]", "grid.sizes=[10k]", "grid.data=[300]", "concurrent=1"
    )
    config_of_one = sweep_of(
        root,
        "grid.unique=[150]",
        "grid.sizes=[10k]",
        "grid.data=[300]",
        "concurrent=1",
        "train.lr=1e-3",
    )
    swept(config_of_one)
    (base,) = Path(root, "cells/bases").iterdir()
    whole = base.read_bytes()
    base.write_bytes(whole[:100])
    with pytest.raises(
        MesocosmError,
        match=(
            r"1 of 2 cells failed; run the same command again .* \(10k, D=\d+, U=150, seed 0\):"
            r" SafetensorError"
        ),
    ) as error:
        swept(config)
    assert error.value.exit_code == 1 and len(cells.finished(Storage(root))) == 2
    folder = max(Path(root, "runs/sweep").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert (
        json.loads((folder / "status.json").read_text())["state"] == "failed"
        and len((folder / "table.csv").read_text().splitlines()) == 2
    )
    failed = [
        json.loads(path.read_text()) for path in Path(root, "runs/cell").glob("*/status.json")
    ]
    assert [status["error"].split(":")[0] for status in failed if status["state"] == "failed"] == [
        "SafetensorError"
    ]
    base.write_bytes(whole)
    assert len(table(swept(config)[0])) == 2


def test_a_process_that_dies_before_its_first_result(
    whole: tuple[SweepConfig, Artifact, tracking.Run],
) -> None:
    """Tune keeps no config of such a trial."""
    from ray import tune

    class Dies(TrunkTrial):
        def setup(self, config: dict[str, Any], work: Any = None) -> None:
            if config["id"] == "b":
                raise RuntimeError("no such device")

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return new_config["id"] != "b"

        def step(self) -> dict[str, Any]:
            return {"outcome": {"cell": "a", "record": None, "failed": "as asked"}, "done": True}

    outcomes: list[Any] = []
    lost = trials.run_trials(
        tune.with_resources(Dies, {"CPU": 1}), ["a", "b", "c"], 3, whole[2], "dies", outcomes.append
    )
    assert set(lost) == {"b"}, lost
    assert len(outcomes) == 2


def test_credentials_are_in_no_runtime_environment(
    whole: tuple[SweepConfig, Artifact, tracking.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune would put the driver's there, and Ray logs it."""
    import ray
    from ray import tune

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")

    class Tells(TrunkTrial):
        def setup(self, config: dict[str, Any], work: Any = None) -> None:
            pass

        def step(self) -> dict[str, Any]:
            return {
                "outcome": {
                    "cell": "a",
                    "record": None,
                    "failed": str(dict(ray.get_runtime_context().runtime_env)),
                },
                "done": True,
            }

    outcomes: list[Any] = []
    trials.run_trials(
        tune.with_resources(Tells, {"CPU": 1}), ["a"], 1, whole[2], "tells", outcomes.append
    )
    assert "env_vars" in outcomes[0].failed and "planted" not in outcomes[0].failed


def test_trials_without_resources_do_not_wait_for_ever(
    whole: tuple[SweepConfig, Artifact, tracking.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nodes leave after the preflight."""
    from ray import tune

    monkeypatch.setattr(trials, "PATIENCE", 3.0)
    began = time.monotonic()
    with pytest.raises(
        MesocosmError,
        match=(
            r"2 of 2 trunks have waited 3 s for 2 slots and none runs: the cluster has .* CPUs"
            r" free.*run the same command again"
        ),
    ):
        trials.run_trials(
            tune.with_resources(lambda config: None, {"CPU": 1000}),
            ["a", "b"],
            2,
            whole[2],
            "trunks",
            print,
        )
    assert time.monotonic() - began < 60


def test_more_than_the_cluster_has_is_refused(
    tmp_path: Path, cart_root: Make, sweep_of: Make
) -> None:
    root = cart_root(tmp_path)
    with pytest.raises(UsageError, match=r"concurrent=6 asks for 6 CPUs and the cluster has 4"):
        swept(sweep_of(root, "concurrent=6", "grid.seeds=[0,1,2]"))
    with pytest.raises(
        UsageError, match=r"workers=4 of a large cell.* asks for 5 CPUs and the cluster has 4"
    ):
        swept(sweep_of(root, "large=1", "workers=4"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_large_cell_is_a_pretrain_job_with_the_same_result(
    whole: tuple[SweepConfig, Artifact, tracking.Run], sweep_of: Make
) -> None:
    config, artifact, _ = whole
    root = config.storage.root
    for workers, exact in ((1, True), (2, False)):
        small = {
            int(row["steps"]): float(row["loss"]) for row in table(artifact) if row["size"] == "10k"
        }
        options = (
            f"train.batch={8}",
            "grid.sizes=[10k]",
            "large=1",
            f"workers={workers}",
            "force=true",
        )
        larger, _ = swept(sweep_of(root, *options))
        for row in table(larger):
            record = cells.read_record(Storage(root), row["cell"])
            assert (
                record.world is not None
                and Storage(root).artifact("worlds", record.world).meta["counts"]["steps"]
                == record.steps
            )
            assert float(row["loss"]) == (
                small[int(row["steps"])]
                if exact
                else pytest.approx(small[int(row["steps"])], abs=1e-4)
            )


def _trials() -> list[int]:
    """The trial processes of this process's own Ray."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                (folder / "cmdline")
                .read_bytes()
                .startswith((b"ray::TrunkTrial", b"ray::ResourceTrainable"))
            ):
                raylet = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                if (
                    int(Path("/proc", raylet, "stat").read_text().rsplit(")", 1)[1].split()[1])
                    == os.getpid()
                ):
                    pids.append(int(folder.name))
        except OSError:
            continue
    return pids


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_fails_its_own_cells_only(
    tmp_path: Path, cart_root: Make, sweep_of: Make
) -> None:
    root = cart_root(tmp_path)
    config = sweep_of(root, "grid.data=[300,30000]", "concurrent=1")
    results = Path(root, "cells/results")

    def kill() -> None:
        while not (
            results.exists()
            and any(json.loads(path.read_text() or "{}") for path in results.glob("*.json"))
        ):  # whole, not begun
            time.sleep(0.02)
        for pid in _trials():
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(
        MesocosmError, match=r"1 of 4 cells failed.*\(30k, D=30k, seed 0\): .*\w"
    ) as error:
        swept(config)
    killer.join()
    assert "its process died" not in str(error.value), "Ray's own reason is given"
    assert len(cells.finished(Storage(root))) == 3
    assert len(table(swept(config)[0])) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_costs_no_finished_cell(
    tmp_path: Path,
    cart_root: Make,
    small: Sequence[str],
    whole: tuple[SweepConfig, Artifact, tracking.Run],
) -> None:
    """SIGKILL after the first record; the same command again trains the rest, and the losses are
    the undisturbed sweep's.
    """
    root = cart_root(tmp_path)
    results = Path(root, "cells/results")
    command = [
        sys.executable,
        "-m",
        "mesocosm.cli.main",
        "sweep",
        f"storage.root={root}",
        "data.datasets=[cart]",
        *small,
        "--json",
    ]
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 400
    while not (results.exists() and list(results.glob("*.json"))):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3.0)  # its Ray notices
    stamps = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert 1 <= len(stamps) < 4 and not Path(root, "laws").exists()
    summary = json.loads(
        subprocess.run(command, capture_output=True, check=True, timeout=400).stdout
    )
    assert summary["found"] == len(stamps)
    after = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert stamps.items() < after.items() and len(after) == 4
    losses = [
        [(row["cell"], row["loss"]) for row in table(artifact)]
        for artifact in (Storage(root).artifact("laws", summary["artifact"]), whole[1])
    ]
    assert losses[0] == losses[1]
