"""MLflow as a mirror of runs' folders. The only module that imports mlflow.

A thread replays a run's metrics.jsonl, tags and files into MLflow; what it delivered is remembered
in mlflow.json, what is left to deliver in mlflow.pending, so that delivery can be repeated, also by
another process (`tracking.replay_pending`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mesocosm import faults
from mesocosm.config import JobConfig
from mesocosm.errors import StorageError
from mesocosm.store.artifacts import Storage
from mesocosm.store.files import write_whole

_FLUSH_SECONDS = 2.0
PENDING = "mlflow.pending"
_MEMO = "mlflow.json"
_ENDED = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_mlflow_lock = threading.RLock()


def uri_of(config: JobConfig) -> str:
    """The MLflow tracking URI: the configured one, or a sqlite file under the root. Only `redact`ed
    is it written or said.
    """
    return (
        config.tracking.uri or f"sqlite:///{Storage(config.storage.root).local_path('mlflow.db')}"
    )


def redact(text: str) -> str:
    """`text` without the user and password of the URLs in it."""
    return re.sub(r"(://)[^/\s'\"]+@", r"\1***@", text)


class Mirror:
    """Replays a run's folder into MLflow from a thread. What it could not deliver stays marked by
    `mlflow.pending`.
    """

    def __init__(self, folder: Path, config: JobConfig, name: str, note: Callable[[str], None]):
        self.folder, self.config, self.note = folder, config, note
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._warned = False
        self._queue: dict[str, list[Any]] = {"files": [], "worlds": []}
        self._save_queue()
        self._thread = threading.Thread(target=self._work, name=f"mlflow-{name}", daemon=True)
        self._thread.start()

    def add(self, queue: str, item: Any) -> None:
        self._queue[queue].append(item)
        self._save_queue()

    def _save_queue(self) -> None:
        write_whole(self.folder / PENDING, json.dumps(self._queue).encode())

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            self._wake.wait(_FLUSH_SECONDS)
            closing = self._closing.is_set()
            try:
                deliver(self.folder, self.config)
            except Exception as error:
                if not self._warned:
                    self._warned = True
                    why = f"{type(error).__name__}: {faults.first_line(error)}"
                    with suppress(OSError, StorageError):  # log.txt may be what cannot be written
                        uri = uri_of(self.config)
                        self.note(
                            f"MLflow at {uri} is away ({why}); metrics.jsonl is kept and replayed"
                            " later"
                        )
            if closing:
                return


def deliver(folder: Path, where: JobConfig) -> None:
    """Bring the MLflow mirror of the run in `folder` up to date. What was delivered is remembered
    in mlflow.json, so it can be repeated.
    """
    with _mlflow_lock:
        client = _client(where)
        status = json.loads((folder / "status.json").read_text())
        memo = memo_of(folder, where)
        queue = read_json(folder / PENDING) or {"files": [], "worlds": []}
        if "run_id" not in memo:
            memo["run_id"] = _create(client, folder, status, where)
        run_id = memo["run_id"]
        try:
            memo["offset"] = _replay_metrics(
                client, run_id, folder / "metrics.jsonl", memo["offset"]
            )
            facts = [
                (
                    f"mesocosm.{key}",
                    value if isinstance(value, str) else json.dumps(value, default=str)[:4000],
                )
                for key, value in status["facts"].items()
            ]
            for key, value in facts:
                client.set_tag(run_id, key, value)
            for name in queue["files"]:
                if name not in memo["files"] and Path(name).exists():
                    client.log_artifact(run_id, name)
                    memo["files"].append(name)
            for world in queue["worlds"]:
                if world["id"] not in memo["worlds"]:
                    _register(client, run_id, world)
                    memo["worlds"].append(world["id"])
            if status["state"] in _ENDED:
                for name in ("config.yaml", "log.txt"):
                    if (folder / name).exists():
                        client.log_artifact(run_id, str(folder / name))
                client.set_terminated(run_id, status=_ENDED[status["state"]])
                (folder / PENDING).unlink(missing_ok=True)
        finally:
            write_whole(folder / _MEMO, json.dumps(memo).encode())


def memo_of(folder: Path, where: JobConfig) -> dict[str, Any]:
    """What was delivered of the run in `folder`; a memo that cannot be read, or is of another
    MLflow, counts as none.
    """
    uri = redact(uri_of(where))
    memo = read_json(folder / _MEMO)
    return (
        memo
        if memo and memo.get("uri") == uri
        else {"uri": uri, "offset": 0, "files": [], "worlds": []}
    )


def _client(where: JobConfig) -> Any:
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "5"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_LOGGING_LEVEL", "WARNING"),
    ):
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs the SQL of each error, which is also raised and explained here.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri_of(where), registry_uri=uri_of(where))


def ping(where: JobConfig) -> None:
    """Raise OSError when MLflow does not answer at the configured URI."""
    from mlflow.exceptions import MlflowException

    try:
        _client(where).search_experiments(max_results=1)
    except MlflowException as error:
        why = f"MLflow at {uri_of(where)} does not answer: {faults.first_line(error)}"
        raise OSError(redact(why)) from error


def _create(client: Any, folder: Path, status: Mapping[str, Any], where: JobConfig) -> str:
    """The MLflow run that mirrors this one: found again by its tag, or created with the frozen
    config as its params.
    """
    name = where.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    location = (
        None
        if where.tracking.uri
        else Storage(where.storage.root).local_path("mlflow-artifacts").as_uri()
    )
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(name, artifact_location=location)
    )
    tag = f"{status['job']}/{status['id']}"
    found = client.search_runs(
        [experiment_id], filter_string=f"tags.`mesocosm.run` = '{tag}'", max_results=1
    )
    if found:
        return str(found[0].info.run_id)
    parent = None
    if status["parent"]:
        above = folder.parent.parent / status["parent"]
        if "run_id" not in memo_of(above, where):
            deliver(above, where)
        parent = memo_of(above, where).get("run_id")
    tags = {"mesocosm.run": tag, **({"mlflow.parentRunId": parent} if parent else {})}
    run_id = str(
        client.create_run(
            experiment_id, run_name=f"{status['job']}-{status['id'][-13:]}", tags=tags
        ).info.run_id
    )
    from mlflow.entities import Param

    frozen = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    params = [Param(key, str(value)[:500]) for key, value in _flatten(frozen) if value is not None]
    for first in range(0, len(params), 100):
        client.log_batch(run_id, params=params[first : first + 100])
    return run_id


def _replay_metrics(client: Any, run_id: str, path: Path, offset: int) -> int:
    """Send the whole lines after `offset` and return the new offset."""
    from mlflow.entities import Metric

    if not path.exists():
        return offset
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    batch: list[Any] = []
    for line in data.splitlines():
        entry = json.loads(line)
        stamp, step = int(entry.pop("time") * 1000), entry.pop("step") or 0
        batch += [
            Metric(key, value, stamp, step)
            for key, value in entry.items()
            if isinstance(value, int | float)
        ]
    for first in range(0, len(batch), 500):
        client.log_batch(run_id, metrics=batch[first : first + 500])
    return offset + len(data)


def _register(client: Any, run_id: str, world: Mapping[str, str]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(world["name"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.create_model_version(
        world["name"], world["source"], run_id=run_id, tags={"mesocosm.world": world["id"]}
    )


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}{key}.")
    else:
        yield prefix[:-1], value


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or one that cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
