"""The folder of a submission, with one content hash.

config.yaml      as composed, for the cluster's storage and tracking
mesocosm/        this package, which precedes an installed one on the cluster
...              the user's current folder, without hidden files and those that git ignores

Installed packages are not sent. They are the cluster's (`clusters/Dockerfile`), and `submit`
compares the versions of Python and Ray.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesocosm.cluster import spec
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import JobConfig, fingerprint, to_dict, to_yaml
from mesocosm.errors import UsageError
from mesocosm.store.files import sha256

CONFIG = "config.yaml"
PACKAGE = Path(__file__).resolve().parents[1]
LIMIT = 100 << 20
"""Bytes that Ray's Jobs API takes in one package (`ray_constants.DASHBOARD_CLIENT_MAX_SIZE`)."""
CREDENTIALS = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
UNUSED = {"test", "this", "antigravity", "idlelib", "turtle", "turtledemo"}
"""Python's modules that no job imports."""


@dataclass(frozen=True)
class Frozen:
    job: str
    id: str
    """`JOB-HASH`, without the attempt."""
    config: JobConfig
    """The config for the cluster."""
    files: dict[str, Path]
    """The files to send, by their names in the folder, without the config."""

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, folder: Path) -> None:
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / CONFIG).write_text(to_yaml(self.config))


def freeze(
    job: str, config: JobConfig, cluster: ClusterConfig, folder: Path | None, name: str | None
) -> Frozen:
    """Collect what a submission sends.

    Args:
        folder: The user's current folder, or None to send the package alone.
        name: The cluster's name. Its file is sent, for estimates of a sweep.

    Raises:
        UsageError: The config cannot run on the cluster, or the files cannot be sent.
    """
    placed = _place(config, cluster, name)
    paths = (path for path in sorted(PACKAGE.rglob("*")) if path.is_file())
    names = {path.relative_to(PACKAGE): path for path in paths}
    files = {f"mesocosm/{file}": path for file, path in names.items() if not _hidden(file)}
    for path in sorted(_user_files(folder)) if folder is not None else []:
        path_name = str(path.relative_to(folder or path))
        if not path_name.startswith("mesocosm/") and path_name != CONFIG:
            files[path_name] = path
    for file in files:
        # Ray puts the folder first in `sys.path`.
        module = file.removesuffix("/__init__.py").removesuffix(".py")
        if module in sys.stdlib_module_names - UNUSED and file != module:
            problem = f"the file {file!r} would replace Python's module {module!r} on the cluster"
            raise UsageError(f"{problem}; rename it, or let git ignore it")
    if name is not None:
        files[f"clusters/{name}.yaml"] = spec.path_of(name)
    sizes = {file: path.stat().st_size for file, path in files.items()}
    total = sum(sizes.values())
    if total > LIMIT:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:5]
        listing = ", ".join(f"{file} ({sizes[file] / 2**20:.0f} MiB)" for file in largest)
        raise UsageError(
            f"the files to send are {total / 2**20:.0f} MiB, and Ray's Jobs API takes"
            f" {LIMIT >> 20}: the largest are {listing}; submit from a folder that holds your code"
            " alone, or let git ignore them"
        )
    hashes = {file: sha256(path) for file, path in sorted(files.items())}
    content = {"job": job, "config": to_dict(placed), "files": hashes}
    return Frozen(job, f"{job}-{fingerprint('submission', content)[:10]}", placed, files)


def _place(config: JobConfig, cluster: ClusterConfig, name: str | None) -> JobConfig:
    """The config with the cluster's storage, tracking and Ray."""
    root = cluster.storage_root or config.storage.root
    if "://" not in root and not Path(root).is_absolute():
        raise UsageError(
            f"storage.root must be a folder or bucket that all nodes share, got {root!r}; set"
            " storage_root in clusters/ to s3://bucket/prefix"
        )
    placed = replace(
        config,
        storage=replace(config.storage, root=root),
        tracking=replace(config.tracking, uri=cluster.tracking_uri or config.tracking.uri),
        ray=replace(config.ray, address="auto", cpus=None),
    )
    if name is not None and hasattr(placed, "cluster"):
        placed.cluster = name
    for key, value in _strings(to_dict(placed), ""):
        if CREDENTIALS.search(value):
            raise UsageError(
                f"{key} holds a user and password, and many may read a frozen config; put them into"
                " the environment of the nodes"
            )
    return placed


def _user_files(folder: Path) -> list[Path]:
    """The files that git tracks or would add; outside of a repository all files. Hidden files are
    left out.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=folder, capture_output=True, check=True)
        names = [Path(name) for name in os.fsdecode(listing.stdout).split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(folder) for path in folder.rglob("*")]
    return [folder / name for name in names if not _hidden(name) and (folder / name).is_file()]


def _hidden(name: Path) -> bool:
    hidden = any(part[0] == "." or part == "__pycache__" for part in name.parts)
    return hidden or name.suffix == ".pyc"


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All strings in nested dicts and lists, with their dotted keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _strings(item, f"{key}[{i}]")
