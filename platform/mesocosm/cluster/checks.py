"""Checks of storage and tracking, here or inside a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError
from mesocosm.faults import first_line
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    fix: str = ""


def guarded(name: str, look: Callable[[], str], fix: str) -> Check:
    """A check that passes with the result of `look`, or fails with its error."""
    try:
        return Check(name, True, look())
    except Exception as error:  # botocore and SQLAlchemy raise types of their own
        text = str(error) if isinstance(error, MesocosmError) else first_line(error)
        return Check(name, False, " ".join(text.split()), fix)


def storage_check(config: JobConfig) -> Check:
    """Check that `storage.root` is readable and writable here, and creates files exclusively."""

    def look() -> str:
        storage = Storage(config.storage.root)
        storage.check_writable()
        return storage.root

    fix = "set storage.root to a folder you may write to, or to s3://bucket/prefix with credentials"
    return guarded("storage", look, f"{fix} in the environment")


def mlflow_check(config: JobConfig) -> Check:
    """Check that MLflow answers here."""

    def look() -> str:
        if config.tracking.uri == tracking.NONE:
            return "left out (tracking.uri=none)"
        tracking.ping(config)
        return tracking.redact(tracking.uri_of(config))

    fix = "set tracking.uri to a server that answers, or leave it unset; jobs run without it"
    return guarded("mlflow", look, f"{fix} and replay later")
