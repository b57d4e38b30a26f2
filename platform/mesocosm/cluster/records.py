"""The jobs submitted from this machine: `~/.mesocosm/jobs/ID.json`. The files hold no secrets."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mesocosm.errors import UsageError, nearest
from mesocosm.store.files import write_whole


@dataclass(frozen=True)
class SubmittedJob:
    id: str
    job: str
    cluster: str
    root: str
    """The job's `storage.root`."""
    submitted: float
    """Seconds since the epoch."""


def folder() -> Path:
    return Path(os.environ.get("MESOCOSM_HOME", "~/.mesocosm")).expanduser() / "jobs"


def write(record: SubmittedJob) -> None:
    folder().mkdir(parents=True, exist_ok=True)
    write_whole(folder() / f"{record.id}.json", json.dumps(asdict(record)).encode())


def every() -> list[SubmittedJob]:
    """All records, the latest first, without those that cannot be read."""
    records = []
    for path in folder().glob("*.json"):
        with suppress(OSError, ValueError, TypeError):
            records.append(SubmittedJob(**json.loads(path.read_text())))
    return sorted(records, key=lambda record: -record.submitted)


def find(id: str) -> SubmittedJob | None:
    return next((record for record in every() if record.id == id), None)


def named(ref: str) -> SubmittedJob:
    """The record whose id is `ref` or begins with it. Raises UsageError unless there is one."""
    records = every()
    matches = [record for record in records if ref and record.id.startswith(ref)]
    exact = [record for record in matches if record.id == ref]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        raise UsageError(f"job {ref!r} is ambiguous: {', '.join(r.id for r in matches[:5])}")
    hint = nearest(ref, [record.id for record in records])
    hint = hint or "; name its cluster with --cluster, or see mesocosm jobs list"
    raise UsageError(f"no job {ref!r} was submitted from here{hint}")
