"""Checks of a machine's storage and tracking, here or inside a cluster."""

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


def storage_check(config: JobConfig) -> Check:
    """Whether `storage.root` can be written and read from here, and creates files exclusively."""
    return guarded(
        "storage",
        lambda: _storage(config),
        "set storage.root to a folder you may write to, or s3://bucket/prefix with credentials in"
        " the environment",
    )


def mlflow_check(config: JobConfig) -> Check:
    """Whether MLflow answers from here."""
    return guarded(
        "mlflow",
        lambda: _mlflow(config),
        "set tracking.uri to a server that answers, or leave it unset; jobs run without it and"
        " replay later",
    )


def guarded(name: str, look: Callable[[], str], fix: str) -> Check:
    try:
        return Check(name, True, look())
    except Exception as error:  # whatever a client library raises (botocore's and SQLAlchemy's errors are none of Python's own) is what was asked
        text = str(error) if isinstance(error, MesocosmError) else first_line(error)
        return Check(name, False, " ".join(text.split()), fix)


def _storage(config: JobConfig) -> str:
    storage = Storage(config.storage.root)
    storage.check_writable()
    return storage.root


def _mlflow(config: JobConfig) -> str:
    tracking.ping(config)
    return tracking.redact(tracking.uri_of(config))
