"""`clusters/<name>.yaml` -> manifests for `kubectl apply`: a RayCluster, a RayJob or a RayService
of KubeRay, and the NetworkPolicy around it.

What it promises: token authentication, from a Secret that is only named here; no Service beyond the
cluster; pods that are not root and may not become it; only the pods themselves and KubeRay's
operator reach them.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from typing import Any

from mesocosm import config
from mesocosm.cluster.spec import HEAD, ClusterConfig, NodeGroup
from mesocosm.cluster.yaml_writer import to_yaml
from mesocosm.errors import UsageError

KINDS = ("RayCluster", "RayJob", "RayService")
LABEL = "mesocosm/cluster"
"""On every pod of one cluster; KubeRay gives a RayJob's and a RayService's cluster a name that
nobody knows before.
"""
DASHBOARD, SERVE = 8265, 8000
IDLE_SECONDS = 600

REMARKS = """\
The token comes from a Secret, made once of the file that the command line reads, too:
  kubectl create secret generic {secret} --from-file=auth_token={token}
dashboard-host is 0.0.0.0 inside the pod because the operator and its probes come from outside of it. No way leads there but the token's:
the Service is a ClusterIP, the NetworkPolicy lets in the pods of this cluster and the operator (if your network plugin enforces policies),
and you come by kubectl port-forward."""


def render(
    name: str, cluster: ClusterConfig, kind: str, words: Sequence[str] = (), application: str = ""
) -> list[dict[str, Any]]:
    """The documents of one `kind`.

    Args:
        words: What follows `mesocosm` in a RayJob and in a RayService (`serve key=value ...`),
            already checked.
        application: The Serve application's name in a RayService.

    Raises:
        UsageError: The results of a RayJob or RayService would be lost with the pod.
    """
    called, secret = f"mesocosm-{name}", _token_secret(name)
    if kind == "RayCluster":
        made = _resource(kind, called, _cluster(called, cluster, secret))
        return [made, _network_policy(called)]
    if cluster.storage_root is None:
        raise UsageError(
            f"storage_root=null in clusters/{name}.yaml: what a {kind} writes would be lost"
            " with its pod; set it to s3://bucket/prefix"
        )
    if kind == "RayJob":
        called += f"-{config.fingerprint(list(words))[:6]}"  # another job is another resource
        spec = _job(called, cluster, secret, words)
    else:
        called += "-service"
        spec = _service(called, cluster, secret, words, application)
    return [_resource(kind, called, spec), _network_policy(called)]


def remarks(name: str, cluster: ClusterConfig) -> str:
    """What to know of the documents, and to do before they are applied."""
    return REMARKS.format(
        secret=_token_secret(name), token=cluster.token_file.replace("~", "$HOME", 1)
    )


def _resource(kind: str, called: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": called, "labels": {LABEL: called}},
        "spec": spec,
    }


def _token_secret(name: str) -> str:
    return f"mesocosm-{name}-token"


def _cluster(called: str, cluster: ClusterConfig, secret: str) -> dict[str, Any]:
    """The spec of a RayCluster."""
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token", "secretName": secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_SECONDS,
            "securityContext": _confined(),
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"cpu": "500m", "memory": "1Gi"},
            },
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(called, cluster, cluster.head),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.kept,
                "minReplicas": group.kept,
                "maxReplicas": group.count,
                "rayStartParams": {},
                "template": _pod(called, cluster, group),
            }
            for group in cluster.workers
        ],
    }


def _confined() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _user() -> dict[str, Any]:
    """The user `ray` of Ray's images."""
    return {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 100,
        "fsGroup": 100,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _pod(called: str, cluster: ClusterConfig, group: NodeGroup) -> dict[str, Any]:
    assert group.memory_gib is not None and cluster.image is not None
    resources = {"cpu": str(group.cpus), "memory": f"{group.memory_gib:g}Gi"} | (
        {"nvidia.com/gpu": str(group.gpus)} if group.gpus else {}
    )
    container: dict[str, Any] = {
        "name": "ray-head" if group.name == HEAD else "ray-worker",
        "image": cluster.image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": _confined(),
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
        "securityContext": _user(),
        "containers": [container],
        # Ray's object store and NCCL: counts as the container's memory.
        "volumes": [
            {
                "name": "shm",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{group.memory_gib / 2:g}Gi"},
            }
        ],
    }
    if group.identity is not None:
        spec["serviceAccountName"] = group.identity
    if group.name != HEAD:
        spec["automountServiceAccountToken"] = (
            False  # the head's autoscaler alone speaks to Kubernetes; a cloud's identity has a token of its own
        )
    if group.instance is not None:
        spec["nodeSelector"] = {"node.kubernetes.io/instance-type": group.instance}
    if group.gpus:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    return {"metadata": {"labels": {LABEL: called}}, "spec": spec}


def _job(called: str, cluster: ClusterConfig, secret: str, words: Sequence[str]) -> dict[str, Any]:
    """A RayJob: a cluster of its own, `mesocosm WORDS` on its head, and the end of both."""
    where = {
        "ray.address": "auto",
        "storage.root": cluster.storage_root,
        "tracking.uri": cluster.tracking_uri,
    }
    return {
        "entrypoint": shlex.join(
            [
                "mesocosm",
                words[0],
                *(f"{key}={value}" for key, value in where.items() if value is not None),
                *words[1:],
            ]
        ),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": IDLE_SECONDS,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": {
            "metadata": {"labels": {LABEL: called}},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": _user(),
                "containers": [
                    {
                        "name": "ray-job-submitter",
                        "image": cluster.image,
                        "resources": {
                            "requests": {"cpu": "500m", "memory": "1Gi"},
                            "limits": {"cpu": "1", "memory": "1Gi"},
                        },
                        "securityContext": _confined(),
                    }
                ],
            },
        },
        "rayClusterSpec": _cluster(called, cluster, secret),
    }


def _service(
    called: str, cluster: ClusterConfig, secret: str, words: Sequence[str], name: str
) -> dict[str, Any]:
    """A RayService: `mesocosm serve`'s application, which KubeRay keeps running. Clients step in it
    from jobs of the same Ray.
    """
    keys = [f"storage.root={cluster.storage_root}", *words[1:]]
    application = {
        "name": name,
        "import_path": "mesocosm.serve.app:build",
        "route_prefix": None,
        "args": {key: value for key, value in (word.split("=", 1) for word in keys)},
    }
    # The proxies run, for KubeRay counts the nodes whose proxy is healthy, but no route leads from
    # them to the application.
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE},
        "applications": [application],
    }
    return {
        "serveConfigV2": to_yaml([serve], ""),
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": _cluster(called, cluster, secret),
    }


def _network_policy(called: str) -> dict[str, Any]:
    """In come the cluster's own pods, and the operator to the dashboard and to Serve's health;
    kubectl port-forward needs no rule.
    """
    operator = {
        "namespaceSelector": {},
        "podSelector": {
            "matchExpressions": [
                {
                    "key": "app.kubernetes.io/component",
                    "operator": "In",
                    "values": ["kuberay-operator"],
                }
            ]
        },
    }
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": called, "labels": {LABEL: called}},
        "spec": {
            "podSelector": {"matchLabels": {LABEL: called}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {LABEL: called}}}]},
                {
                    "from": [operator],
                    "ports": [{"protocol": "TCP", "port": port} for port in (DASHBOARD, SERVE)],
                },
            ],
        },
    }
