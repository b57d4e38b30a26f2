"""`mesocosm doctor`: is this machine, its storage and its tracking ready? A checklist with fixes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from mesocosm import output
from mesocosm.cluster import ray_session
from mesocosm.cluster.checks import Check, guarded, mlflow_check, storage_check
from mesocosm.config import JobConfig
from mesocosm.runs import tracking


def doctor(
    config: JobConfig, *, as_json: bool, cluster: str | None = None, insecure: bool = False
) -> int:
    """Print the checklist of this machine, and of `cluster` as seen from inside; exit status 0 if
    every check passed, 1 otherwise.
    """
    if cluster is None:
        return show(_checks(config), as_json=as_json)
    from mesocosm.cli.cluster_check import checks

    return show(
        itertools.chain(_checks(config), checks(cluster, config, insecure=insecure)),
        as_json=as_json,
    )


def show(found: Iterable[Check], *, as_json: bool) -> int:
    """A line a check, as it comes; exit status 0 if every one passed, 1 otherwise."""
    checks = []
    for check in found:
        checks.append(check)
        if not as_json:
            mark = "[green]ok[/]  " if check.ok else "[red]FIX[/] "
            tracking.console.print(
                f"{mark} {check.name:<12} {check.found}"
                + ("" if check.ok else f"\n     -> {check.fix}")
            )
    if as_json:
        output.write(json.dumps([asdict(check) for check in checks], indent=1))
    return 0 if all(check.ok for check in checks) else 1


def _checks(config: JobConfig) -> Iterator[Check]:
    version = sys.version_info
    yield Check(
        "python", (3, 11) <= version < (3, 13), platform.python_version(), "use Python 3.11 or 3.12"
    )
    for package in (
        "ray",
        "torch",
        "deepspeed",
        "mlflow",
        "gymnasium",
        "mujoco",
        "s3fs",
        "omegaconf",
    ):
        there = importlib.util.find_spec(package) is not None
        yield Check(
            package,
            there,
            importlib.metadata.version(package) if there else "not installed",
            "run `make install`",
        )
    cuda, tools = _cuda(), ray_session.worker_env()["PATH"]
    compiler = next(
        filter(None, (shutil.which(name, path=tools) for name in ("c++", "g++", "clang++"))), None
    )
    yield _built_with(
        "compiler",
        compiler,
        cuda,
        "install a C++ compiler (g++): DeepSpeed may build its CUDA ops with it",
    )
    yield _built_with(
        "ninja",
        shutil.which("ninja", path=tools),
        cuda,
        "run `make install`: ninja is one of its packages",
    )
    yield storage_check(config)
    yield mlflow_check(config)
    yield guarded(
        "ray", lambda: _ray(config), "set ray.address to a cluster that answers, or leave it unset"
    )
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    yield Check(
        "disk",
        free > 5,
        f"{free:.0f} GiB free here",
        "free some space: checkpoints and Ray's files need about 5 GiB",
    )


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _built_with(name: str, found: str | None, cuda: bool, fix: str) -> Check:
    """A tool to compile with: on CPU nothing is compiled (`pretrain.engine.import_deepspeed`)."""
    return Check(
        name,
        found is not None or not cuda,
        found or ("none" if cuda else "none, and not needed on CPU"),
        fix,
    )


def _ray(config: JobConfig) -> str:
    import ray

    ray_session.ensure(config.ray)
    have = ray.cluster_resources()
    return (
        f"{have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs,"
        f" {have.get('memory', 0) / 2**30:.0f} GiB"
    )
