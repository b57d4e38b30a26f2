"""Submit a job to a cluster: freeze it, probe the cluster from inside, confirm the price, submit.

A job's id is its content hash and an attempt: the same command attaches to a running job, reports a
job that succeeded, and starts the next attempt after one that failed or was stopped.
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from mesocosm import output
from mesocosm.cluster import records, spec
from mesocosm.cluster.freeze import CONFIG, Frozen, freeze
from mesocosm.cluster.ray_session import FULL, describe
from mesocosm.cluster.records import SubmittedJob
from mesocosm.cluster.remote import OVER, Remote, state_of
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.runs.tracking import console
from mesocosm.runs.upload import JOB

PROBE_S = 180.0
"""Seconds that a cluster may take to report on itself."""
ENTRY = "python -m mesocosm"
PROBE = "python -m mesocosm.cli.cluster_probe"
MARK = "MESOCOSM "
"""The probe's report is the line of its output that starts with this."""
KILL_S = 30.0
"""Seconds after `stop.grace_s` until Ray kills a job that it stops."""


def submit(
    name: str, job: str, config: JobConfig, *, follow: bool, yes: bool, insecure: bool, quiet: bool
) -> dict[str, Any]:
    """Submit `job` to the cluster `name`, or attach to it.

    Args:
        follow: Wait for the job's end, and print its log unless `quiet`.
        yes: Agree to the price without a question.
        insecure: Accept a cluster that answers without a token.

    Returns:
        {"id", "cluster", "state", "attached", "commands"}.
    """
    remote = Remote(name, spec.read(name), insecure=insecure)
    frozen = freeze(job, config, remote.config, Path.cwd(), name)
    state, attempt = last_attempt(remote, frozen.id)
    attached, last = True, f"{frozen.id}-{attempt}"
    if state is not None and state not in OVER:
        console.print(f"{last} is {state.lower()} on {name}: attached, nothing was submitted")
    elif state == "SUCCEEDED" and not config.force:
        fix = "--force makes it again"
        console.print(f"{last} has succeeded on {name}: nothing was submitted; {fix}")
    else:
        attached, state, attempt = False, "PENDING", attempt + 1
        _start(remote, frozen, attempt, yes=yes)
    id = f"{frozen.id}-{attempt}"
    commands = {
        "watch": f"mesocosm jobs logs {id} --follow",
        "fetch": f"mesocosm jobs status {id}",
        "stop": f"mesocosm jobs stop {id}",
    }
    if records.find(id) is None:
        records.write(SubmittedJob(id, job, name, frozen.config.storage.root, time.time()))
    console.print(f"[bold]{id}[/]")
    for verb, command in commands.items():
        console.print(f"  {verb:<6} {command}")

    def write(text: str) -> None:
        if not quiet:
            console.out(text, end="", highlight=False)

    if follow:
        state = remote.follow(id, write)
    return {"id": id, "cluster": name, "state": state, "attached": attached, "commands": commands}


def _start(remote: Remote, frozen: Frozen, attempt: int, *, yes: bool) -> None:
    """Probe the cluster, confirm the price and submit."""
    config = frozen.config
    with tempfile.TemporaryDirectory(prefix="mesocosm-") as folder:
        frozen.write(Path(folder))
        report = probe(remote, folder, frozen.job)
        refuse(remote.name, remote.config, report)
        console.print(
            f"{frozen.job} on {remote.name}: {report['nodes']} nodes,"
            f" {describe(report['resources'])}; {len(frozen.files) + 1} files,"
            f" {frozen.bytes / 2**20:.1f} MiB"
        )
        workers = getattr(getattr(config, "train", None), "workers", 1)
        cost = price(remote.config, report.get("plan", {}), workers)
        if cost is not None:
            console.print(f"  {cost}")
            output.confirm(f"{frozen.job} on cluster {remote.name!r} costs {cost}.", yes=yes)
        id = f"{frozen.id}-{attempt}"
        variables = {
            JOB: id,
            # Without it Ray blocks SIGINT in what the job starts.
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(int(config.stop.grace_s + KILL_S)),
        }
        remote.submit(
            id,
            f"{ENTRY} {frozen.job} -c {CONFIG}{' --force' if config.force else ''}",
            {"working_dir": folder, "env_vars": variables | _full_size(remote.config)},
            {"job": frozen.job, "mesocosm": str(report["mesocosm"])},
        )


def last_attempt(remote: Remote, id: str) -> tuple[str | None, int]:
    """The state and number of the last attempt at the job `id`; (None, 0) without one."""
    attempts = {
        int(match[1]): job
        for job in remote.list()
        if (match := re.fullmatch(rf"{re.escape(id)}-(\d+)", job.submission_id))
    }
    last = max(attempts, default=0)
    return (state_of(attempts[last]) if last else None), last


def probe(remote: Remote, folder: str, job: str | None) -> dict[str, Any]:
    """The report of `cli.cluster_probe`, run on the cluster in a copy of `folder`."""
    id = f"probe-{uuid.uuid4().hex[:10]}"
    env = {"working_dir": folder, "env_vars": _full_size(remote.config)}
    remote.submit(id, f"{PROBE} {job or ''}".strip(), env, {"job": "probe"})
    with console.status(f"asking {remote.name} what it has"):
        ended = remote.wait(id, PROBE_S)
    if not ended:
        remote.stop(id)
        problem = f"cluster {remote.name!r} did not run a probe within {PROBE_S:.0f} s"
        raise MesocosmError(f"{problem}; see `ray job logs {id}` there")
    lines = remote.logs(id).strip().splitlines()
    details = remote.details(id)
    remote.delete(id)
    for line in lines:
        if line.startswith(MARK):
            report: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return report
    reason = lines[-1] if lines else str(details.message if details else "no output")
    raise MesocosmError(f"cluster {remote.name!r} cannot run this code: {reason[:300]}")


def refuse(name: str, cluster: ClusterConfig, report: dict[str, Any]) -> None:
    """Raise UsageError for the first problem of a probe's report, with its fix."""
    import ray

    local_python, remote_python = platform.python_version(), report["python"]
    if remote_python.rsplit(".", 1)[0] != local_python.rsplit(".", 1)[0]:
        problem = f"cluster {name!r} runs Python {remote_python}, and this machine {local_python}"
        raise UsageError(f"{problem}; use the same minor version on both")
    if report["ray"] != ray.__version__:
        problem = f"cluster {name!r} runs Ray {report['ray']}, and this machine {ray.__version__}"
        fix = f"install ray=={report['ray']} here, or {ray.__version__} there"
        raise UsageError(f"{problem}; {fix}")
    for service in ("storage", "mlflow"):
        if not (result := report[service])["ok"]:
            problem = f"cluster {name!r} cannot reach {service}: {result['said']}"
            raise UsageError(f"{problem}; {result['fix']}")
    if "refused" in report:
        kind = UsageError if report["refused"]["exit_code"] == 2 else MesocosmError
        raise kind(f"on cluster {name!r}: {report['refused']['said']}")
    resources = report["resources"]
    for need in report.get("needs", []):
        for key, resource in (("cpus", "CPU"), ("gpus", "GPU")):
            most = max(resources.get(resource, 0), cluster.full(key))
            if need[key] > most:
                problem = f"{need['key']} asks for {need[key]:g} {resource}s"
                fix = "lower it, or use a larger cluster"
                raise UsageError(f"{problem} and cluster {name!r} has {most:g}; {fix}")
    # Nothing states the memory of nodes that an autoscaler adds, unless the cluster's file does.
    full = cluster.full("memory_gib")
    memory = max(resources.get("memory", 0) / 2**30, full)
    least = report.get("plan", {}).get("memory_gib", 0.0)
    if least > memory and (full or not cluster.grows):
        raise UsageError(
            f"the job needs at least {least:.3g} GiB of memory on all nodes together and cluster"
            f" {name!r} grants {memory:.3g}; use a smaller model, fewer workers, a higher"
            " train.zero_stage or a larger cluster"
        )


def _full_size(cluster: ClusterConfig) -> dict[str, str]:
    """The environment variable that states the full size of a cluster that grows."""
    if not cluster.grows:
        return {}
    return {FULL: json.dumps({"CPU": cluster.full("cpus"), "GPU": cluster.full("gpus")})}


def price(cluster: ClusterConfig, plan: dict[str, Any], workers: int = 1) -> str | None:
    """The job's estimated cost as text; None if nodes are free."""
    hourly = cluster.price_per_hour
    if not hourly:
        return None
    hours = plan.get("hours")
    if hours is None and "flops" in plan and "steps" in plan:
        hours = cluster.seconds(float(plan["flops"]), int(plan["steps"]), workers) / 3600
    if hours is None:
        return f"{hourly:g} {cluster.currency} an hour, for an unknown time"
    return f"about {float(hours):.2g} hours, {float(hours) * hourly:.2f} {cluster.currency}"
