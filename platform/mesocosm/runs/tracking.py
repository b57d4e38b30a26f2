"""Runs: the record of a job, written while it works.

    ROOT/runs/JOB/ID/config.yaml         the composed config
                        /status.json     running | done | failed | stopped, times, the error, facts
                        /metrics.jsonl   the truth: lines of {"time", "step", metric: value, ...}
                        /log.txt         all messages, and the traceback of a failure

MLflow is a mirror: the next run under the same root delivers what it missed while it was away, and
no job waits for it or fails with it. On a remote root the folder is in this machine's cache, and is
uploaded every ten seconds and at the end (`upload`).
"""

from __future__ import annotations

import json
import math
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mesocosm import faults
from mesocosm.config import JobConfig, to_yaml
from mesocosm.errors import MesocosmError
from mesocosm.runs.mlflow_mirror import (
    NONE,
    PENDING,
    Mirror,
    deliver,
    ping,
    read_json,
    redact,
    uri_of,
)
from mesocosm.runs.upload import Uploader
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.store.files import write_whole
from mesocosm.store.lease import Owner, hold, this_process

__all__ = [
    "NONE",
    "Run",
    "console",
    "ping",
    "redact",
    "register_world",
    "replay_in_background",
    "replay_pending",
    "start",
    "uri_of",
]

console = Console(highlight=False, soft_wrap=True, stderr=True)
"""The console for users: stderr, because `--json` writes to stdout."""

SILENT_S = 600.0
"""A run on another host that has not updated its status for so long has crashed."""


class Run:
    """One job's run, made by `start`. Threads of the driver may log to it, Ray workers may not."""

    def __init__(self, job: str, id: str, config: JobConfig, parent: Run | None, quiet: bool):
        self.job, self.id, self.config, self.parent, self.quiet = job, id, config, parent, quiet
        self.storage = Storage(config.storage.root, self.say)
        if parent is None:
            self.storage.check_writable()
        self.folder: Path = self.storage.local_path("runs", job, id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = {}
        self.stopped = False
        """Set by a job that was interrupted and returns normally, such as `serve`."""
        self._lock = threading.Lock()
        self._started = time.time()
        self._owner = this_process()
        self._state, self._error = "running", ""
        self._progress: dict[str, Any] | None = None
        (self.folder / "config.yaml").write_text(redact(to_yaml(config)))
        self._write_status()
        self._mirror = Mirror(self.folder, config, job, self._note)
        self._uploader = Uploader(self.storage, self.folder, f"runs/{job}/{id}", self._beat)

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite are written as strings."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "step": step}
        for name, value in metrics.items():
            number = float(value)
            line[name] = number if math.isfinite(number) else repr(number)
        self._append("metrics.jsonl", json.dumps(line))

    def say(self, text: str) -> None:
        """Write one line to the console and to log.txt."""
        self._note(text)
        if not self.quiet:
            console.print(redact(text))

    def _note(self, text: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._append("log.txt", f"{now} {redact(text)}")

    def _append(self, name: str, line: str) -> None:
        with self._storage_errors(), self._lock, open(self.folder / name, "a") as file:
            file.write(f"{line}\n")

    def record(self, **facts: Any) -> None:
        """Add facts (the artifact, its inputs, the ledger) to status.json and MLflow's tags."""
        with self._lock:
            self.facts.update(facts)
            self._write_status()

    def artifact(self, path: Path) -> None:
        """Attach a file to the MLflow run."""
        self._mirror.add("files", str(Path(path).absolute()))

    @contextmanager
    def progress(
        self, description: str, total: float | None = None
    ) -> Iterator[Callable[[float, str], None]]:
        """Show progress, live on a terminal. Yields a function to call with (completed, note)."""
        began = time.monotonic()
        note, printed = "", began
        texts = TextColumn("{task.description:<28}"), TextColumn("{task.fields[note]}")
        columns = SpinnerColumn(), texts[0], BarColumn(24), texts[1], TimeElapsedColumn()
        live = Progress(*columns, console=console, transient=True)
        task = live.add_task(description, total=total, note="")
        terminal = not self.quiet and console.is_terminal
        if terminal:
            live.start()

        def update(completed: float, text: str = "") -> None:
            nonlocal note, printed
            note = text
            progress = {"what": description, "completed": completed, "total": total, "note": text}
            self._progress = progress
            if terminal:
                live.update(task, completed=completed, note=text)
            elif not self.quiet and time.monotonic() - printed > 15:
                printed = time.monotonic()
                share = f"{completed:g}/{total:g}" if total else f"{completed:g}"
                console.print(f"  {description} {share}  {text}")

        try:
            yield update
        finally:
            if terminal:
                live.stop()
        self.say(f"  {description:<28} {note}  [{time.monotonic() - began:.1f} s]")

    @contextmanager
    def child(self, job: str, config: JobConfig, *, id: str | None = None) -> Iterator[Run]:
        """Start a run nested under this one."""
        with start(job, config, id=id, parent=self, quiet=self.quiet) as run:
            yield run

    @contextmanager
    def making(self, kind: str, id: str, config: JobConfig) -> Iterator[Artifact | None]:
        """Yield the finished artifact. If there is none, or `config.force` is set, yield None while
        this process alone may make it. Raises Held if another process makes it and `config.wait` is
        False.
        """
        force = config.force
        if not force and (artifact := self.storage.find(kind, id)) is not None:
            yield artifact
            return
        with hold(self.storage, f"{kind}/{id}", self.job, self.say, wait=config.wait):
            # An earlier holder of the lease may have made it.
            yield None if force else self.storage.find(kind, id)

    def _write_status(self) -> None:
        status = {
            "job": self.job,
            "id": self.id,
            "state": self._state,
            "parent": f"{self.parent.job}/{self.parent.id}" if self.parent else None,
            "started": self._started,
            "updated": time.time(),
            "owner": asdict(self._owner),
            "error": self._error or None,
            "progress": self._progress,
            "facts": self.facts,
        }
        with self._storage_errors():
            data = json.dumps(status, indent=1, default=str).encode()
            write_whole(self.folder / "status.json", data)

    def _storage_errors(self) -> AbstractContextManager[None]:
        """A full disk becomes a StorageError that names the run."""
        return self.storage.storage_errors(f"runs/{self.job}/{self.id}")

    def _beat(self) -> None:
        """Renew the status of a run that is alive, with its progress."""
        with self._lock:
            if self._state == "running":
                self._write_status()

    def _end(self, state: str, error: str = "") -> None:
        with ExitStack() as closing:
            closing.callback(self._uploader.close)
            closing.callback(self._mirror.close)
            with self._lock:
                self._state, self._error = state, redact(error)
                self._write_status()

    def _end_after(self, state: str, error: str, trace: str = "") -> None:
        """End the run after an error. A failure to record the end is reported and does not hide
        that error.
        """
        try:
            with ExitStack() as closing:
                closing.callback(self._end, state, error)
                if trace:
                    self._note(trace)
        except Exception as failure:
            reason = faults.reason(failure) or faults.first_line(failure)
            name = f"{self.job}/{self.id}"
            console.print(redact(f"warning: the end of run {name} is not recorded: {reason}"))


@contextmanager
def start(
    job: str,
    config: JobConfig,
    *,
    id: str | None = None,
    parent: Run | None = None,
    quiet: bool = False,
) -> Iterator[Run]:
    """Begin a run. Its status records how the block ends: done, failed, or stopped on Ctrl-C."""
    id = id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    run = Run(job, id, config, parent, quiet)
    try:
        yield run
    except KeyboardInterrupt:
        run._end_after("stopped", "interrupted")
        raise
    except BaseException as error:
        name = "" if isinstance(error, MesocosmError) else f"{type(error).__name__}: "
        run._end_after("failed", f"{name}{error}", traceback.format_exc())
        raise
    run._end("stopped" if run.stopped else "done")


def register_world(run: Run, artifact: Artifact) -> None:
    """Queue a version in MLflow's model registry that points at the world artifact."""
    run._mirror.add("worlds", {"name": "mesocosm-world", "source": artifact.uri, "id": artifact.id})


def replay_pending(config: JobConfig) -> int:
    """Deliver to MLflow what earlier runs under this root could not, and mark runs as failed whose
    process is gone. Returns how many runs were brought up to date.
    """
    delivered = 0
    for mark in sorted(Storage(config.storage.root).local_path("runs").glob(f"*/*/{PENDING}")):
        folder = mark.parent
        status = read_json(folder / "status.json")
        if status is None:
            continue
        if status["state"] == "running":
            if _alive(status):
                continue
            # Its process may have ended well since the status was read.
            status = read_json(folder / "status.json") or status
        if status["state"] == "running":
            status.update(
                state="failed", error="the process ended without recording its end (killed?)"
            )
            write_whole(folder / "status.json", json.dumps(status, indent=1).encode())
        if config.tracking.uri == NONE:
            continue
        try:
            deliver(folder, config)
            delivered += 1
        except Exception as error:
            try:
                ping(config)
            except Exception as outage:
                problem = f"MLflow at {uri_of(config)} is still away ({faults.first_line(outage)})"
                console.print(redact(f"{problem}; metrics.jsonl is kept"))
                break
            name, reason = f"{status['job']}/{status['id']}", faults.first_line(error)
            problem = f"run {name} could not be brought to MLflow ({reason})"
            console.print(redact(f"{problem}; its metrics.jsonl is kept"))
    return delivered


def replay_in_background(config: JobConfig) -> None:
    """Start `replay_pending` in a thread. An error is one line on the console."""

    def work() -> None:
        try:
            replay_pending(config)
        except Exception as error:
            reason = faults.reason(error) or f"{type(error).__name__}: {faults.first_line(error)}"
            console.print(redact(f"earlier runs are not brought to MLflow: {reason}"))

    threading.Thread(target=work, name="replay", daemon=True).start()


def _alive(status: Mapping[str, Any]) -> bool:
    """True if the process of a run whose status is "running" still runs."""
    owner = status.get("owner")
    alive = Owner(**owner).alive() if owner else None
    # A process of another host cannot be looked up: its heartbeat decides. Clocks may differ.
    return time.time() - status["updated"] < SILENT_S if alive is None else alive
