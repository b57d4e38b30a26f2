"""Submit a job to a cluster: freeze, look from inside the cluster, ask where it is dear, submit,
follow.

A job's id is its content hash and an attempt: the same command attaches to what runs, says so where
it succeeded, and begins the next attempt where the last one failed or was stopped.
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesocosm import output
from mesocosm.cluster import records
from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.freeze import CONFIG, Frozen, freeze
from mesocosm.cluster.ray_session import FULL
from mesocosm.cluster.records import Record
from mesocosm.cluster.remote import OVER, Remote, state_of
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.runs.tracking import console
from mesocosm.runs.upload import JOB

PROBED = 180.0
"""Seconds that a cluster may take to say of itself what it has."""
ENTRY = "python -m mesocosm"
PROBE = "python -m mesocosm.cli.cluster_probe"
MARK = "MESOCOSM "
"""The line of the probe's output that is its report starts with this."""
TAKEN_BY_RAY = 30.0
"""Seconds beside `stop.grace_s` until Ray kills what it was told to stop."""


@dataclass(frozen=True)
class Asked:
    follow: bool
    yes: bool
    insecure: bool
    as_json: bool


def submit(cluster_name: str, job: str, given: JobConfig, asked: Asked) -> dict[str, Any]:
    """{"id", "cluster", "state", "attached", "commands"}. Raises UsageError before anything is
    sent, and where the cluster cannot run the job.
    """
    cluster = cluster_spec.read(cluster_name)
    remote = Remote(cluster_name, cluster, insecure=asked.insecure)
    frozen = freeze(job, given, cluster, Path.cwd(), cluster_name)
    latest, attempt = last_attempt(remote, frozen.id)
    if latest is not None and latest not in OVER:
        console.print(
            f"{frozen.id}-{attempt} is {latest.lower()} on {cluster_name}: attached, nothing was"
            " submitted"
        )
        return _done(remote, frozen, attempt, latest, asked, attached=True)
    if latest == "SUCCEEDED" and not given.force:
        console.print(
            f"{frozen.id}-{attempt} has succeeded on {cluster_name}: nothing was submitted; --force"
            " makes it again"
        )
        return _done(remote, frozen, attempt, latest, asked, attached=True)
    with tempfile.TemporaryDirectory(prefix="mesocosm-") as folder:
        frozen.write(Path(folder))
        found = probe(remote, folder, job)
        refuse(cluster_name, cluster, found)
        _agree(cluster_name, cluster, found, frozen, asked)
        id = f"{frozen.id}-{attempt + 1}"
        wait = str(int(given.stop.grace_s + TAKEN_BY_RAY))
        told = {
            JOB: id,
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": wait,
        }  # else Ray blocks SIGINT in what it starts
        env = {"working_dir": folder, "env_vars": told | grown(cluster)}
        remote.submit(
            id,
            f"{ENTRY} {job} -c {CONFIG}{' --force' if given.force else ''}",
            env,
            {"job": job, "mesocosm": str(found["mesocosm"])},
        )
    return _done(remote, frozen, attempt + 1, "PENDING", asked, attached=False)


def last_attempt(remote: Remote, id: str) -> tuple[str | None, int]:
    """(state, number) of the last attempt at the job `id` that the cluster knows of; (None, 0)
    where there was none.
    """
    known = {
        int(match[1]): job
        for job in remote.list()
        if (match := re.fullmatch(rf"{re.escape(id)}-(\d+)", job.submission_id))
    }
    if not known:
        return None, 0
    return state_of(known[max(known)]), max(known)


def probe(remote: Remote, folder: str, job: str | None) -> dict[str, Any]:
    """What the cluster says from inside (`cli.cluster_probe`), with what is in `folder`. Raises
    MesocosmError where it does not say it in time.
    """
    id = f"probe-{uuid.uuid4().hex[:10]}"
    remote.submit(
        id,
        f"{PROBE} {job or ''}".strip(),
        {"working_dir": folder, "env_vars": grown(remote.config)},
        {"job": "probe"},
    )
    end, state = time.monotonic() + PROBED, None
    with console.status(f"asking {remote.name} what it has"):
        while (state := remote.state(id)) not in OVER and time.monotonic() < end:
            time.sleep(0.5)
    if state not in OVER:
        remote.stop(id)
        raise MesocosmError(
            f"cluster {remote.name!r} did not answer a look from inside in {PROBED:.0f} s (its job"
            f" is {state}); see `ray job logs {id}` there"
        )
    said = remote.logs(id)
    details = remote.details(id)
    remote.forget(id)
    line = next((line for line in said.splitlines() if line.startswith(MARK)), None)
    if line is None:
        why = (said.strip().splitlines() or [str(details.message if details else "no word")])[-1]
        raise MesocosmError(f"cluster {remote.name!r} cannot run this code: {why[:300]}")
    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return found


def refuse(name: str, cluster: ClusterConfig, found: dict[str, Any]) -> None:
    """Raise UsageError for the first thing that stands in the way, with its fix."""
    import ray

    own = platform.python_version()
    if found["python"].rsplit(".", 1)[0] != own.rsplit(".", 1)[0]:
        raise UsageError(
            f"cluster {name!r} runs Python {found['python']}, and this machine {own}; use the same"
            " minor version on both"
        )
    if found["ray"] != ray.__version__:
        raise UsageError(
            f"cluster {name!r} runs Ray {found['ray']}, and this machine {ray.__version__}; install"
            f" ray=={found['ray']} here, or {ray.__version__} there"
        )
    for what in ("storage", "mlflow"):
        if not found[what]["ok"]:
            raise UsageError(
                f"cluster {name!r} cannot reach {what}: {found[what]['said']}; {found[what]['fix']}"
            )
    if "refused" in found:
        raise (UsageError if found["refused"]["exit_code"] == 2 else MesocosmError)(
            f"on cluster {name!r}: {found['refused']['said']}"
        )
    asks = found.get("needs")
    if asks is not None:
        for key, resource, unit in (("cpus", "CPU", "CPUs"), ("gpus", "GPU", "GPUs")):
            most = max(found["resources"].get(resource, 0), cluster.full(key))
            if asks[key] > most:
                raise UsageError(
                    f"{asks['what']} asks for {asks[key]:g} {unit} and cluster {name!r} has"
                    f" {most:g}; lower it, or use a larger cluster"
                )
    wanted, memory = (
        found.get("plan", {}).get("memory_gib", 0.0),
        max(found["resources"].get("memory", 0) / 2**30, cluster.full("memory_gib")),
    )
    if wanted > memory and (
        cluster.full("memory_gib") or not cluster.grows
    ):  # else nothing says the memory of nodes to come
        said = (
            f"the job wants at least {wanted:.3g} GiB of memory on all nodes together and cluster"
            f" {name!r} grants {memory:.3g}"
        )
        raise UsageError(
            f"{said}; take a smaller model, fewer workers or a higher train.zero_stage, or use a"
            " larger cluster"
        )


def grown(cluster: ClusterConfig) -> dict[str, str]:
    """What a job must be told of a cluster that grows, in its environment."""
    return (
        {FULL: json.dumps({"CPU": cluster.full("cpus"), "GPU": cluster.full("gpus")})}
        if cluster.grows
        else {}
    )


def price(cluster: ClusterConfig, plan: dict[str, Any], workers: int = 1) -> str | None:
    """What the job will cost, in words; None where nodes are free."""
    hourly = cluster.price_per_hour
    if not hourly:
        return None
    hours = plan.get("hours")
    if hours is None and "flops" in plan and "steps" in plan:
        hours = cluster.seconds(float(plan["flops"]), int(plan["steps"]), workers) / 3600
    if hours is None:
        return (
            f"{hourly:g} {cluster.currency} an hour for as long as it runs, which is not foretold"
        )
    return f"about {float(hours):.2g} hours, {float(hours) * hourly:.2f} {cluster.currency}"


def _agree(
    name: str, cluster: ClusterConfig, found: dict[str, Any], frozen: Frozen, asked: Asked
) -> None:
    """Say what will run and what it costs; raises UsageError where nobody can agree to a price,
    MesocosmError where somebody doesn't.
    """
    console.print(
        f"{frozen.job} on {name}: {found['nodes']} nodes, {found['resources'].get('CPU', 0):g}"
        f" CPUs, {found['resources'].get('GPU', 0):g} GPUs; {len(frozen.files) + 1} files,"
        f" {frozen.bytes / 2**20:.1f} MiB"
    )
    train = getattr(frozen.config, "train", None)
    cost = price(cluster, found.get("plan", {}), getattr(train, "workers", 1))
    if cost is None:
        return
    console.print(f"  {cost}")
    output.confirm(f"{frozen.job} on cluster {name!r} costs {cost}.", yes=asked.yes)


def _done(
    remote: Remote, frozen: Frozen, attempt: int, state: str, asked: Asked, *, attached: bool
) -> dict[str, Any]:
    id = f"{frozen.id}-{attempt}"
    commands = {
        "watch": f"mesocosm jobs logs {id} --follow",
        "fetch": f"mesocosm jobs status {id}",
        "stop": f"mesocosm jobs stop {id}",
    }
    if records.find(id) is None:
        records.keep(Record(id, frozen.job, remote.name, frozen.config.storage.root, time.time()))
    console.print(f"[bold]{id}[/]")
    for what, command in commands.items():
        console.print(f"  {what:<6} {command}")
    if asked.follow:
        state = remote.follow(
            id, lambda text: None if asked.as_json else console.out(text, end="", highlight=False)
        )
    return {
        "id": id,
        "cluster": remote.name,
        "state": state,
        "attached": attached,
        "commands": commands,
    }
