"""What is known of a submitted job: Ray's word while its cluster answers, and what the job itself
sent to storage in any case.
"""

from __future__ import annotations

import json
import time
from typing import Any

from mesocosm.cluster import records
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.records import Record
from mesocosm.cluster.remote import Remote, state_of
from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.runs.upload import DRIVER_LOG, STOP
from mesocosm.store.artifacts import Storage

RAYS_OWN = 45.0
"""Seconds that Ray may take to end what it was told to stop, beside the grace."""
ENDED = {"done": "SUCCEEDED", "failed": "FAILED", "stopped": "STOPPED"}
"""A run's word for Ray's, where Ray cannot be asked; of a run that says it runs nobody knows then.
"""


def remote_of(name: str, *, insecure: bool) -> Remote | str:
    """The cluster, or the sentence why it does not answer."""
    try:
        return Remote(name, cluster_spec.read(name), insecure=insecure)
    except MesocosmError as error:
        return str(error)


def job_of(ref: str, cluster: str | None) -> Record:
    """The job that `ref` names, submitted from here or, with `cluster`, from anywhere."""
    if cluster is None:
        return records.named(ref)
    root = cluster_spec.read(cluster).storage_root or JobConfig().storage.root
    known = records.find(ref)
    return (
        known
        if known is not None and known.cluster == cluster
        else Record(ref, ref.rsplit("-", 2)[0], cluster, root, 0.0)
    )


def listed(cluster: str | None, *, insecure: bool) -> list[dict[str, Any]]:
    """Rows of `jobs list`, the latest first. Without `cluster` those that were submitted from here."""
    own = [record for record in records.every() if cluster in (None, record.cluster)]
    rows = []
    for name in [cluster] if cluster is not None else sorted({record.cluster for record in own}):
        remote = remote_of(name, insecure=insecure)
        if isinstance(remote, str) and cluster is not None:
            raise UsageError(remote)
        jobs = {} if isinstance(remote, str) else {job.submission_id: job for job in remote.list()}
        mine = {record.id: record for record in own if record.cluster == name}
        others = {
            id: job_of(id, name)
            for id, job in jobs.items()
            if (job.metadata or {}).get("job", "probe") != "probe" and cluster is not None
        }
        for id, record in {**others, **mine}.items():
            rows.append(_row(record, jobs.get(id)))
    return sorted(rows, key=lambda row: row["age_s"])


def status(record: Record, *, insecure: bool) -> dict[str, Any]:
    """Of one job: `jobs list`'s row, what it holds, where its record is, and what it said last."""
    remote = remote_of(record.cluster, insecure=insecure)
    details = None if isinstance(remote, str) else remote.details(record.id)
    own = told(record) or {}
    facts = own.get("facts", {})
    found = _row(record, details)
    found |= {
        "message": own.get("error") or (None if details is None else details.message),
        "artifact": facts.get("artifact"),
        "inputs": facts.get("inputs"),
        "folder": Storage(record.root).url("runs", record.job, record.id),
        "mlflow": _mlflow(record),
        "unreached": remote if isinstance(remote, str) else None,
    }
    return found


def _row(record: Record, details: Any | None) -> dict[str, Any]:
    own = told(record)
    began = (
        details.start_time / 1000
        if details is not None and details.start_time
        else (own or {}).get("started") or record.submitted
    )
    progress = (own or {}).get("progress")
    ended = ENDED.get(str((own or {}).get("state")))
    state = state_of(details) if details is not None else ended or "UNKNOWN"
    if (
        state == "FAILED" and ended == "STOPPED"
    ):  # a driver that ends by itself when it is asked to has failed in Ray's eyes
        state = ended
    return {
        "id": record.id,
        "cluster": record.cluster,
        "state": state,
        "age_s": round(time.time() - began, 1) if began else None,
        "progress": None if progress is None else said(progress),
        "heard_s": None if own is None else round(time.time() - own["updated"], 1),
    }


def said(progress: dict[str, Any]) -> str:
    share = (
        f"{progress['completed']:g}/{progress['total']:g}"
        if progress["total"]
        else f"{progress['completed']:g}"
    )
    note = str(progress["note"])
    return " ".join(
        part for part in (progress["what"], "" if share in note else share, note) if part
    )


def told(record: Record) -> dict[str, Any] | None:
    """The job's own status.json, as it last sent it."""
    return _kept(record, "status.json")


def _kept(record: Record, name: str) -> dict[str, Any] | None:
    try:
        raw = Storage(record.root).read(f"runs/{record.job}/{record.id}/{name}")
        return None if raw is None else json.loads(raw)
    except (
        Exception
    ):  # a storage that does not answer, or does not know this user, has nothing to say
        return None


def kept_log(record: Record) -> str | None:
    """What the driver said, as it last sent it."""
    for name in (DRIVER_LOG, "log.txt"):
        raw = Storage(record.root).read(f"runs/{record.job}/{record.id}/{name}")
        if raw is not None:
            return raw.decode(errors="replace")
    return None


def ask_to_stop(record: Record) -> float | None:
    """Write the request to stop; gives the seconds that the job's config grants it. None where its
    storage cannot be written from here: Ray's own stop asks the driver in the same way, and waits
    as long (`submit.submit`).
    """
    storage = Storage(record.root)
    folder = f"runs/{record.job}/{record.id}"
    try:
        storage.write(f"{folder}/{STOP}", b"asked by mesocosm jobs stop")
        raw = storage.read(f"{folder}/config.yaml")
    except Exception:  # a remote filesystem's errors are its own
        return None
    if raw is None:
        return JobConfig().stop.grace_s
    import yaml

    return float((yaml.safe_load(raw).get("stop") or {}).get("grace_s", JobConfig().stop.grace_s))


def _mlflow(record: Record) -> str | None:
    memo = _kept(record, "mlflow.json")
    if memo is None:
        return None
    return f"{memo['uri']} run {memo['run_id']}" if "run_id" in memo else None


def table(rows: list[dict[str, Any]]) -> str:
    head = ["id", "cluster", "state", "age", "progress"]
    lines = [
        head,
        *(
            [row["id"], row["cluster"], row["state"], age(row["age_s"]), row["progress"] or ""]
            for row in rows
        ),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
