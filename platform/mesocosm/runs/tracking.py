"""Runs: what a job did, while it does it.

    ROOT/runs/<job>/<id>/config.yaml     what was asked (as composed)
                        /status.json     running | done | failed | stopped, times, the error, recorded facts
                        /metrics.jsonl   the truth: one JSON object a line, {"time", "step", metric: value, ...}
                        /log.txt         what was said, and the traceback of a failure

MLflow is a mirror: a background thread replays metrics.jsonl into it, and what it could not deliver
because MLflow was away is delivered by the next run under the same root (`replay_pending`). No job
waits for MLflow or fails with it. On a remote root the folder lies in this machine's cache, and is
sent every ten seconds and at the end (`shipping`).
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
    PENDING,
    Mirror,
    deliver,
    memo_of,
    ping,
    read_json,
    redact,
    uri_of,
)
from mesocosm.runs.upload import Shipper
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.store.files import write_whole
from mesocosm.store.lease import Owner, hold, this_process

__all__ = [
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
"""Where people read: stderr, so that `--json` owns stdout."""


SILENT_S = 600.0
"""A run on another host that has not updated its status for so long has crashed."""


class Run:
    """One job's run. Made by `start`; safe to log to from several threads of the driver, never from
    Ray workers.
    """

    def __init__(self, job: str, id: str, config: JobConfig, parent: Run | None, quiet: bool):
        self.job, self.id, self.config, self.parent, self.quiet = job, id, config, parent, quiet
        self.storage = Storage(config.storage.root, self.say)
        if parent is None:
            self.storage.check_writable()
        self.folder: Path = self.storage.local_path("runs", job, id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = {}
        self.stopped = False
        """Whether a job that runs until it is interrupted, and then returns, was interrupted."""
        self._lock = threading.Lock()
        self._started = time.time()
        self._owner = this_process()
        self._state, self._error = "running", ""
        self._progress: dict[str, Any] | None = None
        (self.folder / "config.yaml").write_text(redact(to_yaml(config)))
        self._status("running")
        self._mirror = Mirror(self.folder, config, job, self._note)
        self._shipper = Shipper(self.storage, self.folder, f"runs/{job}/{id}", self._beat)

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run's id, once the mirror has reached MLflow."""
        return memo_of(self.folder, self.config).get("run_id")

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line to metrics.jsonl. Values that are not finite are kept there as strings
        and not sent to MLflow.
        """
        line: dict[str, Any] = {"time": round(time.time(), 3), "step": step}
        for name, value in metrics.items():
            number = float(value)
            line[name] = number if math.isfinite(number) else repr(number)
        with self._naming(), self._lock, open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def say(self, text: str) -> None:
        """One line to the console and to log.txt."""
        self._note(text)
        if not self.quiet:
            console.print(redact(text))

    def _note(self, text: str) -> None:
        with self._naming(), self._lock, open(self.folder / "log.txt", "a") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {redact(text)}\n")

    def record(self, **facts: Any) -> None:
        """Facts of the run (its artifact, its inputs, the ledger) into status.json and MLflow's
        tags.
        """
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
        """A live line of progress: call the yielded function with (completed, note). Plain lines
        where there is no terminal.
        """
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
            self._progress = {
                "what": description,
                "completed": completed,
                "total": total,
                "note": text,
            }
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

    @contextmanager
    def making(self, kind: str, id: str, config: JobConfig) -> Iterator[Artifact | None]:
        """The finished artifact, unless `config.force`; or None, while this process alone may make
        it.

        Raises:
            Held: another process makes it, and `config.wait` is False.
        """
        force = config.force
        if not force and (artifact := self.storage.find(kind, id)) is not None:
            yield artifact
            return
        with hold(self.storage, f"{kind}/{id}", self.job, self.say, wait=config.wait):
            # The holder that was waited for may have made it.
            yield None if force else self.storage.find(kind, id)

    def _status(self, state: str, error: str = "") -> None:
        with self._lock:
            self._state, self._error = state, redact(error)
            self._write_status()

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
        with self._naming():
            write_whole(
                self.folder / "status.json", json.dumps(status, indent=1, default=str).encode()
            )

    def _naming(self) -> AbstractContextManager[None]:
        """A full disk becomes a StorageError that names the run."""
        return self.storage.storage_errors(f"runs/{self.job}/{self.id}")

    def _beat(self) -> None:
        """That the run is alive, and how far it is."""
        with self._lock:
            if self._state == "running":
                self._write_status()

    def _end(self, state: str, error: str = "") -> None:
        with ExitStack() as closing:
            closing.callback(self._shipper.close)
            closing.callback(self._mirror.close)
            self._status(state, error)

    def _end_after(self, state: str, error: str, trace: str = "") -> None:
        """End the run after an error. A failure to record the end is reported and hides nothing."""
        try:
            with ExitStack() as closing:
                closing.callback(self._end, state, error)
                if trace:
                    self._note(trace)
        except Exception as failure:
            why = faults.reason(failure) or faults.first_line(failure)
            name = f"{self.job}/{self.id}"
            console.print(redact(f"warning: the end of run {name} is not recorded: {why}"))


@contextmanager
def start(
    job: str,
    config: JobConfig,
    *,
    id: str | None = None,
    parent: Run | None = None,
    quiet: bool = False,
) -> Iterator[Run]:
    """Begin a run; however the block ends, the run's status says so (failed with the error, stopped
    on Ctrl-C).
    """
    run = Run(
        job,
        id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        config,
        parent,
        quiet,
    )
    try:
        yield run
    except KeyboardInterrupt:
        run._end_after("stopped", "interrupted")
        raise
    except BaseException as error:
        text = (
            str(error) if isinstance(error, MesocosmError) else f"{type(error).__name__}: {error}"
        )
        run._end_after("failed", text, traceback.format_exc())
        raise
    run._end("stopped" if run.stopped else "done")


def register_world(run: Run, artifact: Artifact) -> None:
    """A version in MLflow's model registry that points at the world artifact. Queued: delivered
    when MLflow answers.
    """
    run._mirror.add("worlds", {"name": "mesocosm-world", "source": artifact.uri, "id": artifact.id})


def replay_pending(config: JobConfig) -> int:
    """Deliver to MLflow what earlier runs under this root could not; returns how many were brought
    up to date.

    A run that says running and whose process is gone crashed: it is marked failed first.
    """
    delivered = 0
    for mark in sorted(Storage(config.storage.root).local_path("runs").glob(f"*/*/{PENDING}")):
        status = read_json(mark.parent / "status.json")
        if status is None:
            continue
        if status["state"] == "running":
            if _alive(status):
                continue
            # Its process may have ended well since the first look.
            status = read_json(mark.parent / "status.json") or status
        if status["state"] == "running":
            status.update(state="failed", error="the process ended without a word (killed?)")
            write_whole(mark.parent / "status.json", json.dumps(status, indent=1).encode())
        try:
            deliver(mark.parent, config)
        except Exception as error:
            try:
                ping(config)
            except Exception as away:
                why = faults.first_line(away)
                console.print(
                    f"MLflow at {redact(uri_of(config))} is still away ({why}); metrics.jsonl is"
                    " kept"
                )
                break
            name, why = f"{status['job']}/{status['id']}", faults.first_line(error)
            console.print(
                redact(
                    f"run {name} could not be brought to MLflow ({why}); its metrics.jsonl is kept"
                )
            )
        else:
            delivered += 1
    return delivered


def replay_in_background(config: JobConfig) -> None:
    """Start `replay_pending` in a thread. What it cannot do is one line on the console."""

    def work() -> None:
        try:
            replay_pending(config)
        except Exception as error:
            why = faults.reason(error) or f"{type(error).__name__}: {faults.first_line(error)}"
            console.print(redact(f"earlier runs are not brought to MLflow: {why}"))

    threading.Thread(target=work, name="replay", daemon=True).start()


def _alive(status: Mapping[str, Any]) -> bool:
    """Whether the process of a run that says "running" still runs."""
    owner = status.get("owner")
    alive = Owner(**owner).alive() if owner else None
    # On another host only the heartbeat tells; hosts' clocks differ.
    return time.time() - status["updated"] < SILENT_S if alive is None else alive
