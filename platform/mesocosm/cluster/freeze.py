"""What a submission sends: the composed config, the user's own files and this very package, in one
folder with one content hash.

config.yaml      as composed, for the cluster's storage and tracking
mesocosm/        this package, which stands before whatever the cluster has installed
...              the files of the folder where the user stands, without hidden ones and those that git ignores
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesocosm import config
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import JobConfig, fingerprint, to_dict, to_yaml
from mesocosm.errors import UsageError
from mesocosm.store.files import sha256

CONFIG = "config.yaml"
PACKAGE = Path(__file__).resolve().parents[1]
LIMIT = 100 << 20
"""Bytes that Ray's Jobs API takes in one package (`ray_constants.DASHBOARD_CLIENT_MAX_SIZE`)."""
NAMED = 5
"""Of the largest files, where they are too much together."""
CREDENTIALS = re.compile(r"://[^/\s@:]*:[^/\s@]+@")

UNUSED = {"test", "this", "antigravity", "idlelib", "turtle", "turtledemo"}
"""Modules of Python's that no job imports."""


@dataclass(frozen=True)
class Frozen:
    job: str
    id: str
    """`<job>-<content hash>`, before its attempt"""
    config: JobConfig
    """As it runs on the cluster"""
    files: dict[str, Path]
    """What is sent, by its name there, but for the config"""

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def write(self, folder: Path) -> None:
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / CONFIG).write_text(to_yaml(self.config))


def placed(config: JobConfig, cluster: ClusterConfig, called: str | None = None) -> JobConfig:
    """`config` as it runs on `cluster`: its storage, its tracking, its Ray; estimates are of it,
    where it is `called` something. Raises UsageError for a root or URI that means nothing there.
    """
    root = cluster.storage_root or config.storage.root
    uri = cluster.tracking_uri or config.tracking.uri
    if "://" not in root and not Path(root).is_absolute():
        raise UsageError(
            f"storage.root={root!r} is a folder of this machine; set storage_root in clusters/ to"
            " s3://bucket/prefix or a folder that all its nodes share"
        )
    placed = replace(
        config,
        storage=replace(config.storage, root=root),
        tracking=replace(config.tracking, uri=uri),
        ray=replace(config.ray, address="auto", cpus=None),
    )
    if called is not None and hasattr(placed, "cluster"):
        placed.cluster = called
    for key, value in _strings(to_dict(placed)):
        if CREDENTIALS.search(value):
            raise UsageError(
                f"{key} holds a user and password, and a frozen config is read by many; give them"
                " to the nodes' environment, and leave them out"
            )
    return placed


def freeze(
    job: str,
    given: JobConfig,
    cluster: ClusterConfig,
    folder: Path | None,
    called: str | None = None,
) -> Frozen:
    """`folder`: where the user stands, or None; `called`: the cluster's name, whose file goes
    along. Raises UsageError where the files are more than Ray takes, naming the largest.
    """
    own = placed(given, cluster, called)
    files = {f"mesocosm/{path.relative_to(PACKAGE)}": path for path in _package()}
    for path in sorted(_own(folder)) if folder is not None else []:
        name = str(path.relative_to(folder or path))
        if not name.startswith("mesocosm/") and name != CONFIG:
            files[name] = path
    _check_modules(files)
    if called is not None:
        files[f"clusters/{called}.yaml"] = cluster_spec.path_of(called)
    total = sum(path.stat().st_size for path in files.values())
    if total > LIMIT:
        largest = sorted(files, key=lambda name: -files[name].stat().st_size)[:NAMED]
        named = ", ".join(
            f"{name} ({files[name].stat().st_size / 2**20:.0f} MiB)" for name in largest
        )
        raise UsageError(
            f"the files of {str(folder)!r} are {total / 2**20:.0f} MiB, and Ray's Jobs API takes"
            f" {LIMIT >> 20}: the largest are {named}; submit from a folder that holds your code"
            " alone, or let git ignore them"
        )
    what = {
        "job": job,
        "config": config.to_dict(own),
        "files": {name: sha256(path) for name, path in sorted(files.items())},
    }
    return Frozen(job, f"{job}-{fingerprint('submission', what)[:10]}", own, files)


def _check_modules(files: dict[str, Path]) -> None:
    """Raise UsageError for a file that would replace a module of Python's: Ray puts what is sent
    first in `sys.path`.
    """
    for name in files:
        module, _, rest = name.partition("/")
        if rest != "__init__.py" and (rest or not module.endswith(".py")):
            continue
        module = module.removesuffix(".py")
        if module in sys.stdlib_module_names - UNUSED:
            raise UsageError(
                f"the file {name!r} would replace Python's own module {module!r} on the cluster;"
                " rename it, or let git ignore it"
            )


def _own(folder: Path) -> list[Path]:
    """The user's files: what git tracks or would add, where the folder is in a repository,
    otherwise all; hidden ones are left out.
    """
    try:
        said = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=folder,
            capture_output=True,
            check=True,
        )
        names = [Path(name) for name in os.fsdecode(said.stdout).split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(folder) for path in folder.rglob("*")]
    return [folder / name for name in names if not _hidden(name) and (folder / name).is_file()]


def _hidden(name: Path) -> bool:
    return (
        any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        or name.suffix == ".pyc"
    )


def _package() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and not _hidden(path.relative_to(PACKAGE))
    ]


def _strings(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [
            found
            for key, item in value.items()
            for found in _strings(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in _strings(item, f"{prefix}[{i}]")]
    return [(prefix, value)] if isinstance(value, str) else []
