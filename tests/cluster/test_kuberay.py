"""KubeRay's manifests, against its published CRDs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mesocosm.cli.cluster import check_run
from mesocosm.cluster import kuberay, spec
from mesocosm.errors import UsageError

from .conftest import KUBERAY, Reader

CRDS = Path(__file__).resolve().parents[3] / "shared" / "data" / "kuberay"
published = pytest.mark.skipif(not CRDS.is_dir(), reason="no CRDs beside the repository")
kinds = pytest.mark.parametrize("kind", kuberay.KINDS)


def strict(schema: Any) -> Any:
    """The schema as the API server applies it: a key that it does not name is an error, and some
    numbers may be strings.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    resolved = {key: strict(value) for key, value in schema.items()}
    if isinstance(resolved.get("properties"), dict) and "type" in resolved:
        unknown = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        resolved.setdefault("additionalProperties", unknown)
    return resolved


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """KubeRay's schema of each kind, with the parts that every resource has."""
    schemas = {}
    for kind in kuberay.KINDS:
        text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
        crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        versions = {version["name"]: version for version in crd["spec"]["versions"]}
        schema = versions["v1"]["schema"]["openAPIV3Schema"]
        metadata = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        schema["properties"]["metadata"] = metadata
        schemas[kind] = strict(schema)
    return schemas


def rendered(
    kind: str, words: str | None = None, cluster: spec.ClusterConfig | None = None
) -> list[dict[str, Any]]:
    """The documents as kubectl reads them."""
    run = check_run(kind, words)
    documents = kuberay.render("kuberay", cluster or spec.read("kuberay"), kind, *run)
    text = kuberay.to_yaml(documents, "a remark")
    assert list(yaml.safe_load_all(text)) == documents
    return documents


def validate(value: Any, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(value)


@published
@kinds
def test_kuberay_accepts_the_manifest(schemas: dict[str, Any], kind: str) -> None:
    resource, policy = rendered(kind)
    assert resource["kind"] == kind
    validate(resource, schemas[kind])
    # KubeRay has no schema of a NetworkPolicy, but its rules are in the RayCluster's.
    rules = schemas["RayCluster"]
    for key in ("spec", "networkPolicy", "head", "ingressRules"):
        rules = rules["properties"][key]
    validate(policy["spec"]["ingress"], rules)


CONTAINER = ("template", "spec", "containers", 0)


@published
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("authOptions", "mode"), "tocken"),
        (("authOption",), {}),
        (("headGroupSpec", *CONTAINER, "resources", "limit"), {}),
        (("workerGroupSpecs", 0, "maxReplicas"), "4"),
        (("workerGroupSpecs", 0, *CONTAINER, "securityContext", "runAsNonRot"), True),
    ],
)
def test_the_schema_finds_a_typo(
    schemas: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    resource, _ = rendered("RayCluster")
    node: Any = resource["spec"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(resource, schemas["RayCluster"])


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = resource["spec"]
    return next((spec[key] for key in ("rayClusterSpec", "rayClusterConfig") if key in spec), spec)


def key_values(node: Any) -> list[tuple[str, Any]]:
    """Every key of a document, at any depth, with its value."""
    if isinstance(node, list):
        return [pair for item in node for pair in key_values(item)]
    if not isinstance(node, dict):
        return []
    return [*node.items(), *(pair for value in node.values() for pair in key_values(value))]


PUBLIC = {"LoadBalancer", "NodePort", "Ingress", "Secret"}
OPEN = {"enableIngress", "hostNetwork", "hostPort", "hostPath", "privileged", "runtimeEnvYAML"}


@kinds
def test_manifests_are_closed(kind: str) -> None:
    resource, policy = rendered(kind)
    spec, pairs = cluster_spec(resource), key_values(resource)
    assert spec["authOptions"] == {"mode": "token", "secretName": "mesocosm-kuberay-token"}
    assert spec["rayVersion"].startswith("2.60")
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {value for _, value in pairs if isinstance(value, str)} & PUBLIC
    assert not {key for key, _ in pairs} & OPEN
    pods = [value for key, value in pairs if key in ("template", "submitterPodTemplate")]
    assert len(pods) == 2 + (kind == "RayJob")
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    for pod in pods:
        user = pod["spec"]["securityContext"]
        assert user["runAsNonRoot"] and user["runAsUser"] > 0
        assert pod["metadata"]["labels"].items() >= selected, "the policy is of every pod"
        for container in pod["spec"]["containers"]:
            confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == confined
            limits, requests = (container["resources"][key] for key in ("limits", "requests"))
            assert limits.keys() == requests.keys() >= {"cpu", "memory"}
            names = [variable["name"] for variable in container.get("env", [])]
            assert not re.search("TOKEN|KEY|SECRET|PASSWORD", " ".join(names))
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    for rule in policy["spec"]["ingress"]:
        assert rule["from"]
        assert all("podSelector" in source and "ipBlock" not in source for source in rule["from"])


def test_pods_of_kuberay() -> None:
    spec = cluster_spec(rendered("RayCluster")[0])
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] < group["maxReplicas"]
    head, worker = spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]
    limits = [pod["containers"][0]["resources"]["limits"] for pod in (head, worker)]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == [None, "1"]
    for pod in (head, worker):
        mount = pod["containers"][0]["volumeMounts"][0]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        assert mount["mountPath"] == "/dev/shm" and volumes[mount["name"]]["medium"] == "Memory"
    assert worker["automountServiceAccountToken"] is False
    assert head["serviceAccountName"] != worker["serviceAccountName"]


def test_storage_credentials_are_named_and_not_held(cluster_of: Reader) -> None:
    cluster = cluster_of(KUBERAY, "image:", "secret: s3-credentials\nimage:")
    spec = cluster_spec(rendered("RayCluster", cluster=cluster)[0])
    for pod in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
        source = {"secretRef": {"name": "s3-credentials"}}
        assert pod["spec"]["containers"][0]["envFrom"] == [source]
        assert "serviceAccountName" not in pod["spec"]


def test_a_job_runs_its_words_on_a_new_cluster(cluster_of: Reader) -> None:
    words = "pretrain -c configs/pretrain/pendulum.yaml 'data.datasets=[d0]'"
    cluster = cluster_of(KUBERAY, "image:", "tracking_uri: http://mlflow:5000\nimage:")
    job, again, other = (rendered("RayJob", w, cluster)[0] for w in (words, words, "doctor"))
    keys = "ray.address=auto storage.root=s3://b/p tracking.uri=http://mlflow:5000"
    entrypoint = f"mesocosm pretrain {keys} {words.removeprefix('pretrain ')}"
    assert job["spec"]["entrypoint"] == entrypoint
    assert job["spec"]["shutdownAfterJobFinishes"] and "runtimeEnvYAML" not in job["spec"]
    assert again["metadata"] == job["metadata"] != other["metadata"]


def test_ray_serve_accepts_a_service() -> None:
    from ray.serve.schema import ServeDeploySchema

    service, _ = rendered("RayService", "serve world=w0 replicas=2 name=robots")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert (application.name, application.route_prefix) == ("robots", None)
    assert application.import_path == "mesocosm.serve.app:build"
    root = {"storage.root": "s3://your-bucket/mesocosm"}
    assert application.args == root | {"world": "w0", "replicas": "2", "name": "robots"}


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("RayCluster", "doctor", "is for --kind RayJob or RayService"),
        ("RayJob", "pretrian -c x", "begin with a job, got 'pretrian'; .*did you mean 'pretrain'"),
        ("RayJob", "", "must begin with a job, got ''"),
        ("RayService", "pretrain", "cannot be a RayService; use `serve` and key=value"),
        ("RayService", "serve -c x.yaml", "cannot be a RayService"),
        ("RayService", "serve replcas=2", "unknown config key 'replcas'; did you mean 'replicas'"),
        ("RayService", "serve replicas=0", "serve.replicas must be >= 1, got 0"),
    ],
)
def test_words_that_no_kind_can_run(kind: str, words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rendered(kind, words)


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_results_on_a_pods_disk_are_refused(cluster_of: Reader, kind: str) -> None:
    message = f"storage_root=null .*: what a {kind} writes would be lost with its pod"
    with pytest.raises(UsageError, match=message):
        rendered(kind, cluster=cluster_of(KUBERAY, "storage_root: s3://b/p\n", ""))
