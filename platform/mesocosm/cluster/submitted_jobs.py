"""Submitted jobs: Ray reports on them while their cluster answers, and storage in any case."""

from __future__ import annotations

import json
import time
from typing import Any

import yaml

from mesocosm.cluster import records, spec
from mesocosm.cluster.records import SubmittedJob
from mesocosm.cluster.remote import Remote, state_of
from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.runs.upload import DRIVER_LOG, STOP
from mesocosm.store.artifacts import Storage

KILL_S = 45.0
"""Seconds that Ray may take to end a job after its grace period."""
ENDED = {"done": "SUCCEEDED", "failed": "FAILED", "stopped": "STOPPED"}
"""Ray's states by the states in a run's status.json. A run that says it runs may have died."""


def connect(name: str, *, insecure: bool) -> Remote | str:
    """The cluster, or the reason why it cannot be reached."""
    try:
        return Remote(name, spec.read(name), insecure=insecure)
    except MesocosmError as error:
        return str(error)


def find_job(ref: str, cluster: str | None) -> SubmittedJob:
    """The job `ref`, submitted from here or, with `cluster`, from anywhere."""
    if cluster is None:
        return records.named(ref)
    record = records.find(ref)
    if record is not None and record.cluster == cluster:
        return record
    root = spec.read(cluster).storage_root or JobConfig().storage.root
    return SubmittedJob(ref, ref.rsplit("-", 2)[0], cluster, root, 0.0)


def list_jobs(cluster: str | None, *, insecure: bool) -> list[dict[str, Any]]:
    """Rows of `jobs list`, the latest first: of `cluster`, or those submitted from here."""
    local = [record for record in records.every() if cluster in (None, record.cluster)]
    rows = []
    for name in [cluster] if cluster else sorted({record.cluster for record in local}):
        remote = connect(name, insecure=insecure)
        if isinstance(remote, str) and cluster:
            raise UsageError(remote)
        jobs = {} if isinstance(remote, str) else {job.submission_id: job for job in remote.list()}
        records_by_id = {record.id: record for record in local if record.cluster == name}
        if cluster:
            for id, job in jobs.items():
                if (job.metadata or {}).get("job", "probe") != "probe":
                    records_by_id.setdefault(id, find_job(id, cluster))
        for id, record in records_by_id.items():
            rows.append(_row(record, jobs.get(id), _read_json(record, "status.json")))
    return sorted(rows, key=lambda row: row["age_s"] or 0.0)


def status(record: SubmittedJob, *, insecure: bool) -> dict[str, Any]:
    """A job's row of `jobs list`, its results, and where its run is recorded."""
    remote = connect(record.cluster, insecure=insecure)
    details = None if isinstance(remote, str) else remote.details(record.id)
    report = _read_json(record, "status.json")
    facts = report.get("facts", {})
    mlflow = _read_json(record, "mlflow.json")
    return _row(record, details, report) | {
        "message": report.get("error") or (None if details is None else details.message),
        "artifact": facts.get("artifact"),
        "inputs": facts.get("inputs"),
        "folder": Storage(record.root).url("runs", record.job, record.id),
        "mlflow": f"{mlflow['uri']} run {mlflow['run_id']}" if "run_id" in mlflow else None,
        "unreached": remote if isinstance(remote, str) else None,
    }


def _row(record: SubmittedJob, details: Any | None, report: dict[str, Any]) -> dict[str, Any]:
    """A row of `jobs list`, from Ray's details of the job and its own status.json."""
    started = report.get("started") or record.submitted
    ended = ENDED.get(str(report.get("state")))
    state = ended or "UNKNOWN"
    if details is not None:
        started = (details.start_time or 0) / 1000 or started
        # Ray calls a driver that stopped on request failed.
        if (ray_state := state_of(details)) != "FAILED" or ended != "STOPPED":
            state = ray_state
    progress = report.get("progress")
    return {
        "id": record.id,
        "cluster": record.cluster,
        "state": state,
        "age_s": round(time.time() - started, 1) if started else None,
        "progress": None if progress is None else _progress(progress),
        "heard_s": round(time.time() - report["updated"], 1) if report else None,
    }


def _progress(progress: dict[str, Any]) -> str:
    share, note = f"{progress['completed']:g}", str(progress["note"])
    if progress["total"]:
        share += f"/{progress['total']:g}"
    parts = (progress["what"], "" if share in note else share, note)
    return " ".join(filter(None, parts))


def _read_json(record: SubmittedJob, name: str) -> dict[str, Any]:
    """A file of the job's run, as the job last uploaded it; empty if there is none."""
    try:
        raw = Storage(record.root).read(f"runs/{record.job}/{record.id}/{name}")
        return {} if raw is None else dict(json.loads(raw))
    except Exception:  # this user may have no access to the storage
        return {}


def stored_log(record: SubmittedJob) -> str | None:
    """The driver's output, as the job last sent it."""
    for name in (DRIVER_LOG, "log.txt"):
        raw = Storage(record.root).read(f"runs/{record.job}/{record.id}/{name}")
        if raw is not None:
            return raw.decode(errors="replace")
    return None


def stop(record: SubmittedJob, remote: Remote) -> str:
    """Stop a running job and wait for its end; returns its state.

    The job is asked through its storage, and Ray ends it after its grace period. Without access to
    the storage Ray's stop asks the driver, and waits as long.
    """
    grace = _ask_to_stop(record)
    if grace is None or not remote.wait(record.id, grace):
        remote.stop(record.id)
        remote.wait(record.id, KILL_S + (JobConfig().stop.grace_s if grace is None else 0))
    details = remote.details(record.id)
    return str(_row(record, details, _read_json(record, "status.json"))["state"])


def _ask_to_stop(record: SubmittedJob) -> float | None:
    """Write the request to stop; returns the job's grace period in seconds, or None where the
    storage cannot be written from here.
    """
    storage = Storage(record.root)
    folder = f"runs/{record.job}/{record.id}"
    try:
        storage.write(f"{folder}/{STOP}", b"asked by mesocosm jobs stop")
        config = yaml.safe_load(storage.read(f"{folder}/config.yaml") or b"") or {}
    except Exception:  # a remote filesystem raises its own types
        return None
    return float((config.get("stop") or {}).get("grace_s", JobConfig().stop.grace_s))


def age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
