"""Is a cluster ready for jobs: `mesocosm cluster check NAME`, and a part of `doctor --cluster
NAME`.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.checks import Check
from mesocosm.cluster.freeze import freeze
from mesocosm.cluster.remote import Remote
from mesocosm.cluster.submit import probe
from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError


def checks(name: str, given: JobConfig, *, insecure: bool) -> Iterator[Check]:
    """One after the other; the first that fails of those that the rest needs is the last. Raises
    UsageError where there is no such cluster.
    """
    import ray

    cluster = cluster_spec.read(name)
    try:
        remote = Remote(name, cluster, insecure=insecure)
    except MesocosmError as error:
        yield Check("cluster", False, str(error).partition("; ")[0], str(error).partition("; ")[2])
        return
    yield Check(
        "cluster",
        True,
        f"{remote.address}, with {'its token' if remote.guarded else 'no token at all'}",
    )
    try:
        with tempfile.TemporaryDirectory(prefix="mesocosm-") as folder:
            freeze("doctor", given, cluster, None).write(Path(folder))
            found = probe(remote, folder, None)
    except MesocosmError as error:
        yield Check(
            "jobs",
            False,
            str(error).partition("; ")[0],
            str(error).partition("; ")[2] or "see the cluster's own logs",
        )
        return
    own, theirs = platform.python_version(), found["python"]
    yield Check(
        "python",
        own.rsplit(".", 1)[0] == theirs.rsplit(".", 1)[0],
        f"{theirs} there, {own} here",
        "use the same minor version on both",
    )
    yield Check(
        "ray",
        found["ray"] == ray.__version__,
        f"{found['ray']} there, {ray.__version__} here",
        "install the same version on both",
    )
    yield Check("mesocosm", True, f"{found['mesocosm']}, as sent from here")
    have, full = found["resources"], {key: cluster.full(key) for key in ("cpus", "gpus")}
    grows = f"; at full size {full['cpus']:g} CPUs, {full['gpus']:g} GPUs" if full["cpus"] else ""
    said = (
        f"{found['nodes']} nodes, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs,"
        f" {have.get('memory', 0) / 2**30:.0f} GiB{grows}"
    )
    yield Check("nodes", have.get("CPU", 0) + full["cpus"] > 0, said, "start worker nodes")
    for what in ("storage", "mlflow"):
        yield Check(what, found[what]["ok"], found[what]["said"], found[what]["fix"])
