"""What a cluster says of itself, from inside: `python -m mesocosm.cluster.probe`, run as a Ray
job in the folder that a submission sends.

Prints one line, MARK and JSON. The preflight of a submission, `cluster check` and `doctor
--cluster` are all this.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

MARK = "MESOCOSM "


def told(job: str | None) -> dict[str, Any]:
    """{"python", "ray", "mesocosm": versions, "resources", "storage", "mlflow": {"ok", "said"}, and
    of the frozen job "plan", "needs", or "refused"}.
    """
    import ray

    from mesocosm import __version__, config
    from mesocosm.cli import doctor
    from mesocosm.cli.main import JOBS
    from mesocosm.cluster import ray_session
    from mesocosm.cluster.freeze import CONFIG
    from mesocosm.cluster.resources import needs
    from mesocosm.config import JobConfig, RayConfig
    from mesocosm.runs import tracking

    schema = (
        JobConfig
        if job is None
        else getattr(importlib.import_module(JOBS[job].module), JOBS[job].schema)
    )
    given: Any = config.load(schema, [CONFIG]) if Path(CONFIG).exists() else JobConfig()
    ray_session.ensure(RayConfig(address="auto"))
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "mesocosm": __version__,
    }
    found["resources"] = {
        name: amount
        for name, amount in ray.cluster_resources().items()
        if name in ("CPU", "GPU", "memory")
    }
    found["nodes"] = sum(node["Alive"] for node in ray.nodes())
    for check in (doctor.storage_check(given), doctor.mlflow_check(given)):
        found[check.name] = {"ok": check.ok, "said": tracking.redact(check.found), "fix": check.fix}
    if job is not None:
        found["needs"] = asdict(needs(given))
        try:
            found["plan"] = importlib.import_module(JOBS[job].module).plan(given)
        except Exception as error:
            found["refused"] = {
                "said": tracking.redact(" ".join(str(error).split())),
                "exit_code": getattr(error, "exit_code", 1),
            }
    return found


def main() -> int:
    print(
        MARK + json.dumps(told(sys.argv[1] if len(sys.argv) > 1 else None), default=str), flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
