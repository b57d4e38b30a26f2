"""Runs and their MLflow mirror, against a real sqlite MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import wait_until
from mlflow.tracking import MlflowClient

from mesocosm.config import JobConfig, StorageConfig, TrackingConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

AWAY = "http://127.0.0.1:9"
ELSEWHERE: dict[str, object] = {"uri": "http://elsewhere:5000", "run_id": "0123", "offset": 9}
ELSEWHERE |= {"files": [], "worlds": []}


def _config(root: str, uri: str | None = None) -> JobConfig:
    return JobConfig(storage=StorageConfig(root), tracking=TrackingConfig(uri=uri))


def _runs(config: JobConfig) -> dict[str, object]:
    client = MlflowClient(tracking_uri=tracking.uri_of(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {run.data.tags["mesocosm.run"]: run for run in runs}


def _runs_while_mlflow_is_away(root: str, *ids: str) -> JobConfig:
    """Runs of `collect` that log a metric; returns the config of an MLflow that answers."""
    for id in ids:
        with tracking.start("collect", _config(root, uri=AWAY), id=id, quiet=True) as run:
            run.log({"steps": 5}, step=2)
        assert (run.folder / "mlflow.pending").exists()
        assert "is away" in (run.folder / "log.txt").read_text()
    return _config(root)


def test_runs_are_mirrored_with_params_metrics_lineage_and_end(root: str) -> None:
    config = _config(root)
    with tracking.start("loop", config, id="outer", quiet=True) as run:
        run.log({"return": 1.5}, step=3)
        run.say("begun")
        run.record(artifact="worlds/abc")
        note = run.folder / "note.html"
        note.write_text("x")
        run.artifact(note)
        with run.child("collect", config, id="inner") as child:
            child.log({"steps": 7}, step=1)
        with pytest.raises(ZeroDivisionError), run.child("pretrain", config, id="bad"):
            1 / 0  # noqa: B018
        world = Storage(root).make("worlds", "w1", {}, lambda folder: None)
        tracking.register_world(run, world)
    runs = _runs(config)
    outer, inner, bad = runs["loop/outer"], runs["collect/inner"], runs["pretrain/bad"]
    statuses = [run.info.status for run in (outer, inner, bad)]
    assert statuses == ["FINISHED", "FINISHED", "FAILED"]
    assert inner.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert outer.data.metrics["return"] == 1.5 and inner.data.metrics["steps"] == 7
    assert outer.data.params["seed"] == "0" and outer.data.tags["mesocosm.artifact"] == "worlds/abc"
    client = MlflowClient(tracking_uri=tracking.uri_of(config))
    files = {file.path for file in client.list_artifacts(outer.info.run_id)}
    assert files >= {"note.html", "config.yaml", "log.txt"}
    versions = client.search_model_versions("name = 'mesocosm-world'")
    assert [v.source for v in versions] == [world.uri]
    status = json.loads(Storage(root).read("runs/pretrain/bad/status.json") or b"")
    assert status["state"] == "failed" and "division" in status["error"]


def test_mlflow_away_loses_nothing(root: str) -> None:
    back = _runs_while_mlflow_is_away(root, "a")
    assert tracking.replay_pending(back) == 1
    mirrored = _runs(back)["collect/a"]
    assert mirrored.data.metrics["steps"] == 5 and mirrored.info.status == "FINISHED"
    assert tracking.replay_pending(back) == 0


@pytest.mark.parametrize("memo", ["", json.dumps(ELSEWHERE)])
def test_a_memo_that_is_torn_or_of_another_server_begins_anew(root: str, memo: str) -> None:
    back = _runs_while_mlflow_is_away(root, "a", "b")
    (Path(root) / "runs" / "collect" / "a" / "mlflow.json").write_text(memo)
    assert tracking.replay_pending(back) == 2
    assert [_runs(back)[f"collect/{id}"].data.metrics["steps"] for id in "ab"] == [5, 5]


def test_one_bad_run_does_not_keep_the_others(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    back = _runs_while_mlflow_is_away(root, "a", "b")
    (Path(root) / "runs" / "collect" / "a" / "metrics.jsonl").write_text("not JSON\n")
    assert tracking.replay_pending(back) == 1
    assert "run collect/a could not be brought to MLflow" in capsys.readouterr().err
    assert "steps" in _runs(back)["collect/b"].data.metrics


def test_a_password_is_nowhere_written(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "http://alice:s3cr@t@127.0.0.1:9/x"
    config = _config(root, uri=uri)
    with pytest.raises(ValueError), tracking.start("collect", config, id="a") as run:
        run.say(f"tracking at {uri}")
        raise ValueError(f"cannot reach {uri}")
    tracking.replay_pending(config)
    with pytest.raises(OSError) as error:
        tracking.ping(config)
    written = "".join(path.read_text() for path in run.folder.iterdir())
    printed = capsys.readouterr()
    for text in (written, printed.out, printed.err, str(error.value)):
        assert "alice" not in text and "cr@t" not in text
    count = written.count("http://***@127.0.0.1:9/x")
    assert count >= 4, "in the config, the message, the error and the status"
    assert tracking.uri_of(config) == uri


def test_a_killed_run_is_failed_not_running(root: str) -> None:
    config = _config(root)
    with tracking.start("pretrain", config, id="k", quiet=True) as run:
        pass
    status = json.loads((run.folder / "status.json").read_text())
    status.update(state="running")
    status["owner"]["pid"] = 2**22 + 12345
    (run.folder / "status.json").write_text(json.dumps(status))
    (run.folder / "mlflow.pending").write_text('{"files": [], "worlds": []}')
    assert tracking.replay_pending(config) == 1
    assert _runs(config)["pretrain/k"].info.status == "FAILED"


def test_values_that_are_not_finite_stay_in_the_truth_only(root: str) -> None:
    config = _config(root)
    with tracking.start("pretrain", config, id="n", quiet=True) as run:
        run.log({"loss": float("nan"), "ok": 1.0}, step=0)
    line = json.loads((run.folder / "metrics.jsonl").read_text())
    assert line["loss"] == "nan"
    assert set(_runs(config)["pretrain/n"].data.metrics) == {"ok"}


def test_a_run_is_uploaded_to_a_remote_root_while_it_works(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage outage is retried, and the end of the run is uploaded last."""
    monkeypatch.setattr("mesocosm.runs.upload.EVERY", 0.05)
    storage = Storage(f"{s3}/shipped")
    written, outage = Storage.write, True

    def write(self: Storage, path: str, data: bytes) -> None:
        if outage and path.endswith("log.txt"):
            raise OSError("no route to host")
        written(self, path, data)

    def uploaded(name: str) -> bytes:
        return storage.read(f"runs/pretrain/k/{name}") or b""

    monkeypatch.setattr(Storage, "write", write)
    with tracking.start("pretrain", _config(storage.root), id="k", quiet=True) as run:
        run.say("it begins")
        run.log({"loss": 1.0}, step=1)
        with run.progress("steps", total=10) as update:
            update(3, "a third")
            wait_until(lambda: b"a third" in uploaded("status.json"))
        assert not uploaded("log.txt")
        outage = False
        wait_until(
            lambda: b"it begins" in uploaded("log.txt") and b"loss" in uploaded("metrics.jsonl")
        )
        status = json.loads(uploaded("status.json"))
        progress = {"what": "steps", "completed": 3, "total": 10, "note": "a third"}
        assert status["state"] == "running" and status["progress"] == progress
    assert json.loads(uploaded("status.json"))["state"] == "done"


def test_none_leaves_mlflow_out_until_a_later_job_delivers(root: str) -> None:
    with tracking.start("collect", _config(root, uri="none"), id="quiet", quiet=True) as run:
        run.log({"steps": 5}, step=2)
    assert tracking.replay_pending(_config(root, uri="none")) == 0
    assert not Storage(root).local_path("mlflow.db").exists()
    assert json.loads((run.folder / "status.json").read_text())["state"] == "done"
    config = _config(root)
    assert tracking.replay_pending(config) == 1 and set(_runs(config)) == {"collect/quiet"}
