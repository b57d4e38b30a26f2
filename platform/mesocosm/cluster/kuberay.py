"""Manifests for `kubectl apply`: a RayCluster, RayJob or RayService, and a NetworkPolicy, from
templates/kuberay.yaml.j2.

The token is in a Secret that the manifests only name. No Service is public, pods run without root,
and only they and KubeRay's operator can reach each other.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from mesocosm import config
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.errors import UsageError

KINDS = ("RayCluster", "RayJob", "RayService")

REMARKS = """\
The token is a Secret, made once from the file that the command line reads:
  kubectl create secret generic {secret} --from-file=auth_token={token}
dashboard-host is 0.0.0.0 inside the pod because the operator and its probes connect from outside.
Only the token gives access: the Service is a ClusterIP, the NetworkPolicy admits the pods of this
cluster and the operator (if your network plugin enforces policies), and you use kubectl
port-forward."""


def render(
    name: str, cluster: ClusterConfig, kind: str, words: Sequence[str] = (), application: str = ""
) -> list[dict[str, Any]]:
    """The documents of a resource of `kind`.

    Args:
        words: What follows `mesocosm` in a RayJob and in a RayService (`serve key=value ...`),
            already checked.
        application: The Serve application's name in a RayService.

    Raises:
        UsageError: The results of a RayJob or RayService would be lost with the pod.
    """
    full_name = f"mesocosm-{name}"
    if kind != "RayCluster" and cluster.storage_root is None:
        problem = f"storage_root=null in clusters/{name}.yaml: what a {kind} writes would be lost"
        raise UsageError(f"{problem} with its pod; set it to s3://bucket/prefix")
    keys = [f"storage.root={cluster.storage_root}"]
    values: dict[str, Any] = {"secret": f"{full_name}-token", "application": application}
    if kind == "RayJob":
        # Another job is another resource.
        full_name += f"-{config.fingerprint(list(words))[:6]}"
        keys = ["ray.address=auto", *keys]
        if cluster.tracking_uri is not None:
            keys.append(f"tracking.uri={cluster.tracking_uri}")
        values["entrypoint"] = shlex.join(["mesocosm", words[0], *keys, *words[1:]])
    elif kind == "RayService":
        full_name += "-service"
        values["arguments"] = dict(word.split("=", 1) for word in (*keys, *words[1:]))
    return fill("kuberay", full_name=full_name, cluster=cluster, kind=kind, **values)


def fill(template: str, **values: Any) -> list[dict[str, Any]]:
    """The documents of templates/TEMPLATE.yaml.j2."""
    # Both are slow to import, and the command line imports this module.
    from importlib.metadata import version

    from jinja2 import Environment, PackageLoader, StrictUndefined

    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    loader = PackageLoader("mesocosm.cluster")
    environment = Environment(loader=loader, undefined=StrictUndefined, **options)
    source = environment.get_template(f"{template}.yaml.j2")
    return list(yaml.safe_load_all(source.render(ray_version=version("ray"), **values)))


def remarks(name: str, cluster: ClusterConfig) -> str:
    """Comments above the documents: what to do before they are applied."""
    token = cluster.token_file.replace("~", "$HOME", 1)
    return REMARKS.format(secret=f"mesocosm-{name}-token", token=token)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(documents: Sequence[dict[str, Any]], remarks: str) -> str:
    """YAML documents with their keys in order, below `remarks` as comments."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in remarks.strip().splitlines())
    texts = (yaml.dump(it, Dumper=_Dumper, sort_keys=False, width=150) for it in documents)
    return head + "---\n".join(texts)
