"""`mesocosm jobs`: the jobs that were submitted to clusters.

Ray reports on a job while its cluster answers, storage in any case.
"""

from __future__ import annotations

import json

import click

from mesocosm import output
from mesocosm.cli import options
from mesocosm.errors import MesocosmError, UsageError

PARAMS = (
    click.Argument(["id"], metavar="ID", shell_complete=options.complete_jobs),
    options.CLUSTER,
    options.INSECURE,
    options.JSON,
)


@click.group()
def jobs() -> None:
    """List, watch and stop submitted jobs.

    \b
    Examples:
      mesocosm jobs list
      mesocosm jobs list --cluster aws              include jobs submitted from elsewhere
      mesocosm jobs status pretrain-1a2b3c4d5e-1
      mesocosm jobs logs pretrain-1a2b3c4d5e-1 --follow
      mesocosm jobs stop pretrain-1a2b3c4d5e-1      training writes a checkpoint first
    """


@jobs.command("list", params=[*PARAMS[1:]])
def list_jobs(cluster: str | None, insecure: bool, as_json: bool) -> None:
    """List jobs, the latest first: state, age, progress."""
    from mesocosm.cluster import submitted_jobs

    rows = submitted_jobs.list_jobs(cluster, insecure=insecure)
    if as_json:
        output.write_json(rows)
    elif rows:
        columns = ("id", "cluster", "state", "age", "progress")
        rows = [
            row | {"age": submitted_jobs.age(row["age_s"]), "progress": row["progress"] or ""}
            for row in rows
        ]
        print(output.table([{name: row[name] for name in columns} for row in rows]))
    else:
        print(
            "No job was submitted from this machine. Submit one with `mesocosm JOB --cluster NAME`,"
            " or list all jobs of a cluster with `mesocosm jobs list --cluster NAME`."
        )


@jobs.command(params=[*PARAMS])
def status(id: str, cluster: str | None, insecure: bool, as_json: bool) -> None:
    """Show a job's state, age, progress, artifact and MLflow run."""
    from mesocosm.cluster import submitted_jobs

    output.facts(
        submitted_jobs.status(submitted_jobs.find_job(id, cluster), insecure=insecure), as_json
    )


@jobs.command(params=[*PARAMS])
@click.option("--follow", is_flag=True, help="Continue until the job ends.")
def logs(id: str, cluster: str | None, insecure: bool, as_json: bool, follow: bool) -> int:
    """Print the output of a job's driver."""
    from mesocosm.cluster import submitted_jobs

    record = submitted_jobs.find_job(id, cluster)
    remote = submitted_jobs.connect(record.cluster, insecure=insecure)
    if isinstance(remote, str) or remote.state(record.id) is None:
        text = submitted_jobs.stored_log(record)
        if text is None:
            reason = (
                remote if isinstance(remote, str) else f"cluster {record.cluster!r} has no such job"
            )
            raise MesocosmError(
                f"{record.id} has no log: {reason}, and storage {record.root!r} has none"
            )
        output.write(text, end="" if text.endswith("\n") else "\n")
    elif follow:
        return int(remote.follow(record.id, lambda text: output.write(text, end="")) != "SUCCEEDED")
    else:
        output.write(remote.logs(record.id), end="")
    return 0


@jobs.command(params=[*PARAMS])
def stop(id: str, cluster: str | None, insecure: bool, as_json: bool) -> None:
    """Stop a job. Training writes a checkpoint first."""
    from mesocosm.cluster import submitted_jobs
    from mesocosm.cluster.remote import OVER

    record = submitted_jobs.find_job(id, cluster)
    remote = submitted_jobs.connect(record.cluster, insecure=insecure)
    if isinstance(remote, str):
        raise UsageError(remote)
    state = remote.state(record.id)
    message = f"{record.id} is {str(state or 'unknown').lower()}"
    if state is None or state in OVER:
        message += ": there is nothing to stop"
    else:
        state = submitted_jobs.stop(record, remote)
        message = f"{record.id} is {state.lower()}"
    output.write(json.dumps({"id": record.id, "state": state}) if as_json else message)
