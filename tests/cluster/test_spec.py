"""Cluster files, what is rendered for EC2, and the image: against Ray's schema, bootstrap and EC2
provider.
"""

from __future__ import annotations

import copy
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mesocosm.cluster import spec as clusters
from mesocosm.cluster.ec2_launcher import TOKEN, launcher_config
from mesocosm.errors import UsageError

from .conftest import KUBERAY, LAUNCHER, Reader

REPOSITORY = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:8265"


@pytest.mark.integration
def test_it_imports_neither_ray_nor_torch() -> None:
    modules = ("cluster.spec", "cli.cluster", "cluster.kuberay", "cluster.ec2_launcher")
    imports = ", ".join(f"mesocosm.{module}" for module in modules)
    check = "assert not {'ray', 'torch', 'boto3'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import sys, {imports}; {check}"]
    subprocess.run(command, check=True, timeout=600)


def test_shipped_clusters() -> None:
    paths = (REPOSITORY / "clusters").glob("*.yaml")
    shipped = {path.stem: clusters.read(path.stem) for path in paths}
    places = {name: cluster.where for name, cluster in shipped.items()}
    assert places == {"aws": "launcher", "kuberay": "kuberay", "local": "local"}
    for cluster in shipped.values():
        assert cluster.slots >= 1 and cluster.idle_price_per_hour <= cluster.price_per_hour


def test_estimates_and_autoscaling_read_the_same_groups(cluster_of: Reader) -> None:
    cluster = cluster_of(LAUNCHER)
    assert (cluster.slots, cluster.price_per_hour, cluster.idle_price_per_hour) == (4, 4.5, 1.5)
    assert cluster.head.name == "head" and [group.name for group in cluster.workers] == ["gpu"]
    full = [cluster.full(key) for key in ("cpus", "gpus", "memory_gib")]
    assert cluster.grows and full == [32, 4, 0]
    text = f"where: address\naddress: {URL}\nnodes: [{{name: n, count: 3, cpus: 2}}]"
    fixed = cluster_of(text)
    assert not fixed.grows and fixed.full("cpus") == 0
    growing = cluster_of(text, "count: 3", "count: 3, min_count: 0")
    assert growing.grows and growing.full("cpus") == 6


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (LAUNCHER, "launcher", "lancher", "where must .* got 'lancher'; did you mean 'launcher'"),
        (LAUNCHER, "region:", "regoin:", "unknown config key 'regoin'; did you mean 'region'"),
        (LAUNCHER, "ami: ami-1\n", "", "ami must be a machine image .*, got None"),
        (LAUNCHER, f"address: {URL}\n", "", "address must be .*, got None"),
        (LAUNCHER, "instance: g6.2xlarge, ", "", "nodes.gpu.instance must be .*, got None"),
        (LAUNCHER, "cpus: 8", "cpus: null", "nodes.gpu.cpus must be .*, got None"),
        (LAUNCHER, "gpus: 1", "gpus: null", "nodes.gpu.gpus must be .*, got null"),
        (LAUNCHER, "region:", "secret: s\nregion:", "secret must .*, got 's'; .* where=kuberay"),
        (LAUNCHER, "spot: true", "memory_gib: 3", "nodes.gpu.memory_gib must be left out .* 3.0"),
        (KUBERAY, "gib: 26", "gib: 26, spot: true", "nodes.gpu.spot must .*, got True; .*launcher"),
        (KUBERAY, "gib: 26", "gib: -1", "nodes.gpu.memory_gib must be > 0, got -1.0"),
        (KUBERAY, "memory_gib: 12", "x: 12", "unknown config key"),
        (KUBERAY, ", memory_gib: 12", "", "nodes.head.memory_gib must be .*, got None"),
        (LAUNCHER, "min_count: 1", "min_count: 5", "nodes.gpu.min_count must be <= count=4, got 5"),
        (LAUNCHER, "min_count: 1", "min_count: -1", "nodes.gpu.min_count must be >= 0, got -1"),
        (LAUNCHER, "name: gpu", "name: GPU_1", "name must be .*, got 'GPU_1'"),
        (LAUNCHER, "name: head", "name: boss", r"one group named 'head', .*got \['gpu', 'boss'\]"),
        (LAUNCHER, "name: gpu", "name: head", "named 'head', after the group that trains"),
        (LAUNCHER, "m7i.xlarge", "m7i.xlarge, spot: true", "nodes.head.spot must .*, got True"),
        (LAUNCHER, "m7i.xlarge", "m7i.xlarge, count: 2", "nodes.head.count must .*, got 2"),
        (LAUNCHER, URL, "http://10.0.0.7:8265", r"address must be https, .*ssh .* 10\.0\.0\.7"),
        (LAUNCHER, URL, "https://me:hunter2@example.org", "must not name a user or password"),
        (LAUNCHER, URL, "127.0.0.1:8265", "address must be .* URL, .*, got '127.0.0.1:8265'"),
        ("where: address\n", "where", "where", "address must be .*, got None"),
        ("nodes: [{name: a}]\n", "nodes", "token_file: x\nnodes", "token_file must .*, got 'x'"),
        ("nodes: []\n", "nodes", "nodes", r"nodes must name .*, got \[\]"),
    ],
)
def test_errors_name_the_file_the_key_and_the_value(
    cluster_of: Reader, text: str, old: str, new: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        cluster_of(text, old, new)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)
    assert "hunter2" not in str(error.value), "a credential is not repeated"


@pytest.mark.parametrize(
    "address", [URL, "http://localhost:9000", "http://[::1]:8265", "https://ray.example.org/team"]
)
def test_addresses_that_a_token_may_travel_to(cluster_of: Reader, address: str) -> None:
    cluster = cluster_of(f"where: address\naddress: {address}\nnodes: [{{cpus: 4}}]\n")
    assert cluster.address == address and cluster.token_path == Path.home() / ".ray" / "auth_token"


def test_a_token_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
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
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["RAY_AUTH_TOKEN_PATH"] = str(path)
    output = subprocess.check_output([sys.executable, "-c", code], env=env, text=True, timeout=600)
    assert output.strip() == path.read_text()


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The config as `ray up` prepares it: defaults filled in, checked against ray-schema.json."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


def aws() -> dict[str, Any]:
    return launcher_config("aws", clusters.read("aws"))


def test_the_launcher_accepts_the_config() -> None:
    from ray.autoscaler._private.commands import warn_about_bad_start_command

    config = prepared(aws())
    # The launcher's defaults install another Ray.
    assert [config[f"{prefix}setup_commands"] for prefix in ("", "head_", "worker_")] == [[]] * 3
    warn_about_bad_start_command(config["head_start_ray_commands"])
    with pytest.raises(jsonschema.ValidationError):
        prepared(aws() | {"token": "x"})


def test_nodes_of_the_launcher() -> None:
    config = aws()
    types = config["available_node_types"]
    head, gpu = types.pop("head"), types.pop("gpu")
    assert config["head_node_type"] == "head" and not types
    assert "InstanceMarketOptions" not in head["node_config"], "the head is on demand"
    assert head["max_workers"] == 0
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] < gpu["max_workers"] == config["max_workers"]
    assert gpu["resources"]["GPU"] >= 1
    assert not config["provider"]["cache_stopped_nodes"], "a stopped node's disk is paid for"


def test_every_node_of_the_launcher_starts_with_the_token_and_nothing_public() -> None:
    config = aws()
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    for commands in (head, worker):
        (command,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in command.split("ray start")[0]
    assert "--dashboard-host=127.0.0.1" in head[-1] and "--num-cpus=0" in head[-1]
    assert "0.0.0.0" not in json.dumps(config)
    assert config["file_mounts"] == {TOKEN: clusters.read("aws").token_file}
    assert "security_group" not in config["provider"], "Ray's own admits SSH alone"


@pytest.mark.integration
def test_ec2_accepts_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own bootstrap and provider, on moto's EC2: no port but SSH is open."""
    import boto3
    from moto import mock_aws

    variables = {"HOME": str(tmp_path), "AWS_DEFAULT_REGION": "us-west-2"}
    variables |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        config = prepared(aws())
        for node in config["available_node_types"].values():
            profile = node["node_config"]["IamInstanceProfile"]["Name"]
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        config = bootstrap_aws(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for node in config["available_node_types"].values():
            provider.create_node(node["node_config"], {}, 1)
        ec2 = boto3.client("ec2")
        reservations = ec2.describe_instances()["Reservations"]
        created = [instance for each in reservations for instance in each["Instances"]]
        types = {(i["InstanceType"], i.get("InstanceLifecycle")) for i in created}
        assert types == {("m7i.xlarge", None), ("g6.2xlarge", "spot")}
        groups = ec2.describe_security_groups()["SecurityGroups"]
        created_groups = [group for group in groups if group["GroupName"] != "default"]
        rules = [rule for group in created_groups for rule in group["IpPermissions"]]
        public = [rule for rule in rules if rule["IpRanges"] or rule["Ipv6Ranges"]]
        assert [(rule["FromPort"], rule["ToPort"]) for rule in public] == [(22, 22)]


def test_the_image() -> None:
    lines = (REPOSITORY / "clusters" / "Dockerfile").read_text().splitlines()
    text = "\n".join(lines)
    assert lines[0].startswith("# Unbuilt") and 'LABEL mesocosm.status="unbuilt"' in lines
    ray = re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert ray is not None
    bases = [line for line in lines if line.startswith("FROM")]
    assert bases == [f"FROM rayproject/ray:{ray[1]}-py311-cu130"]
    assert "DS_BUILD_FUSED_ADAM=1" in text
    assert [line for line in lines if line.startswith("USER")][-1] == "USER ray"
    installs = re.findall(r"pip install(?:[^\n&]*\\\n)?[^\n&]*", text)
    assert all("-c constraints.txt" in command for command in installs)
    assert not re.search(r"(?i)(token|password|secret|access_key)\w*[ =]\S*[=\d]", text)
    assert not [line for line in lines if line.startswith(("ENV", "ARG"))]
    for line in lines:
        if line.startswith("COPY"):
            assert all((REPOSITORY / source).exists() for source in line.split()[2:-1]), line
