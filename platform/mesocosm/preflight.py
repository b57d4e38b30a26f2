"""Checks of what a job needs at its end, before its first step: storage, tracking and resources.

Nothing is left behind: a dry run performs the same checks.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from mesocosm import cluster
from mesocosm.config import JobConfig, TrackingConfig
from mesocosm.errors import UsageError
from mesocosm.storage import Storage

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = {"http": 80, "https": 443}
WRITABLE = "name a folder or bucket in which you may write"
ANSWER_S = 3.0
"""Seconds to wait for a tracking server to accept a connection."""

Needs = Mapping[str, tuple[float, float]]
"""(CPUs, GPUs) by the config key and value that asks for them."""


def check(config: JobConfig) -> list[str]:
    """Check that the results can be stored and the run tracked.

    Returns:
        Warnings, one sentence each.

    Raises:
        UsageError: nothing can be committed to `storage.root`, or `tracking.uri` cannot be used.
    """
    storage = Storage(config.storage.root)
    if storage.remote:
        storage.writable()
        _check_folder(storage.local_path("runs"), f"the copy of storage.root {storage.root!r}")
    else:
        _check_folder(Path(storage.root), f"storage.root {storage.root!r}")
    return _check_tracking(config.tracking)


def check_resources(config: JobConfig, needs: Needs) -> None:
    """Raise UsageError where the cluster, or the local Ray that would start, lacks resources.

    For a dry run: a real run checks its resources when Ray runs.
    """
    address = urlsplit(f"//{(config.ray.address or '').rpartition('://')[2]}")
    if address.hostname and address.port:  # Ray itself waits for minutes
        try:
            socket.create_connection((address.hostname, address.port), ANSWER_S).close()
        except OSError as error:
            reason = error.strerror or error
            message = f"ray.address {config.ray.address!r} does not answer ({reason})"
            fix = "start the cluster or leave ray.address unset"
            raise UsageError(f"{message}; {fix}") from error
    for what, (cpus, gpus) in needs.items():
        cluster.preflight(what=what, cpus=cpus, gpus=gpus, config=config.ray)


def _check_folder(folder: Path, what: str) -> None:
    """Commits need new files and hard links (`Storage.create`); the root itself is not made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=".mesocosm-", suffix=".tmp", dir=existing)
        os.close(handle)
        probe = Path(name)
        link = probe.with_suffix(".link.tmp")
        os.link(probe, link)
        link.unlink()
    except OSError as error:
        reason = f"{error.strerror}: {str(existing)!r}"
        raise UsageError(f"{what} cannot be written ({reason}); {WRITABLE}") from error
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)


def _check_tracking(tracking: TrackingConfig) -> list[str]:
    if tracking.uri is None:
        return []
    parts = urlsplit(tracking.uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme == "sqlite":
        _check_folder(Path(tracking.uri.partition(":///")[2]).parent, "the folder of tracking.uri")
    elif scheme in SERVERS:
        return _check_server(parts.hostname or "", _port(parts) or SERVERS[scheme])
    elif scheme not in DATABASES and scheme != "databricks" and tracking.uri != "databricks":
        fix = "leave it out for a file under storage.root"
        allowed = "http://, https:// or sqlite:///"
        raise UsageError(f"tracking.uri must begin with {allowed}, got {tracking.uri!r}; {fix}")
    return []


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError as error:
        raise UsageError(f"tracking.uri has no valid port ({error}); correct it") from error


def _check_server(host: str, port: int) -> list[str]:
    """A tracking server may be away: metrics are kept in the run's folder and sent later."""
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except OSError as error:
        reason = error.strerror or error
        message = f"tracking.uri at {host}:{port} does not answer ({reason})"
        return [f"{message}; metrics are kept under storage.root and sent by a later run"]
    return []
