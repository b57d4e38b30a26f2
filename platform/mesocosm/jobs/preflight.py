"""Checks of what a job needs at its end, before its first step: storage, tracking and resources.

Nothing is left behind: a dry run performs the same checks.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig
from mesocosm.errors import UsageError
from mesocosm.job import Resources
from mesocosm.runs.mlflow_mirror import NONE, redact
from mesocosm.store.artifacts import Storage

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = {"http": 80, "https": 443}
WRITABLE = "name a folder or bucket in which you may write"
ANSWER_S = 3.0
"""Seconds to wait for a tracking server to accept a connection."""


def check(config: JobConfig) -> str | None:
    """Check that the results can be stored and the run tracked. Returns a warning, if any.

    Raises:
        UsageError: nothing can be committed to `storage.root`, or `tracking.uri` cannot be used.
    """
    storage = Storage(config.storage.root)
    if storage.remote:
        storage.check_writable()
        _check_folder(storage.local_path("runs"), f"the copy of storage.root {storage.root!r}")
    else:
        _check_folder(Path(storage.root), f"storage.root {storage.root!r}", links=True)
    return None if config.tracking.uri in (None, NONE) else _check_tracking(config.tracking.uri)


def check_resources(config: JobConfig, resources: Resources) -> None:
    """Raise UsageError where the cluster, or the local Ray that would start, lacks resources.

    For a dry run: a real run checks its resources when Ray runs.
    """
    host, port = _place(f"//{(config.ray.address or '').rpartition('://')[2]}", "ray.address")
    if host and port and (reason := _no_answer(host, port)):  # Ray itself waits for minutes
        message = f"ray.address {config.ray.address!r} does not answer ({reason})"
        raise UsageError(f"{message}; start the cluster or leave ray.address unset")
    for key, (cpus, gpus) in resources.items():
        ray_session.preflight(key=key, cpus=cpus, gpus=gpus, config=config.ray)


def _check_folder(folder: Path, name: str, *, links: bool = False) -> None:
    """Check that files can be made in a folder, or in its nearest parent: it is not made here.

    Args:
        folder: The folder.
        name: Its name in the message.
        links: Whether it must allow hard links, which `Storage.create` needs on a local root.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".mesocosm-", dir=existing) as probe:
            file = Path(probe, "file")
            file.touch()
            if links:
                _check_links(file, name)
    except OSError as error:
        reason = f"{error.strerror}: {str(existing)!r}"
        raise UsageError(f"{name} cannot be written ({reason}); {WRITABLE}") from error


def _check_links(file: Path, name: str) -> None:
    try:
        os.link(file, file.with_name("link"))
    except OSError as error:
        message = f"{name} is on a filesystem without hard links ({error.strerror})"
        raise UsageError(f"{message}; name a folder of another filesystem, or a bucket") from error


def _check_tracking(uri: str) -> str | None:
    scheme = uri.partition("://")[0].lower()
    dialect = scheme.partition("+")[0]
    if dialect == "sqlite":
        _check_folder(Path(uri.partition(":///")[2]).parent, "the folder of tracking.uri")
    elif scheme in SERVERS:
        host, port = _place(uri, "tracking.uri")
        port = port or SERVERS[scheme]
        if reason := _no_answer(host, port):
            message = f"tracking.uri at {host}:{port} does not answer ({reason})"
            return f"{message}; metrics are kept under storage.root and sent by a later run"
    elif dialect not in (*DATABASES, "databricks"):
        fix = "leave it out for a file under storage.root"
        message = "tracking.uri must be http://HOST, https://HOST, sqlite:///FILE or none"
        raise UsageError(f"{message}, got {redact(uri)!r}; {fix}")
    return None


def _place(url: str, key: str) -> tuple[str, int | None]:
    """The host and port of a URL, "" and None where it has none.

    Raises:
        UsageError: the URL is malformed. `key` is the config key that holds it.
    """
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        return parts.hostname or "", parts.port
    except ValueError as error:
        message = f"{key} is not a valid address ({error}), got {redact(url.removeprefix('//'))!r}"
        raise UsageError(f"{message}; correct it") from error


def _no_answer(host: str, port: int) -> str | None:
    """The reason why no connection to a server can be made, or None."""
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
