"""Manifests for `kubectl apply`: a RayCluster, RayJob or RayService, and a NetworkPolicy.

The token is in a Secret that the manifests only name. No Service is public, pods run without root,
and only they and KubeRay's operator can reach each other.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from mesocosm import config
from mesocosm.cluster.spec import HEAD, ClusterConfig, NodeGroup
from mesocosm.errors import UsageError

KINDS = ("RayCluster", "RayJob", "RayService")
LABEL = "mesocosm/cluster"
"""A label of every pod of a cluster: KubeRay makes up the names of RayJob's and RayService's."""
DASHBOARD, SERVE = 8265, 8000
IDLE_SECONDS = 600
CONFINED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
USER = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 100,
    "fsGroup": 100,
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""The user `ray` of Ray's images."""
SMALL = {"cpu": "500m", "memory": "1Gi"}

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
    full_name, secret = f"mesocosm-{name}", f"mesocosm-{name}-token"
    if kind != "RayCluster" and cluster.storage_root is None:
        problem = f"storage_root=null in clusters/{name}.yaml: what a {kind} writes would be lost"
        raise UsageError(f"{problem} with its pod; set it to s3://bucket/prefix")
    if kind == "RayCluster":
        spec = _cluster(full_name, cluster, secret)
    elif kind == "RayJob":
        # Another job is another resource.
        full_name += f"-{config.fingerprint(list(words))[:6]}"
        spec = _job(full_name, cluster, secret, words)
    else:
        full_name += "-service"
        spec = _service(full_name, cluster, secret, words, application)
    resource = {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": full_name, "labels": {LABEL: full_name}},
        "spec": spec,
    }
    # Copies, so that a caller who changes one document changes no constant of this module.
    return copy.deepcopy([resource, _network_policy(full_name)])


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


def _cluster(full_name: str, cluster: ClusterConfig, secret: str) -> dict[str, Any]:
    """The spec of a RayCluster."""
    from importlib.metadata import version  # slow to import

    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_SECONDS,
            "securityContext": CONFINED,
            "resources": {"requests": SMALL, "limits": SMALL},
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(full_name, cluster, cluster.head),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.min_nodes,
                "minReplicas": group.min_nodes,
                "maxReplicas": group.count,
                "rayStartParams": {},
                "template": _pod(full_name, cluster, group),
            }
            for group in cluster.workers
        ],
    }


def _pod(full_name: str, cluster: ClusterConfig, group: NodeGroup) -> dict[str, Any]:
    assert group.memory_gib is not None and cluster.image is not None
    resources = {"cpu": str(group.cpus), "memory": f"{group.memory_gib:g}Gi"}
    if group.gpus:
        resources["nvidia.com/gpu"] = str(group.gpus)
    # The memory of Ray's object store and NCCL counts as the container's.
    shm = {"medium": "Memory", "sizeLimit": f"{group.memory_gib / 2:g}Gi"}
    container: dict[str, Any] = {
        "name": "ray-head" if group.name == HEAD else "ray-worker",
        "image": cluster.image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": CONFINED,
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if group.name == HEAD:
        ports = {"gcs-server": 6379, "dashboard": DASHBOARD, "client": 10001, "serve": SERVE}
        container["ports"] = [
            {"name": port, "containerPort": number} for port, number in ports.items()
        ]
    if cluster.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": cluster.secret}}]
    spec: dict[str, Any] = {
        "securityContext": USER,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": shm}],
    }
    if group.identity is not None:
        spec["serviceAccountName"] = group.identity
    if group.name != HEAD:
        # Only the head's autoscaler uses Kubernetes' API; a cloud's identity has its own token.
        spec["automountServiceAccountToken"] = False
    if group.instance is not None:
        spec["nodeSelector"] = {"node.kubernetes.io/instance-type": group.instance}
    if group.gpus:
        gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        spec["tolerations"] = [gpu]
    return {"metadata": {"labels": {LABEL: full_name}}, "spec": spec}


def _job(
    full_name: str, cluster: ClusterConfig, secret: str, words: Sequence[str]
) -> dict[str, Any]:
    """The spec of a RayJob: a cluster that runs `mesocosm WORDS` on its head, and ends with it."""
    keys = ["ray.address=auto", f"storage.root={cluster.storage_root}"]
    if cluster.tracking_uri is not None:
        keys.append(f"tracking.uri={cluster.tracking_uri}")
    submitter = {
        "name": "ray-job-submitter",
        "image": cluster.image,
        "resources": {"requests": SMALL, "limits": SMALL | {"cpu": "1"}},
        "securityContext": CONFINED,
    }
    return {
        "entrypoint": shlex.join(["mesocosm", words[0], *keys, *words[1:]]),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": IDLE_SECONDS,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": {
            "metadata": {"labels": {LABEL: full_name}},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": USER,
                "containers": [submitter],
            },
        },
        "rayClusterSpec": _cluster(full_name, cluster, secret),
    }


def _service(
    full_name: str, cluster: ClusterConfig, secret: str, words: Sequence[str], name: str
) -> dict[str, Any]:
    """The spec of a RayService: KubeRay keeps the application of `mesocosm serve` running."""
    keys = [f"storage.root={cluster.storage_root}", *words[1:]]
    application = {
        "name": name,
        "import_path": "mesocosm.serve.app:build",
        "route_prefix": None,
        "args": dict(word.split("=", 1) for word in keys),
    }
    # KubeRay counts the nodes whose proxy is healthy. No proxy has a route to the application.
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE},
        "applications": [application],
    }
    return {
        "serveConfigV2": to_yaml([serve], ""),
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": _cluster(full_name, cluster, secret),
    }


def _network_policy(full_name: str) -> dict[str, Any]:
    """Admit the cluster's own pods, and the operator to the dashboard and to Serve's health.

    kubectl port-forward needs no rule.
    """
    component = "app.kubernetes.io/component"
    expression = {"key": component, "operator": "In", "values": ["kuberay-operator"]}
    operator = {"namespaceSelector": {}, "podSelector": {"matchExpressions": [expression]}}
    ports = [{"protocol": "TCP", "port": port} for port in (DASHBOARD, SERVE)]
    pods = {"matchLabels": {LABEL: full_name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": full_name, "labels": {LABEL: full_name}},
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": pods}]}, {"from": [operator], "ports": ports}],
        },
    }
