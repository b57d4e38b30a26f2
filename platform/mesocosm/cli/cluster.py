"""`mesocosm cluster`: show, start, end and check what `clusters/NAME.yaml` describes."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mesocosm import config, output
from mesocosm.cli import options
from mesocosm.cli.doctor import cluster_checks, show
from mesocosm.cluster import kuberay, spec
from mesocosm.cluster.ec2_launcher import launcher_config
from mesocosm.cluster.kuberay import to_yaml
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.jobs.registry import JOBS
from mesocosm.serve import config as serve_config

PLACEHOLDER = "your-"
"""The shipped files contain this where a user's own value belongs."""

DEFAULT_RUN = {"RayJob": "doctor", "RayService": "serve"}
"""The job that a resource runs without `--run`."""

NAME = click.Argument(["name"], metavar="NAME", shell_complete=options.complete_clusters)


@click.group()
def cluster() -> None:
    """Start, end, check or render a cluster."""


@cluster.command(params=[NAME, options.INSECURE, options.JSON])
def check(name: str, insecure: bool, as_json: bool) -> int:
    """Connect, and report versions, nodes, storage and MLflow from inside.

    \b
    Example:
      mesocosm cluster check aws
    """
    return show(cluster_checks(name, config.JobConfig(), insecure=insecure), as_json)


@cluster.command(params=[NAME, options.JSON])
@click.option("--kind", type=click.Choice(kuberay.KINDS), help="The KubeRay resource (RayCluster).")
@click.option("--run", metavar="WORDS", help="Words after `mesocosm` in a RayJob or RayService.")
def render(name: str, kind: str | None, run: str | None, as_json: bool) -> None:
    """Print the launcher's config, or manifests for kubectl apply.

    \b
    Examples:
      mesocosm cluster render aws
      mesocosm cluster render kuberay | kubectl apply -f -
      mesocosm cluster render kuberay --kind RayJob --run 'pretrain -c FILE data.datasets=[ID]'
      mesocosm cluster render kuberay --kind RayService --run 'serve world=ID replicas=2'
    """
    cluster = spec.read(name)
    remarks = _source(name)
    if cluster.where == "kuberay":
        kind = kind or "RayCluster"
        documents = kuberay.render(name, cluster, kind, *check_run(kind, run))
        remarks += f"\n{kuberay.remarks(name, cluster)}"
        result: Any = {"apiVersion": "v1", "kind": "List", "items": documents}
    elif cluster.where == "launcher":
        for flag, value in (("kind", kind), ("run", run)):
            if value is not None:
                problem = f"--{flag} {value!r} is for KubeRay, and clusters/{name}.yaml has"
                raise UsageError(f"{problem} where='launcher'; leave it out")
        result = launcher_config(name, cluster)
        documents = [result]
    else:
        problem = f"clusters/{name}.yaml must have where=launcher or kuberay to be rendered"
        raise UsageError(f"{problem}, got where={cluster.where!r}")
    if as_json:
        output.write_json(result)
    else:
        output.write(to_yaml(documents, remarks), end="")


def check_run(kind: str, run: str | None) -> tuple[list[str], str]:
    """The words of `--run` and, for a RayService, the name of its application.

    Raises:
        UsageError: `kind` cannot run these words.
    """
    if kind == "RayCluster":
        if run is not None:
            fix = "a RayCluster waits for jobs"
            raise UsageError(f"--run {run!r} is for --kind RayJob or RayService; {fix}")
        return [], ""
    words = shlex.split(DEFAULT_RUN[kind] if run is None else run)
    if kind == "RayService":
        if words[:1] != ["serve"] or any("=" not in w or w.startswith("-") for w in words[1:]):
            fix = "use `serve` and key=value, e.g. --run 'serve world=ID replicas=2'"
            raise UsageError(f"--run {shlex.join(words)!r} cannot be a RayService; {fix}")
        loaded = config.load(serve_config.ServeConfig, overrides=words[1:])
        serve_config.check(loaded)
        return words, loaded.name
    first, known = words[0] if words else "", [*JOBS, "doctor"]
    if first not in known:
        problem = f"--run {shlex.join(words)!r} must begin with a job, got {first!r}"
        raise UsageError(f"{problem}; use one of {', '.join(known)}{nearest(first, known)}")
    return words, ""


def _source(name: str) -> str:
    return f"Made by `mesocosm cluster render {name}` from clusters/{name}.yaml: edit that file."


LAUNCH = (NAME, options.DRY_RUN, options.YES, options.JSON)


@cluster.command(params=[*LAUNCH])
def up(name: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Start a cluster on EC2, or bring it up to date.

    \b
    Examples:
      mesocosm cluster up aws --dry-run      the config, the command and the price
      mesocosm cluster up aws
    """
    cluster = _launcher_cluster(name, "apply")
    path = _launch("up", name, cluster, dry_run, yes, as_json)
    if not dry_run and not as_json:
        print(
            f"Its dashboard is {cluster.address}, which takes jobs while this runs in another"
            f" terminal:\n  ray dashboard {shlex.quote(str(path))}"
        )


@cluster.command(params=[*LAUNCH])
def down(name: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """End a cluster on EC2, and all of its nodes.

    \b
    Examples:
      mesocosm cluster down aws --dry-run
      mesocosm cluster down aws --yes
    """
    _launch("down", name, _launcher_cluster(name, "delete"), dry_run, yes, as_json)


def _launcher_cluster(name: str, kubectl: str) -> spec.ClusterConfig:
    """The cluster `name`. Raises UsageError where Ray's launcher cannot start it."""
    cluster = spec.read(name)
    fixes = {
        "kuberay": f"run: mesocosm cluster render {name} | kubectl {kubectl} -f -",
        "local": "a job starts its own Ray on this machine",
        "address": "start and end it where it is managed",
    }
    if cluster.where in fixes:
        problem = f"clusters/{name}.yaml must have where=launcher, got where={cluster.where!r}"
        raise UsageError(f"{problem}; {fixes[cluster.where]}")
    return cluster


def _launch(
    action: str, name: str, cluster: spec.ClusterConfig, dry_run: bool, yes: bool, as_json: bool
) -> Path:
    """Run `ray up` or `ray down` on the config in a private file, whose path it returns."""
    launcher = launcher_config(name, cluster)
    text = to_yaml([launcher], _source(name))
    path = Path.home() / ".cache" / "mesocosm" / "clusters" / f"{name}.yaml"
    command = ["ray", action, "--yes", str(path)]
    facts: dict[str, Any] = {
        "cluster": launcher["cluster_name"],
        "command": shlex.join(command),
        "nodes": {g.name: f"{g.min_nodes} to {g.count} {g.instance}" for g in cluster.nodes},
        **{key: getattr(cluster, key) for key in ("price_per_hour", "idle_price_per_hour")},
        "currency": cluster.currency,
    }
    price = (
        f"{cluster.price_per_hour:g} {cluster.currency} an hour at full size,"
        f" {cluster.idle_price_per_hour:g} while nothing runs"
    )
    if dry_run:
        if as_json:
            output.write_json(facts | {"config": launcher})
        else:
            output.write(f"# {facts['command']}\n# {price}\n{text}", end="")
        return path
    if placeholder := next(_placeholders(cluster), None):
        problem = f"clusters/{name}.yaml: {placeholder} is the shipped placeholder"
        raise UsageError(f"{problem}; put your own there")
    ray = shutil.which("ray") or shutil.which("ray", path=str(Path(sys.executable).parent))
    if ray is None:
        raise UsageError("there is no `ray` on PATH; run pip install 'mesocosm[all]'")
    if importlib.util.find_spec("boto3") is None:
        fix = "run: pip install -c constraints.txt boto3"
        raise UsageError(f"Ray's launcher needs boto3 to speak to EC2; {fix}")
    print(f"{facts['command']}\n{price}", flush=True)
    output.confirm(f"{'start' if action == 'up' else 'end'} {facts['cluster']}?", yes=yes)
    if action == "up" and spec.make_token(cluster.token_path):
        print(f"a new token is in {cluster.token_path}", flush=True)
    spec.write_private(path, text, os.O_TRUNC)
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    if status := subprocess.run([ray, *command[1:]], env=env).returncode:
        fix = "correct what it reports above, run the same again, and look at EC2's console"
        raise MesocosmError(f"`{facts['command']}` failed with status {status}; {fix}")
    if as_json:
        output.write_json(facts)
    return path


def _placeholders(cluster: spec.ClusterConfig) -> Iterator[str]:
    for block in (cluster, *cluster.nodes):
        for key, value in vars(block).items():
            if isinstance(value, str) and PLACEHOLDER in value:
                yield f"{key}={value!r}"
