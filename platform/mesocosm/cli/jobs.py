"""`mesocosm jobs list | status | logs | stop`: what was submitted, from Ray while the cluster
answers and from storage in any case. Light to import.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from mesocosm import output
from mesocosm.config import JobConfig
from mesocosm.errors import MesocosmError, UsageError

EPILOG = """\
examples:
  mesocosm jobs list
  mesocosm jobs list --cluster aws              also those that were submitted from elsewhere
  mesocosm jobs status pretrain-1a2b3c4d5e-1
  mesocosm jobs logs pretrain-1a2b3c4d5e-1 --follow
  mesocosm jobs stop pretrain-1a2b3c4d5e-1      a checkpoint is made first
"""


def add(commands: Any) -> None:
    """Add the command, and its own, to argparse's `commands`."""
    said = "list, watch and stop jobs that were submitted to clusters"
    parser = commands.add_parser(
        "jobs",
        help=said,
        description=said,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str, id: bool) -> Any:
        made = actions.add_parser(name, help=help, description=help)
        if id:
            made.add_argument("id", metavar="ID", help="a job's id, or its beginning")
        made.add_argument(
            "--cluster",
            metavar="NAME",
            help="clusters/NAME.yaml; the one it was submitted to from here",
        )
        made.add_argument(
            "--insecure", action="store_true", help="talk to a cluster that answers without a token"
        )
        made.add_argument("--json", action="store_true", help="machine-readable result on stdout")
        return made

    action("list", "jobs, the latest first: state, age, progress", id=False)
    action("status", "one job: state, age, progress, resources, MLflow's run", id=True)
    action("logs", "what a job's driver said", id=True).add_argument(
        "--follow", action="store_true", help="go on until the job is over"
    )
    action("stop", "end a job, after a checkpoint", id=True)


def run(options: argparse.Namespace) -> int:
    """Exit status: 0; of `logs --follow` 1 where the job failed."""
    return {"list": _list, "status": _status, "logs": _logs, "stop": _stop}[options.action](options)


def _list(options: argparse.Namespace) -> int:
    from mesocosm.cluster import watch

    rows = watch.listed(options.cluster, insecure=options.insecure)
    if options.json:
        output.write(json.dumps(rows, indent=1))
    elif not rows:
        print(
            "no job was submitted from here; mesocosm JOB ... --cluster NAME submits one, --cluster"
            " NAME lists those of others"
        )
    else:
        print(watch.table(rows))
    return 0


def _status(options: argparse.Namespace) -> int:
    from mesocosm.cluster import watch

    found = watch.status(watch.job_of(options.id, options.cluster), insecure=options.insecure)
    if options.json:
        output.write(json.dumps(found, indent=1))
    else:
        width = max(map(len, found))
        for key, value in found.items():
            print(f"{key:<{width}}  {'-' if value is None else value}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    from mesocosm.cluster import watch

    record = watch.job_of(options.id, options.cluster)
    remote = watch.remote_of(record.cluster, insecure=options.insecure)
    if isinstance(remote, str) or remote.state(record.id) is None:
        kept = watch.kept_log(record)
        if kept is None:
            why = (
                remote
                if isinstance(remote, str)
                else f"cluster {record.cluster!r} does not know it"
            )
            raise MesocosmError(
                f"there is no log of {record.id}: {why}, and its storage {record.root!r} has none"
            )
        output.write(kept, end="" if kept.endswith("\n") else "\n")
        return 0
    if options.follow:
        return (
            0
            if remote.follow(record.id, lambda text: output.write(text, end="")) == "SUCCEEDED"
            else 1
        )
    output.write(remote.logs(record.id), end="")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from mesocosm.cluster import watch
    from mesocosm.cluster.remote import OVER

    record = watch.job_of(options.id, options.cluster)
    remote = watch.remote_of(record.cluster, insecure=options.insecure)
    if isinstance(remote, str):
        raise UsageError(remote)
    state = remote.state(record.id)
    if state in OVER or state is None:
        said = (
            f"{record.id} is"
            f" {'not known to ' + record.cluster if state is None else state.lower()}: there is"
            " nothing to stop"
        )
    else:
        grace = watch.ask_to_stop(record)
        end = time.monotonic() + (grace or 0.0)
        while (state := remote.state(record.id)) not in OVER and time.monotonic() < end:
            time.sleep(0.5)
        if state not in OVER:
            remote.stop(record.id)
            end += 0.0 if grace is not None else JobConfig().stop.grace_s
            while (
                state := remote.state(record.id)
            ) not in OVER and time.monotonic() < end + watch.RAYS_OWN:
                time.sleep(0.5)
        state = watch.status(record, insecure=options.insecure)["state"]
        said = f"{record.id} is {str(state).lower()}"
    output.write(json.dumps({"id": record.id, "state": state}) if options.json else said)
    return 0
