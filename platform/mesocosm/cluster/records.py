"""Which jobs were submitted from here, and where to: `~/.mesocosm/jobs/<id>.json`. Nothing secret;
Ray and storage have the rest.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mesocosm.errors import UsageError, nearest
from mesocosm.store.files import write_whole


@dataclass(frozen=True)
class Record:
    id: str
    job: str
    cluster: str
    root: str
    """Of its storage"""
    submitted: float
    """Seconds since the epoch"""


def folder() -> Path:
    return Path(os.environ.get("MESOCOSM_HOME", "~/.mesocosm")).expanduser() / "jobs"


def keep(record: Record) -> None:
    folder().mkdir(parents=True, exist_ok=True)
    write_whole(folder() / f"{record.id}.json", json.dumps(asdict(record)).encode())


def every() -> list[Record]:
    """The latest first; a record that cannot be read is passed over."""
    found = []
    for path in folder().glob("*.json"):
        try:
            found.append(Record(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda record: -record.submitted)


def find(id: str) -> Record | None:
    return next((record for record in every() if record.id == id), None)


def named(ref: str) -> Record:
    """The record of `ref`, an id or a unique part of its beginning. Raises UsageError where there
    is none.
    """
    known = every()
    matches = [record for record in known if record.id == ref] or [
        record for record in known if ref and record.id.startswith(ref)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(
            f"job {ref!r} is ambiguous: {', '.join(record.id for record in matches[:5])}"
        )
    ids = [record.id for record in known]
    raise UsageError(
        f"no job {ref!r} was submitted from"
        f" here{nearest(ref, ids) or '; name its cluster with --cluster, or see mesocosm jobs list'}"
    )
