"""Runs: what a job did, while it does it. The only module that imports mlflow.

    ROOT/runs/<job>/<id>/config.yaml     what was asked (as composed)
                        /status.json     running | done | failed | stopped, times, the error, recorded facts
                        /metrics.jsonl   the truth: one JSON object a line, {"time", "step", metric: value, ...}
                        /log.txt         what was said, and the traceback of a failure

MLflow is a mirror: a background thread replays metrics.jsonl into it, and what it could not deliver because MLflow was
away is delivered by the next run under the same root (`replay_pending`). No job waits for MLflow or fails with it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mesocosm.config import JobConfig, to_yaml
from mesocosm.errors import MesocosmError
from mesocosm.storage import Artifact, Storage

console = Console(highlight=False, soft_wrap=True, stderr=True)
"""Where people read: stderr, so that `--json` owns stdout."""

_FLUSH_SECONDS = 2.0


class Run:
    """One job's run. Made by `start`; safe to log to from several threads of the driver, never from Ray workers."""

    def __init__(self, job: str, id: str, config: JobConfig, parent: Run | None, quiet: bool):
        self.job, self.id, self.config, self.parent, self.quiet = job, id, config, parent, quiet
        self.storage = Storage(config.storage.root)
        if parent is None:
            self.storage.writable()
        self.folder: Path = self.storage.local_path("runs", job, id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._started = time.time()
        (self.folder / "config.yaml").write_text(redact(to_yaml(config)))
        self._status("running")
        self._mirror = _Mirror(self)

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run's id, once the mirror has reached MLflow."""
        return _memo(self.folder, self.config).get("run_id")

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line to metrics.jsonl. Values that are not finite are kept there as strings and not sent to MLflow."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "step": step}
        for name, value in metrics.items():
            number = float(value)
            line[name] = number if math.isfinite(number) else repr(number)
        with self._lock, open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def say(self, text: str) -> None:
        """One line to the console and to log.txt."""
        self._note(text)
        if not self.quiet:
            console.print(redact(text))

    def _note(self, text: str) -> None:
        with self._lock, open(self.folder / "log.txt", "a") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {redact(text)}\n")

    def record(self, **facts: Any) -> None:
        """Facts of the run (its artifact, its inputs, the ledger) into status.json and MLflow's tags."""
        self.facts.update(facts)
        self._status("running")

    def artifact(self, path: Path) -> None:
        """Attach a file to the MLflow run."""
        self._mirror.add("files", str(Path(path).absolute()))

    @contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Callable[[float, str], None]]:
        """A live line of progress: call the yielded function with (completed, note). Plain lines where there is no terminal."""
        began = time.monotonic()
        note, printed = "", began
        live: Progress | None = None
        if not self.quiet and console.is_terminal:
            live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<28}"),
                BarColumn(24),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            live.start()
            task = live.add_task(description, total=total, note="")

        def update(completed: float, text: str = "") -> None:
            nonlocal note, printed
            note = text
            if live is not None:
                live.update(task, completed=completed, note=text)
            elif not self.quiet and time.monotonic() - printed > 15:
                printed = time.monotonic()
                share = f" {completed:g}/{total:g}" if total else f" {completed:g}"
                console.print(f"  {description}{share}  {text}")

        try:
            yield update
        finally:
            if live is not None:
                live.stop()
        self.say(f"  {description:<28} {note}  [{time.monotonic() - began:.1f} s]")

    @contextmanager
    def child(self, job: str, config: JobConfig, *, id: str | None = None) -> Iterator[Run]:
        """A run nested under this one."""
        with start(job, config, id=id, parent=self, quiet=self.quiet) as run:
            yield run

    def _status(self, state: str, error: str | None = None) -> None:
        status = {
            "job": self.job,
            "id": self.id,
            "state": state,
            "parent": f"{self.parent.job}/{self.parent.id}" if self.parent else None,
            "started": self._started,
            "updated": time.time(),
            "pid": os.getpid(),
            "error": error and redact(error),
            "facts": self.facts,
        }
        with self._lock:
            _write(self.folder / "status.json", json.dumps(status, indent=1, default=str))

    def _end(self, state: str, error: str | None = None) -> None:
        self._status(state, error)
        self._mirror.close()
        if self.storage.remote:
            for path in self.folder.iterdir():
                if path.is_file():
                    self.storage.write(f"runs/{self.job}/{self.id}/{path.name}", path.read_bytes())


@contextmanager
def start(job: str, config: JobConfig, *, id: str | None = None, parent: Run | None = None, quiet: bool = False) -> Iterator[Run]:
    """Begin a run; however the block ends, the run's status says so (failed with the error, stopped on Ctrl-C)."""
    run = Run(job, id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}", config, parent, quiet)
    try:
        yield run
    except KeyboardInterrupt:
        run._end("stopped", "interrupted")
        raise
    except BaseException as error:
        run._note(traceback.format_exc())
        run._end("failed", str(error) if isinstance(error, MesocosmError) else f"{type(error).__name__}: {error}")
        raise
    run._end("done")


def uri_of(config: JobConfig) -> str:
    """The MLflow tracking URI: the configured one, or a sqlite file under the root. Only `redact`ed is it written or said."""
    return config.tracking.uri or f"sqlite:///{Storage(config.storage.root).local_path('mlflow.db')}"


def redact(text: str) -> str:
    """`text` without the user and password of the URLs in it."""
    return re.sub(r"(://)[^/\s'\"]+@", r"\1***@", text)


def register_world(run: Run, artifact: Artifact) -> None:
    """A version in MLflow's model registry that points at the world artifact. Queued: delivered when MLflow answers."""
    run._mirror.add("worlds", {"name": "mesocosm-world", "source": artifact.uri, "id": artifact.id})


class _Mirror:
    """Replays a run's folder into MLflow from a thread. What it could not deliver stays marked by `mlflow.pending`."""

    def __init__(self, run: Run):
        self.run = run
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._warned = False
        self._queue: dict[str, list[Any]] = {"files": [], "worlds": []}
        self._save_queue()
        self._thread = threading.Thread(target=self._work, name=f"mlflow-{run.job}", daemon=True)
        self._thread.start()

    def add(self, queue: str, item: Any) -> None:
        self._queue[queue].append(item)
        self._save_queue()

    def _save_queue(self) -> None:
        _write(self.run.folder / _PENDING, json.dumps(self._queue))

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            self._wake.wait(_FLUSH_SECONDS)
            closing = self._closing.is_set()
            try:
                _deliver(self.run.folder, self.run.config)
            except Exception as error:
                if not self._warned:
                    self._warned = True
                    self.run._note(f"MLflow at {uri_of(self.run.config)} is away ({type(error).__name__}: {error}); metrics.jsonl is kept and replayed later")
            if closing:
                return


_PENDING = "mlflow.pending"
_MEMO = "mlflow.json"
_ENDED = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_mlflow_lock = threading.RLock()


def _deliver(folder: Path, where: JobConfig) -> None:
    """Bring the MLflow mirror of the run in `folder` up to date. What was delivered is remembered in mlflow.json, so it can be repeated."""
    with _mlflow_lock:
        client = _client(where)
        status = json.loads((folder / "status.json").read_text())
        memo = _memo(folder, where)
        queue = _json(folder / _PENDING) or {"files": [], "worlds": []}
        if "run_id" not in memo:
            memo["run_id"] = _create(client, folder, status, where)
        run_id = memo["run_id"]
        try:
            memo["offset"] = _replay_metrics(client, run_id, folder / "metrics.jsonl", memo["offset"])
            facts = [(f"mesocosm.{key}", value if isinstance(value, str) else json.dumps(value, default=str)[:4000]) for key, value in status["facts"].items()]
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
                (folder / _PENDING).unlink(missing_ok=True)
        finally:
            _write(folder / _MEMO, json.dumps(memo))


def _memo(folder: Path, where: JobConfig) -> dict[str, Any]:
    """What was delivered of the run in `folder`; a memo that cannot be read, or is of another MLflow, counts as none."""
    uri = redact(uri_of(where))
    memo = _json(folder / _MEMO)
    return memo if memo and memo.get("uri") == uri else {"uri": uri, "offset": 0, "files": [], "worlds": []}


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
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri_of(where), registry_uri=uri_of(where))


def ping(where: JobConfig) -> None:
    """Raise OSError when MLflow does not answer at the configured URI."""
    from mlflow.exceptions import MlflowException

    try:
        _client(where).search_experiments(max_results=1)
    except MlflowException as error:
        raise OSError(redact(f"MLflow at {uri_of(where)} does not answer: {error}")) from error


def _create(client: Any, folder: Path, status: Mapping[str, Any], where: JobConfig) -> str:
    """The MLflow run that mirrors this one: found again by its tag, or created with the frozen config as its params."""
    name = where.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    location = None if where.tracking.uri else Storage(where.storage.root).local_path("mlflow-artifacts").as_uri()
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=location)
    tag = f"{status['job']}/{status['id']}"
    found = client.search_runs([experiment_id], filter_string=f"tags.`mesocosm.run` = '{tag}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    parent = None
    if status["parent"]:
        above = folder.parent.parent / status["parent"]
        if "run_id" not in _memo(above, where):
            _deliver(above, where)
        parent = _memo(above, where).get("run_id")
    tags = {"mesocosm.run": tag, **({"mlflow.parentRunId": parent} if parent else {})}
    run_id = str(client.create_run(experiment_id, run_name=f"{status['job']}-{status['id'][-13:]}", tags=tags).info.run_id)
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
        batch += [Metric(key, value, stamp, step) for key, value in entry.items() if isinstance(value, int | float)]
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
    client.create_model_version(world["name"], world["source"], run_id=run_id, tags={"mesocosm.world": world["id"]})


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}{key}.")
    else:
        yield prefix[:-1], value


def replay_pending(config: JobConfig) -> int:
    """Deliver to MLflow what earlier runs under this root could not; returns how many were brought up to date.

    A run that says running and whose process is gone crashed: it is marked failed first.
    """
    delivered = 0
    for mark in sorted(Storage(config.storage.root).local_path("runs").glob(f"*/*/{_PENDING}")):
        status = _json(mark.parent / "status.json")
        if status is None:
            continue
        if status["state"] == "running":
            if _alive(status["pid"]):
                continue
            status.update(state="failed", error="the process ended without a word (killed?)")
            _write(mark.parent / "status.json", json.dumps(status, indent=1))
        try:
            _deliver(mark.parent, config)
        except Exception as error:
            try:
                ping(config)
            except Exception as away:
                console.print(f"MLflow at {redact(uri_of(config))} is still away ({type(away).__name__}); metrics.jsonl is kept")
                break
            console.print(redact(f"run {status['job']}/{status['id']} could not be brought to MLflow ({error}); its metrics.jsonl is kept"))
        else:
            delivered += 1
    return delivered


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or one that cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
