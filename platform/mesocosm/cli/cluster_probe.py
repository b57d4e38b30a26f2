"""The report of a cluster from inside, as a Ray job in the folder that a submission sends:
`python -m mesocosm.cli.cluster_probe [JOB]`.

Prints one line, MARK and JSON, for the preflight of a submission, `cluster check` and `doctor
--cluster`.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import ray

from mesocosm import __version__, config
from mesocosm.cluster import ray_session
from mesocosm.cluster.checks import mlflow_check, storage_check
from mesocosm.cluster.freeze import CONFIG
from mesocosm.cluster.submit import MARK
from mesocosm.config import JobConfig, RayConfig
from mesocosm.jobs.registry import JOBS
from mesocosm.runs import tracking


def report(job: str | None) -> dict[str, Any]:
    """{"python", "ray", "mesocosm": versions, "nodes", "resources", "storage", "mlflow": {"ok",
    "said", "fix"}, and of the frozen job "needs", "plan" or "refused"}.
    """
    declared = None if job is None else importlib.import_module(JOBS[job].module).JOB
    schema = JobConfig if declared is None else declared.config
    loaded: Any = config.load(schema, [CONFIG]) if Path(CONFIG).exists() else JobConfig()
    ray_session.ensure(RayConfig(address="auto"))
    resources = ray.cluster_resources()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "mesocosm": __version__,
        "resources": {k: resources[k] for k in ("CPU", "GPU", "memory") if k in resources},
        "nodes": sum(node["Alive"] for node in ray.nodes()),
    }
    for check in (storage_check(loaded), mlflow_check(loaded)):
        facts[check.name] = {"ok": check.ok, "said": tracking.redact(check.found), "fix": check.fix}
    if declared is not None:
        try:
            facts["plan"], needs = declared.preview(loaded)
            facts["needs"] = [
                {"key": key, "cpus": cpus, "gpus": gpus} for key, (cpus, gpus) in needs.items()
            ]
        except Exception as error:
            message = tracking.redact(" ".join(str(error).split()))
            facts["refused"] = {"said": message, "exit_code": getattr(error, "exit_code", 1)}
    return facts


if __name__ == "__main__":
    job = sys.argv[1] if len(sys.argv) > 1 else None
    print(MARK + json.dumps(report(job), default=str), flush=True)
