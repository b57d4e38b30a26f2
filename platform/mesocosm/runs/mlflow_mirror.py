"""MLflow as a mirror of run folders: a thread replays a run's metrics.jsonl, facts and files.
mlflow.json records what was delivered and mlflow.pending what remains, so that any process can
repeat the delivery. The only module that imports mlflow.
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

PENDING = "mlflow.pending"
NONE = "none"
"""The `tracking.uri` that leaves MLflow out"""
_MEMO = "mlflow.json"
_FLUSH_S = 2.0
_ENDED = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_lock = threading.RLock()


def uri_of(config: JobConfig) -> str:
    """The tracking URI, or a sqlite file under the root. It may hold a password: `redact` it."""
    storage = Storage(config.storage.root)
    return config.tracking.uri or f"sqlite:///{storage.local_path('mlflow.db')}"


def redact(text: str) -> str:
    """`text` without the user and password of the URLs in it."""
    return re.sub(r"(://)[^/\s'\"]+@", r"\1***@", text)


class Mirror:
    """Replays a run's folder into MLflow from a thread. With `tracking.uri=none` it only notes what
    a later job with another URI would deliver.
    """

    def __init__(self, folder: Path, config: JobConfig, name: str, note: Callable[[str], None]):
        self._folder, self._config, self._note = folder, config, note
        self._closing = threading.Event()
        self._warned = False
        self._queue: dict[str, list[Any]] = {"files": [], "worlds": []}
        self._save_queue()
        self._thread = threading.Thread(target=self._work, name=f"mlflow-{name}", daemon=True)
        if config.tracking.uri != NONE:
            self._thread.start()

    def add(self, queue: str, item: Any) -> None:
        """Queue a path of `files`, or an entry of `worlds` for the model registry."""
        self._queue[queue].append(item)
        self._save_queue()

    def _save_queue(self) -> None:
        write_whole(self._folder / PENDING, json.dumps(self._queue).encode())

    def close(self) -> None:
        """Deliver the rest, for at most 30 s."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=30)

    def _work(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(_FLUSH_S)
            try:
                deliver(self._folder, self._config)
            except Exception as error:
                if self._warned:
                    continue
                self._warned = True
                reason = f"{type(error).__name__}: {faults.first_line(error)}"
                problem = f"MLflow at {uri_of(self._config)} is away ({reason})"
                with suppress(OSError, StorageError):  # log.txt may be the unwritable file
                    self._note(f"{problem}; metrics.jsonl is kept and replayed later")


def deliver(folder: Path, config: JobConfig) -> None:
    """Bring the MLflow run of a run's folder up to date. It can be repeated."""
    with _lock:
        client = _client(config)
        status = json.loads((folder / "status.json").read_text())
        queue = read_json(folder / PENDING) or {"files": [], "worlds": []}
        memo = _read_memo(folder, config)
        if "run_id" not in memo:
            memo["run_id"] = _create_run(client, folder, status, config)
        run_id = memo["run_id"]
        try:
            metrics = folder / "metrics.jsonl"
            if metrics.exists():
                memo["offset"] = _replay_metrics(client, run_id, metrics, memo["offset"])
            for key, value in status["facts"].items():
                text = value if isinstance(value, str) else json.dumps(value, default=str)[:4000]
                client.set_tag(run_id, f"mesocosm.{key}", text)
            for name in queue["files"]:
                if name not in memo["files"] and Path(name).exists():
                    client.log_artifact(run_id, name)
                    memo["files"].append(name)
            for world in queue["worlds"]:
                if world["id"] not in memo["worlds"]:
                    _register(client, run_id, world)
                    memo["worlds"].append(world["id"])
            if status["state"] in _ENDED:
                for path in (folder / "config.yaml", folder / "log.txt"):
                    if path.exists():
                        client.log_artifact(run_id, str(path))
                client.set_terminated(run_id, status=_ENDED[status["state"]])
                (folder / PENDING).unlink(missing_ok=True)
        finally:
            write_whole(folder / _MEMO, json.dumps(memo).encode())


def _read_memo(folder: Path, config: JobConfig) -> dict[str, Any]:
    """The delivered part of a run. A memo that is torn, or of another MLflow, is ignored."""
    uri = redact(uri_of(config))
    memo = read_json(folder / _MEMO)
    if memo and memo.get("uri") == uri:
        return memo
    return {"uri": uri, "offset": 0, "files": [], "worlds": []}


def _client(config: JobConfig) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs the SQL of each error, which is also raised and explained here.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri_of(config), registry_uri=uri_of(config))


def ping(config: JobConfig) -> None:
    """Raise OSError when MLflow does not answer at the configured URI."""
    from mlflow.exceptions import MlflowException

    try:
        _client(config).search_experiments(max_results=1)
    except MlflowException as error:
        reason = faults.first_line(error)
        raise OSError(redact(f"MLflow at {uri_of(config)} does not answer: {reason}")) from error


def _create_run(client: Any, folder: Path, status: Mapping[str, Any], config: JobConfig) -> str:
    """The id of the MLflow run, found by its tag, or created with the frozen config as params."""
    from mlflow.entities import Param

    name = config.tracking.experiment
    if (experiment := client.get_experiment_by_name(name)) is not None:
        experiment_id = experiment.experiment_id
    else:
        location = Storage(config.storage.root).local_path("mlflow-artifacts").as_uri()
        experiment_id = client.create_experiment(
            name, artifact_location=None if config.tracking.uri else location
        )
    tags = {"mesocosm.run": f"{status['job']}/{status['id']}"}
    query = f"tags.`mesocosm.run` = '{tags['mesocosm.run']}'"
    if runs := client.search_runs([experiment_id], filter_string=query, max_results=1):
        return str(runs[0].info.run_id)
    if status["parent"]:
        parent = folder.parent.parent / status["parent"]
        if "run_id" not in _read_memo(parent, config):
            deliver(parent, config)
        tags["mlflow.parentRunId"] = _read_memo(parent, config)["run_id"]
    run_name = f"{status['job']}-{status['id'][-13:]}"
    run_id = str(client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)
    frozen = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    params = [Param(key, str(value)[:500]) for key, value in _flatten(frozen) if value is not None]
    for first in range(0, len(params), 100):
        client.log_batch(run_id, params=params[first : first + 100])
    return run_id


def _replay_metrics(client: Any, run_id: str, path: Path, offset: int) -> int:
    """Send the complete lines after `offset` and return the new offset."""
    from mlflow.entities import Metric

    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    batch = []
    for line in map(json.loads, data.splitlines()):
        stamp, step = int(line.pop("time") * 1000), line.pop("step") or 0
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        batch += [Metric(key, value, stamp, step) for key, value in numbers.items()]
    for first in range(0, len(batch), 500):
        client.log_batch(run_id, metrics=batch[first : first + 500])
    return offset + len(data)


def _register(client: Any, run_id: str, world: Mapping[str, str]) -> None:
    from mlflow.exceptions import MlflowException

    name, tags = world["name"], {"mesocosm.world": world["id"]}
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.create_model_version(name, world["source"], run_id=run_id, tags=tags)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}{key}.")
    else:
        yield prefix[:-1], value


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where it does not exist or cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
