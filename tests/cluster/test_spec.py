"""Cluster files, what is rendered of them, and the image: against Ray's own schema, bootstrap and
EC2 provider, and KubeRay's CRDs.
"""

from __future__ import annotations

import copy
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mesocosm.cli.cluster import check_run
from mesocosm.cluster import kuberay, yaml_writer
from mesocosm.cluster import spec as clusters
from mesocosm.cluster.launcher import TOKEN, launcher_config
from mesocosm.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
CRDS = REPOSITORY.parent / "shared" / "data" / "kuberay"
published = pytest.mark.skipif(not CRDS.is_dir(), reason="no CRDs beside the repository")

NODES = """nodes:
  - {name: gpu, count: 4, min_count: 1, cpus: 8, gpus: 1, price_per_hour: 1, PART}
  - {name: head, cpus: 4, price_per_hour: 0.5, HEAD}
"""
LAUNCHER = (
    "where: launcher\naddress: http://127.0.0.1:8265\nimage: r/i:1\nregion: us-west-2\nami: ami-1\n"
    + NODES.replace("PART", "instance: g6.2xlarge, spot: true").replace(
        "HEAD", "instance: m7i.xlarge"
    )
)
KUBERAY = (
    "where: kuberay\naddress: http://127.0.0.1:8265\nimage: r/i:1\nstorage_root: s3://b/p\n"
    + NODES.replace("PART", "memory_gib: 26").replace("HEAD", "memory_gib: 12")
)


@pytest.fixture
def cluster_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., clusters.ClusterConfig]:
    """Reads a text, after replacements, as the file of the cluster `mine`."""
    monkeypatch.setattr(clusters, "FOLDERS", (tmp_path,))

    def read(text: str, *changes: tuple[str, str]) -> clusters.ClusterConfig:
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        (tmp_path / "mine.yaml").write_text(text)
        return clusters.read("mine")

    return read


def test_it_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys, mesocosm.cluster.spec, mesocosm.cli.cluster, mesocosm.cluster.kuberay,"
        " mesocosm.cluster.launcher"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}; assert not {{'ray', 'torch', 'boto3'}} & set(sys.modules)",
        ],
        check=True,
        timeout=120,
    )


def test_what_is_shipped() -> None:
    shipped = {
        path.stem: clusters.read(path.stem) for path in (REPOSITORY / "clusters").glob("*.yaml")
    }
    assert {name: cluster.where for name, cluster in shipped.items()} == {
        "aws": "launcher",
        "kuberay": "kuberay",
        "local": "local",
    }
    assert all(
        cluster.slots >= 1 and cluster.idle_price_per_hour <= cluster.price_per_hour
        for cluster in shipped.values()
    )


def test_estimates_and_autoscaling_read_the_same_groups(
    cluster_of: Callable[..., clusters.ClusterConfig],
) -> None:
    cluster = cluster_of(LAUNCHER)
    assert (cluster.slots, cluster.price_per_hour, cluster.idle_price_per_hour) == (4, 4.5, 1.5)
    assert cluster.head.name == "head" and [group.name for group in cluster.workers] == ["gpu"]
    assert cluster.grows and (
        cluster.full("cpus"),
        cluster.full("gpus"),
        cluster.full("memory_gib"),
    ) == (32, 4, 0)
    others = cluster_of(
        "where: address\naddress: http://127.0.0.1:1\nnodes: [{name: n, count: 3, cpus: 2}]"
    )
    assert not others.grows and others.full("cpus") == 0, "what is there is what there is"
    growing = cluster_of(
        "where: address\naddress: http://127.0.0.1:1\nnodes: [{name: n, count: 3, min_count: 0,"
        " cpus: 2}]"
    )
    assert growing.grows and growing.full("cpus") == 6


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (
            LAUNCHER,
            ("where: launcher", "where: lancher"),
            r"where must be one of local, .*, got 'lancher'; did you mean 'launcher'",
        ),
        (LAUNCHER, ("region:", "regoin:"), r"unknown config key 'regoin'; did you mean 'region'"),
        (LAUNCHER, ("ami: ami-1\n", ""), r"ami must be a machine image .*, got None"),
        (LAUNCHER, ("address: http://127.0.0.1:8265\n", ""), r"address must be .*, got None"),
        (LAUNCHER, ("instance: g6.2xlarge, ", ""), r"nodes.gpu.instance must be .*, got None"),
        (LAUNCHER, ("cpus: 8", "cpus: null"), r"nodes.gpu.cpus must be .*, got None"),
        (LAUNCHER, ("gpus: 1", "gpus: null"), r"nodes.gpu.gpus must be .*, got null"),
        (
            LAUNCHER,
            ("region:", "secret: s\nregion:"),
            r"secret must be left out with where='launcher', got 's'; .* where=kuberay",
        ),
        (
            LAUNCHER,
            ("spot: true", "memory_gib: 3"),
            r"nodes.gpu.memory_gib must be left out .*, got 3.0",
        ),
        (
            KUBERAY,
            ("memory_gib: 26", "memory_gib: 26, spot: true"),
            r"nodes.gpu.spot must be left out .*, got True; it is used with where=launcher",
        ),
        (
            KUBERAY,
            ("memory_gib: 26", "memory_gib: -1"),
            r"nodes.gpu.memory_gib must be > 0, got -1.0",
        ),
        (KUBERAY, ("memory_gib: 12", "x: 12"), r"unknown config key"),
        (KUBERAY, (", memory_gib: 12", ""), r"nodes.head.memory_gib must be .*, got None"),
        (
            LAUNCHER,
            ("min_count: 1", "min_count: 5"),
            r"nodes.gpu.min_count must be <= count=4, got 5",
        ),
        (LAUNCHER, ("min_count: 1", "min_count: -1"), r"nodes.gpu.min_count must be >= 0, got -1"),
        (LAUNCHER, ("name: gpu", "name: GPU_1"), r"name must be .*, got 'GPU_1'"),
        (
            LAUNCHER,
            ("name: head", "name: boss"),
            r"nodes must hold one group named 'head', .*got \['gpu', 'boss'\]",
        ),
        (
            LAUNCHER,
            ("name: gpu", "name: head"),
            r"nodes must hold one group named 'head', after the group that trains",
        ),
        (
            LAUNCHER,
            ("instance: m7i.xlarge", "instance: m7i.xlarge, spot: true"),
            r"nodes.head.spot must be left out, got True",
        ),
        (
            LAUNCHER,
            ("instance: m7i.xlarge", "instance: m7i.xlarge, count: 2"),
            r"nodes.head.count must be left out, got 2",
        ),
        (
            LAUNCHER,
            ("http://127.0.0.1:8265", "http://10.0.0.7:8265"),
            r"address must be https, or .* a tunnel \(ssh .* 10\.0\.0\.7\)",
        ),
        (
            LAUNCHER,
            ("http://127.0.0.1:8265", "https://me:hunter2@example.org"),
            r"address must not name a user or password",
        ),
        (
            LAUNCHER,
            ("http://127.0.0.1:8265", "127.0.0.1:8265"),
            r"address must be .* URL, .*, got '127.0.0.1:8265'",
        ),
        ("where: address\n", ("where", "where"), r"address must be .*, got None"),
        (
            "nodes: [{name: a}]\n",
            ("nodes", "token_file: x\nnodes"),
            r"token_file must be left out .*, got 'x'; .*where=address or launcher or kuberay",
        ),
        ("nodes: []\n", ("nodes", "nodes"), r"nodes must name .*, got \[\]"),
    ],
)
def test_bad_input_is_one_sentence(
    cluster_of: Callable[..., Any], text: str, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        cluster_of(text, change)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)
    assert "hunter2" not in str(error.value), "a credential is not repeated"


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8265",
        "http://localhost:9000",
        "http://[::1]:8265",
        "https://ray.example.org/team",
    ],
)
def test_addresses_that_a_token_may_travel_to(cluster_of: Callable[..., Any], address: str) -> None:
    cluster = cluster_of(f"where: address\naddress: {address}\nnodes: [{{cpus: 4}}]\n")
    assert cluster.address == address and cluster.token_path == Path.home() / ".ray" / "auth_token"


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "token"
    with pytest.raises(UsageError, match="cannot be read"):
        clusters.check_token(path)
    assert clusters.make_token(path)
    created = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and re.fullmatch("[0-9a-f]{64}", created)
    assert not clusters.make_token(path) and path.read_text() == created
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"may be read by others \(mode 640\); run: chmod 600"):
        clusters.make_token(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        clusters.check_token(path)


def test_ray_reads_the_token_that_was_made(tmp_path: Path) -> None:
    path = tmp_path / "token"
    clusters.make_token(path)
    code = (
        "from ray._raylet import AuthenticationTokenLoader as Loader;"
        " print(Loader.instance().get_raw_token(ignore_auth_mode=True))"
    )
    terminal = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {"RAY_AUTH_TOKEN_PATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=terminal,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == path.read_text()


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does before it asks a cloud: defaults filled in, then held against
    ray-schema.json. Raises where it is wrong.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def aws() -> dict[str, Any]:
    return launcher_config("aws", clusters.read("aws"))


def test_the_launcher_takes_it() -> None:
    from ray.autoscaler._private.commands import warn_about_bad_start_command

    config = prepared(aws())
    assert (
        config["setup_commands"]
        == config["head_setup_commands"]
        == config["worker_setup_commands"]
        == []
    ), "the launcher's defaults install another Ray"
    warn_about_bad_start_command(config["head_start_ray_commands"])
    with pytest.raises(jsonschema.ValidationError):
        prepared(aws() | {"token": "x"})


def test_nodes_of_the_launcher() -> None:
    config = aws()
    types = config["available_node_types"]
    assert config["head_node_type"] == "head" and set(types) == {"head", "gpu"}
    assert (
        "InstanceMarketOptions" not in types["head"]["node_config"]
        and types["head"]["max_workers"] == 0
    ), "the head is on demand"
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (
        types["gpu"]["resources"]["GPU"] >= 1
        and types["gpu"]["min_workers"] < types["gpu"]["max_workers"] == config["max_workers"]
    )
    assert not config["provider"]["cache_stopped_nodes"], "a stopped node's disk is paid for"


def test_every_node_of_the_launcher_starts_with_the_token_and_nothing_public() -> None:
    config = aws()
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    for commands in (head, worker):
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1 and "RAY_AUTH_MODE=token" in starts[0].split("ray start")[0]
    assert (
        "--dashboard-host=127.0.0.1" in head[-1]
        and "--num-cpus=0" in head[-1]
        and "0.0.0.0" not in json.dumps(config)
    )
    assert config["file_mounts"] == {TOKEN: clusters.read("aws").token_file}
    assert "security_group" not in config["provider"], "Ray's own lets in SSH alone"


def test_ec2_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own bootstrap and provider, on moto's EC2: keys, groups and instances are made, and no
    port but SSH is open.
    """
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        config = prepared(aws())
        for node in config["available_node_types"].values():
            boto3.client("iam").create_instance_profile(
                InstanceProfileName=node["node_config"]["IamInstanceProfile"]["Name"]
            )
        config = bootstrap_aws(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for node in config["available_node_types"].values():
            provider.create_node(node["node_config"], {}, 1)
        ec2 = boto3.client("ec2")
        created = [
            instance
            for reservation in ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
        ]
        assert {(i["InstanceType"], i.get("InstanceLifecycle")) for i in created} == {
            ("m7i.xlarge", None),
            ("g6.2xlarge", "spot"),
        }
        groups = [
            group
            for group in ec2.describe_security_groups()["SecurityGroups"]
            if group["GroupName"] != "default"
        ]
        world = [
            rule
            for group in groups
            for rule in group["IpPermissions"]
            if rule["IpRanges"] or rule["Ipv6Ranges"]
        ]
        assert [(rule["FromPort"], rule["ToPort"]) for rule in world] == [(22, 22)]


def whole(schema: Any) -> Any:
    """The schema as the API server takes it: a key that it does not name is an error, and some
    numbers may be strings.
    """
    if isinstance(schema, list):
        return [whole(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    resolved = {key: whole(value) for key, value in schema.items()}
    if (
        isinstance(resolved.get("properties"), dict)
        and "type" in resolved
        and "additionalProperties" not in resolved
    ):
        resolved["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return resolved


def crd(kind: str) -> Any:
    """KubeRay's schema of `kind`, with the parts that every resource has."""
    text = yaml.load(
        (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(),
        Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),
    )
    version = next(version for version in text["spec"]["versions"] if version["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    }
    return whole(schema)


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return {kind: crd(kind) for kind in kuberay.KINDS}


def rendered(
    kind: str, words: str | None = None, cluster: clusters.ClusterConfig | None = None
) -> list[dict[str, Any]]:
    """The documents as kubectl reads them."""
    run = check_run(kind, words)
    documents = kuberay.render("kuberay", cluster or clusters.read("kuberay"), kind, *run)
    text = yaml_writer.to_yaml(documents, "a remark")
    assert list(yaml.safe_load_all(text)) == documents and text == yaml_writer.to_yaml(
        documents, "a remark"
    )
    return documents


@published
@pytest.mark.parametrize("kind", kuberay.KINDS)
def test_kuberay_takes_it(schemas: dict[str, Any], kind: str) -> None:
    resource, policy = rendered(kind)
    assert resource["kind"] == kind
    jsonschema.Draft202012Validator(schemas[kind]).validate(resource)
    # A NetworkPolicy's own schema is none of KubeRay's, but its rules stand in the RayCluster's.
    rules = schemas["RayCluster"]["properties"]["spec"]["properties"]["networkPolicy"][
        "properties"
    ]["head"]["properties"]["ingressRules"]
    jsonschema.Draft202012Validator(rules).validate(policy["spec"]["ingress"])


@published
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("spec", "authOptions", "mode"), "tocken"),
        (("spec", "authOption"), {}),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limit"), {}),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        (
            (
                "spec",
                "workerGroupSpecs",
                0,
                "template",
                "spec",
                "containers",
                0,
                "securityContext",
                "runAsNonRot",
            ),
            True,
        ),
    ],
)
def test_the_schema_would_find_a_slip(
    schemas: dict[str, Any], at: tuple[Any, ...], value: Any
) -> None:
    resource, _ = rendered("RayCluster")
    node: Any = resource
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schemas["RayCluster"]).validate(resource)


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = resource["spec"]
    return next((spec[key] for key in ("rayClusterSpec", "rayClusterConfig") if key in spec), spec)


def everything(node: Any) -> list[tuple[str, Any]]:
    """Every key of a document, at any depth, with its value."""
    if isinstance(node, list):
        return [pair for item in node for pair in everything(item)]
    if not isinstance(node, dict):
        return []
    return [(key, value) for key, value in node.items()] + [
        pair for value in node.values() for pair in everything(value)
    ]


@pytest.mark.parametrize("kind", kuberay.KINDS)
def test_manifests_are_closed(kind: str) -> None:
    resource, policy = rendered(kind)
    spec, pairs = cluster_spec(resource), everything(resource)
    assert spec["authOptions"] == {
        "mode": "token",
        "secretName": "mesocosm-kuberay-token",
    } and spec["rayVersion"].startswith("2.60")
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {value for _, value in pairs if isinstance(value, str)} & {
        "LoadBalancer",
        "NodePort",
        "Ingress",
        "Secret",
    }
    assert not {key for key, _ in pairs} & {
        "enableIngress",
        "hostNetwork",
        "hostPort",
        "hostPath",
        "privileged",
        "runtimeEnvYAML",
    }
    pods = [value for key, value in pairs if key in ("template", "submitterPodTemplate")]
    assert len(pods) == 2 + (kind == "RayJob")
    for pod in pods:
        assert (
            pod["spec"]["securityContext"]["runAsNonRoot"]
            and pod["spec"]["securityContext"]["runAsUser"] > 0
        )
        assert (
            pod["metadata"]["labels"].items()
            >= policy["spec"]["podSelector"]["matchLabels"].items()
        ), "the policy is of every pod"
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert (
                container["resources"]["limits"].keys()
                == container["resources"]["requests"].keys()
                >= {"cpu", "memory"}
            )
            for variable in container.get("env", []):
                assert not re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]), (
                    "credentials come by reference"
                )
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    sources = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
    assert all("podSelector" in source and "ipBlock" not in source for source in sources) and all(
        rule["from"] for rule in policy["spec"]["ingress"]
    )


def test_pods_of_kuberay() -> None:
    spec = cluster_spec(rendered("RayCluster")[0])
    assert (
        spec["enableInTreeAutoscaling"]
        and spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    )
    (group,) = spec["workerGroupSpecs"]
    head, worker = spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]
    assert (
        group["minReplicas"] < group["maxReplicas"]
        and worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    )
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    for pod in (head, worker):
        shm = next(
            volume
            for volume in pod["volumes"]
            if volume["name"] == pod["containers"][0]["volumeMounts"][0]["name"]
        )
        assert (
            shm["emptyDir"]["medium"] == "Memory"
            and pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/dev/shm"
        )
    assert (
        worker["automountServiceAccountToken"] is False
        and head["serviceAccountName"] != worker["serviceAccountName"]
    )


def test_storage_credentials_are_named_and_not_held(
    cluster_of: Callable[..., clusters.ClusterConfig],
) -> None:
    cluster = cluster_of(KUBERAY, ("image:", "secret: s3-credentials\nimage:"))
    spec = cluster_spec(rendered("RayCluster", cluster=cluster)[0])
    for pod in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
        assert pod["spec"]["containers"][0]["envFrom"] == [
            {"secretRef": {"name": "s3-credentials"}}
        ]
        assert "serviceAccountName" not in pod["spec"]


def test_a_job_runs_what_it_is_told_on_its_own_cluster(
    cluster_of: Callable[..., clusters.ClusterConfig],
) -> None:
    words = "pretrain -c configs/pretrain/pendulum.yaml 'data.datasets=[d0]'"
    cluster = cluster_of(KUBERAY, ("image:", "tracking_uri: http://mlflow:5000\nimage:"))
    job, _ = rendered("RayJob", words, cluster)
    where = "ray.address=auto storage.root=s3://b/p tracking.uri=http://mlflow:5000"
    assert (
        job["spec"]["entrypoint"]
        == f"mesocosm pretrain {where} -c configs/pretrain/pendulum.yaml 'data.datasets=[d0]'"
    )
    assert job["spec"]["shutdownAfterJobFinishes"] and "runtimeEnvYAML" not in job["spec"]
    assert (
        rendered("RayJob", words, cluster)[0]["metadata"]
        == job["metadata"]
        != rendered("RayJob", "doctor", cluster)[0]["metadata"]
    )


def test_a_service_is_a_config_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    service, _ = rendered("RayService", "serve world=w0 replicas=2 name=robots")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert (application.name, application.route_prefix, application.import_path) == (
        "robots",
        None,
        "mesocosm.serve.app:build",
    )
    assert application.args == {
        "storage.root": "s3://your-bucket/mesocosm",
        "world": "w0",
        "replicas": "2",
        "name": "robots",
    }


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("RayCluster", "doctor", "is for --kind RayJob or RayService"),
        (
            "RayJob",
            "pretrian -c x",
            "must begin with a job, got 'pretrian'; .*did you mean 'pretrain'",
        ),
        ("RayJob", "", "must begin with a job, got ''"),
        ("RayService", "pretrain", "cannot be a RayService; use `serve` and key=value"),
        ("RayService", "serve -c x.yaml", "cannot be a RayService"),
        ("RayService", "serve replcas=2", "unknown config key 'replcas'; did you mean 'replicas'"),
        ("RayService", "serve replicas=0", "serve.replicas must be >= 1, got 0"),
    ],
)
def test_words_that_no_kind_could_run(kind: str, words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rendered(kind, words)


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_a_pods_own_disk_is_no_storage(
    cluster_of: Callable[..., clusters.ClusterConfig], kind: str
) -> None:
    with pytest.raises(
        UsageError, match=f"storage_root=null .*: what a {kind} writes would be lost with its pod"
    ):
        rendered(kind, cluster=cluster_of(KUBERAY, ("storage_root: s3://b/p\n", "")))


def test_the_image() -> None:
    lines = (REPOSITORY / "clusters" / "Dockerfile").read_text().splitlines()
    assert lines[0].startswith("# Unbuilt") and 'LABEL mesocosm.status="unbuilt"' in lines
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert [line for line in lines if line.startswith("FROM")] == [
        f"FROM rayproject/ray:{pins['ray']}-py311-cu130"
    ]
    text = "\n".join(lines)
    assert (
        "DS_BUILD_FUSED_ADAM=1" in text
        and [line for line in lines if line.startswith("USER")][-1] == "USER ray"
    )
    assert all(
        "-c constraints.txt" in command
        for command in re.findall(r"pip install(?:[^\n&]*\\\n)?[^\n&]*", text)
    )
    assert not re.search(r"(?i)(token|password|secret|access_key)\w*[ =]\S*[=\d]", text) and not [
        line for line in lines if line.startswith(("ENV", "ARG"))
    ]
    for line in lines:
        if line.startswith("COPY"):
            assert all((REPOSITORY / source).exists() for source in line.split()[2:-1]), line
