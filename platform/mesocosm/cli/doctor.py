"""`mesocosm doctor`: is this machine ready, its storage and tracking, and a cluster?"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mesocosm import config, output
from mesocosm.cli import options
from mesocosm.cluster import ray_session, spec
from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError
from mesocosm.store.files import use_cache

if TYPE_CHECKING:
    from mesocosm.cluster.checks import Check

PACKAGES = ["ray", "torch", "deepspeed", "mlflow", "gymnasium", "mujoco", "s3fs", "omegaconf"]


@click.command(
    params=[options.overrides(), options.CONFIG, options.CLUSTER, options.INSECURE, options.JSON]
)
def doctor(
    files: Sequence[str],
    overrides: Sequence[str],
    cluster: str | None,
    insecure: bool,
    as_json: bool,
) -> int:
    """Check this machine, or a cluster.

    Storage and tracking are checked as the config names them, here and inside the cluster.
    """
    loaded = config.load(JobConfig, files, overrides)
    use_cache(loaded.storage.cache)
    checks = [machine_checks(loaded)]
    if cluster is not None:
        checks.append(cluster_checks(cluster, loaded, insecure=insecure))
    return show((check for group in checks for check in group), as_json)


def show(checks: Iterable[Check], as_json: bool) -> int:
    """Print each check as it finishes; returns exit status 0 if all pass."""
    from mesocosm.runs.tracking import console

    results = []
    for check in checks:
        results.append(check)
        if not as_json:
            mark = "[green]ok[/]  " if check.ok else "[red]FIX[/] "
            fix = "" if check.ok else f"\n     -> {check.fix}"
            console.print(f"{mark} {check.name:<12} {check.found}{fix}")
    if as_json:
        output.write_json([asdict(check) for check in results])
    return 0 if all(check.ok for check in results) else 1


def machine_checks(loaded: JobConfig) -> Iterator[Check]:
    from importlib.metadata import version

    from mesocosm.cluster.checks import Check, guarded, mlflow_check, storage_check

    supported = (3, 11) <= sys.version_info < (3, 13)
    yield Check("python", supported, platform.python_version(), "use Python 3.11 or 3.12")
    for package in PACKAGES:
        installed = importlib.util.find_spec(package) is not None
        detail = version(package) if installed else "not installed"
        yield Check(package, installed, detail, "run pip install 'mesocosm[all]'")
    # On CPU nothing is compiled (`train.engine.import_deepspeed`).
    cuda = _has_cuda()
    for name, programs, fix in (
        ("compiler", ("c++", "g++", "clang++"), "install g++: DeepSpeed builds CUDA ops with it"),
        ("ninja", ("ninja",), "run pip install 'mesocosm[train]'"),
    ):
        path = ray_session.worker_env()["PATH"]
        tool = next(filter(None, (shutil.which(program, path=path) for program in programs)), None)
        missing = "none" if cuda else "none, and not needed on CPU"
        yield Check(name, tool is not None or not cuda, tool or missing, fix)
    yield storage_check(loaded)
    yield mlflow_check(loaded)
    yield guarded(
        "ray",
        lambda: _ray_resources(loaded),
        "set ray.address to a cluster that answers, or leave it unset",
    )
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    fix = "free some space: checkpoints and Ray's files need about 5 GiB"
    yield Check("disk", free > 5, f"{free:.0f} GiB free here", fix)


def cluster_checks(name: str, loaded: JobConfig, *, insecure: bool) -> Iterator[Check]:
    """Checks of a cluster, from here and from inside. It ends at the first failure that the later
    checks depend on.

    Raises:
        UsageError: There is no such cluster.
    """
    import ray

    from mesocosm.cluster.checks import Check
    from mesocosm.cluster.freeze import freeze
    from mesocosm.cluster.remote import Remote
    from mesocosm.cluster.submit import probe

    cluster = spec.read(name)
    step = "cluster"
    try:
        remote = Remote(name, cluster, insecure=insecure)
        token = "its token" if remote.guarded else "no token"
        yield Check(step, True, f"{remote.address}, with {token}")
        step = "jobs"
        with tempfile.TemporaryDirectory(prefix="mesocosm-") as folder:
            freeze("doctor", loaded, cluster, None, None).write(Path(folder))
            report = probe(remote, folder, None)
    except MesocosmError as error:
        problem, _, fix = str(error).partition("; ")
        yield Check(step, False, problem, fix or "see the cluster's own logs")
        return
    local_python, remote_python = platform.python_version(), report["python"]
    same = local_python.rsplit(".", 1)[0] == remote_python.rsplit(".", 1)[0]
    fix = "use the same minor version on both"
    yield Check("python", same, f"{remote_python} on the cluster, {local_python} here", fix)
    same = report["ray"] == ray.__version__
    versions = f"{report['ray']} on the cluster, {ray.__version__} here"
    yield Check("ray", same, versions, "install the same version on both")
    yield Check("mesocosm", True, f"{report['mesocosm']}, as sent from here")
    have, cpus, gpus = report["resources"], cluster.full("cpus"), cluster.full("gpus")
    nodes = f"{report['nodes']} nodes, {ray_session.describe(have)}"
    if cpus:
        nodes += f"; at full size {cpus:g} CPUs, {gpus:g} GPUs"
    yield Check("nodes", have.get("CPU", 0) + cpus > 0, nodes, "start worker nodes")
    for service in ("storage", "mlflow"):
        result = report[service]
        yield Check(service, result["ok"], result["said"], result["fix"])


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _ray_resources(loaded: JobConfig) -> str:
    import ray

    ray_session.ensure(loaded.ray)
    return ray_session.describe(ray.cluster_resources())
