"""`mesocosm cluster render|up|down NAME`: what `clusters/NAME.yaml` stands for, started and ended.
Light to import; what it needs it imports when run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mesocosm import output
from mesocosm.errors import MesocosmError, UsageError, nearest

PLACEHOLDER = "your-"
"""What the shipped files have where a user's own must stand."""

DEFAULT_RUN = {"RayJob": "doctor", "RayService": "serve"}
"""What a resource runs without `--run`."""

RENDER = """\
examples:
  mesocosm cluster render aws                                      the config of Ray's cluster launcher
  mesocosm cluster render kuberay | kubectl apply -f -
  mesocosm cluster render kuberay --kind RayJob --run 'pretrain -c configs/pretrain/pendulum.yaml data.datasets=[ID]'
  mesocosm cluster render kuberay --kind RayService --run 'serve world=ID replicas=2'
"""
UP = """\
examples:
  mesocosm cluster up aws --dry-run      what would be started, by which command, at what price; nothing is
  mesocosm cluster up aws
"""
DOWN = """\
examples:
  mesocosm cluster down aws --dry-run
  mesocosm cluster down aws --yes
"""


def add(commands: Any) -> None:
    """Add the command, and its own, to argparse's `commands`."""
    said = "start and end a cluster of clusters/NAME.yaml, or show what it stands for"
    actions = commands.add_parser("cluster", help=said, description=said).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )

    def action(name: str, help: str, epilog: str) -> Any:
        parser = actions.add_parser(
            name,
            help=help,
            description=help,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("name", metavar="NAME", help="clusters/NAME.yaml")
        parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
        return parser

    render = action("render", "the launcher's config, or manifests for kubectl apply", RENDER)
    check = action(
        "check",
        "connect, and look from inside: versions, nodes, storage, MLflow",
        "example:\n  mesocosm cluster check aws",
    )
    check.add_argument(
        "--insecure", action="store_true", help="talk to one that answers without a token"
    )
    render.add_argument(
        "--kind",
        choices=("RayCluster", "RayJob", "RayService"),
        help="of KubeRay: which resource (RayCluster)",
    )
    render.add_argument(
        "--run",
        metavar="WORDS",
        help="of a RayJob or RayService: what follows `mesocosm` (doctor; serve)",
    )
    for name, help, epilog in (
        ("up", "start, or bring up to date, a cluster on EC2", UP),
        ("down", "end a cluster on EC2, and all of its nodes", DOWN),
    ):
        parser = action(name, help, epilog)
        parser.add_argument("--yes", action="store_true", help="do not ask")
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print the config, the command and the price, and do nothing",
        )


def run(options: argparse.Namespace) -> int:
    """Exit status 0; raises UsageError for wrong use, MesocosmError where the launcher fails."""
    return {"render": _render, "up": _launch, "down": _launch, "check": _check}[options.action](
        options
    )


def _check(options: argparse.Namespace) -> int:
    from mesocosm.cli.cluster_check import checks
    from mesocosm.cli.doctor import show
    from mesocosm.config import JobConfig

    return show(checks(options.name, JobConfig(), insecure=options.insecure), as_json=options.json)


def _render(options: argparse.Namespace) -> int:
    from mesocosm.cluster import kuberay, yaml_writer
    from mesocosm.cluster import spec as cluster_spec

    name = options.name
    cluster = cluster_spec.read(name)
    if cluster.where == "kuberay":
        kind = options.kind or "RayCluster"
        words, application = check_run(kind, options.run)
        documents = kuberay.render(name, cluster, kind, words, application)
        remarks = f"{_source(name)}\n{kuberay.remarks(name, cluster)}"
        packed: Any = {"apiVersion": "v1", "kind": "List", "items": documents}
    elif cluster.where == "launcher":
        for flag in ("kind", "run"):
            if (value := getattr(options, flag)) is not None:
                raise UsageError(
                    f"--{flag} {value!r} is of KubeRay, and clusters/{name}.yaml has"
                    " where='launcher'; leave it out"
                )
        from mesocosm.cluster.launcher import launcher_config

        packed = launcher_config(name, cluster)
        documents, remarks = [packed], _source(name)
    else:
        raise UsageError(
            f"clusters/{name}.yaml has where={cluster.where!r}: nothing is made of it; render is"
            " for where=launcher or kuberay"
        )
    output.write(
        json.dumps(packed, indent=1) if options.json else yaml_writer.to_yaml(documents, remarks),
        end="\n" if options.json else "",
    )
    return 0


def check_run(kind: str, run: str | None) -> tuple[list[str], str]:
    """The words of `--run` and, for a RayService, the name of its application.

    Raises:
        UsageError: `kind` cannot run these words.
    """
    from mesocosm import config
    from mesocosm.jobs.registry import JOBS
    from mesocosm.serve import config as serve_config

    if kind == "RayCluster":
        if run is not None:
            raise UsageError(
                f"--run {run!r} is for --kind RayJob or RayService; a RayCluster waits for jobs"
            )
        return [], ""
    words = shlex.split(DEFAULT_RUN[kind] if run is None else run)
    if kind == "RayService":
        if words[:1] != ["serve"] or any("=" not in w or w.startswith("-") for w in words[1:]):
            raise UsageError(
                f"--run {shlex.join(words)!r} cannot be a RayService; use `serve` and key=value,"
                " e.g. --run 'serve world=ID replicas=2'"
            )
        loaded = config.load(serve_config.ServeConfig, overrides=words[1:])
        serve_config.check(loaded)
        return words, loaded.name
    first, known = words[0] if words else "", [*JOBS, "doctor"]
    if first not in known:
        raise UsageError(
            f"--run {shlex.join(words)!r} must begin with a job, got {first!r}; use one of"
            f" {', '.join(known)}{nearest(first, known)}"
        )
    return words, ""


def _source(name: str) -> str:
    return (
        f"Made by `mesocosm cluster render {name}` from clusters/{name}.yaml, which is what to"
        " edit."
    )


def _launch(options: argparse.Namespace) -> int:
    """`ray up` or `ray down` on the config in a private file."""
    from mesocosm.cluster import spec as cluster_spec
    from mesocosm.cluster import yaml_writer
    from mesocosm.cluster.launcher import launcher_config

    name, up = options.name, options.action == "up"
    cluster = cluster_spec.read(name)
    if cluster.where != "launcher":
        raise UsageError(
            f"clusters/{name}.yaml has where={cluster.where!r}, and `{options.action}` drives Ray's"
            f" launcher; {_instead(cluster.where, name, up)}"
        )
    config = launcher_config(name, cluster)
    text = yaml_writer.to_yaml([config], _source(name))
    path = Path.home() / ".cache" / "mesocosm" / "clusters" / f"{name}.yaml"
    command = ["ray", options.action, "--yes", str(path)]
    price = (
        f"{cluster.price_per_hour:g} {cluster.currency} an hour at full size,"
        f" {cluster.idle_price_per_hour:g} while nothing runs"
    )
    facts = {
        "cluster": config["cluster_name"],
        "command": shlex.join(command),
        "nodes": {
            group.name: f"{group.kept} to {group.count} {group.instance}" for group in cluster.nodes
        },
        "price_per_hour": cluster.price_per_hour,
        "idle_price_per_hour": cluster.idle_price_per_hour,
        "currency": cluster.currency,
    }
    if options.dry_run:
        output.write(
            (
                json.dumps(facts | {"config": config}, indent=1)
                if options.json
                else f"# {facts['command']}\n# {price}\n{text}"
            ),
            end="",
        )
        return 0
    if mine := next(_placeholders(cluster), None):
        raise UsageError(
            f"clusters/{name}.yaml: {mine} is the placeholder that was shipped; put your own there"
        )
    ray = shutil.which("ray") or shutil.which("ray", path=str(Path(sys.executable).parent))
    if ray is None:
        raise UsageError("there is no `ray` on PATH; run `make install`")
    if importlib.util.find_spec("boto3") is None:
        raise UsageError(
            "Ray's launcher needs boto3 to speak to EC2; run: pip install -c constraints.txt boto3"
        )
    said = sys.stderr if options.json else sys.stdout
    print(f"{facts['command']}\n{price}", file=said, flush=True)
    output.confirm(f"{'start' if up else 'end'} {config['cluster_name']}?", yes=options.yes)
    if up and cluster_spec.make_token(cluster.token_path):
        print(f"a new token is in {cluster.token_path}", file=said, flush=True)
    _write_private(path, text)
    status = subprocess.run(
        [ray, *command[1:]],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=sys.stderr if options.json else None,
    ).returncode
    if status:
        raise MesocosmError(
            f"`{facts['command']}` failed with status {status}; mend what it says above and run the"
            " same again, and see what runs in EC2's console"
        )
    if options.json:
        output.write(json.dumps(facts, indent=1))
    elif up:
        print(
            f"{cluster.address} is its dashboard, and takes jobs, while this runs in another"
            f" terminal:\n  ray dashboard {shlex.quote(str(path))}"
        )
    return 0


def _instead(where: str, name: str, up: bool) -> str:
    if where == "kuberay":
        return f"run: mesocosm cluster render {name} | kubectl {'apply' if up else 'delete'} -f -"
    return (
        "a job starts its own Ray on this machine"
        if where == "local"
        else "start and end it where it is kept"
    )


def _placeholders(cluster: Any) -> Iterator[str]:
    for block in (cluster, *cluster.nodes):
        for field in dataclasses.fields(block):
            value = getattr(block, field.name)
            if isinstance(value, str) and PLACEHOLDER in value:
                yield f"{field.name}={value!r}"


def _write_private(path: Path, text: str) -> None:
    """The launcher's config names no secret, but where one lies."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
