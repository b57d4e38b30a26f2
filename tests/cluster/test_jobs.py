"""Jobs on a real Ray cluster that wants a token, by the command line alone."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint

from .conftest import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
COLLECT = ("collect", "reality.env=CartPole-v1", "steps=200", "seed=3")


def report_of(cluster: Cluster, *arguments: str) -> Any:
    done = cluster.mesocosm(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def submit(cluster: Cluster, *arguments: str) -> Any:
    return report_of(cluster, *arguments, "--cluster", "test")


def status(cluster: Cluster, id: str) -> Any:
    return report_of(cluster, "jobs", "status", id)


@pytest.fixture(scope="module")
def collected(cluster: Cluster) -> dict[str, Any]:
    return submit(cluster, *COLLECT, "--follow")


def test_a_job_makes_the_same_dataset_as_on_this_machine(
    cluster: Cluster, collected: dict[str, Any]
) -> None:
    assert collected["state"] == "SUCCEEDED" and not collected["attached"]
    assert collected["id"].endswith("-1")
    report = status(cluster, collected["id"])
    local_root = cluster.folder / ".local"
    local = report_of(cluster, *COLLECT, f"storage.root={local_root}")
    assert report["artifact"] == local["artifact"]
    paths = [
        Storage(str(root)).artifact("datasets", report["artifact"]).path
        for root in (cluster.root, local_root)
    ]
    names = sorted(str(path.relative_to(paths[0])) for path in paths[0].rglob("*.npy"))
    assert names
    assert all((paths[0] / name).read_bytes() == (paths[1] / name).read_bytes() for name in names)
    assert "200/200 real steps" in report["progress"] and report["mlflow"]
    assert report["state"] == "SUCCEEDED"


def test_checks_from_inside_the_cluster(cluster: Cluster) -> None:
    report = {check["name"]: check for check in report_of(cluster, "cluster", "check", "test")}
    assert list(report) == ["cluster", "python", "ray", "mesocosm", "nodes", "storage", "mlflow"]
    assert "with its token" in report["cluster"]["found"]
    assert "1 nodes, 4 CPUs" in report["nodes"]["found"]
    assert str(cluster.root) in report["storage"]["found"]
    wrong = cluster.mesocosm("cluster", "check", "wrong")
    assert wrong.returncode == 1 and "does not accept the token in" in wrong.stderr
    assert "copy the cluster's token there" in wrong.stderr


def test_the_same_command_again_does_nothing(cluster: Cluster, collected: dict[str, Any]) -> None:
    again = cluster.mesocosm(*COLLECT, "--cluster", "test")
    assert again.returncode == 0
    assert f"{collected['id']} has succeeded on test: nothing was submitted" in again.stderr
    assert [row["id"] for row in report_of(cluster, "jobs", "list")] == [collected["id"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cluster wrong", "http://127.0.0.1.* does not accept the token in .*other"),
        ("--cluster test workers=99 lanes=99", "workers=99 asks for 99 CPUs .* 'test' has 4"),
        ("--cluster test reality.env=Nope-v0", "on cluster 'test': .*Nope-v0"),
        ("--cluster local", "--cluster local is this machine"),
        ("--cluster tset", "did you mean 'test'"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_it_is_sent(
    cluster: Cluster, arguments: str, message: str
) -> None:
    done = cluster.mesocosm(*COLLECT, *arguments.split())
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and cluster.token not in done.stderr


@pytest.fixture
def pretrain(cluster: Cluster, collected: dict[str, Any]) -> list[str]:
    data = status(cluster, collected["id"])["artifact"].removeprefix("datasets/")
    return ["pretrain", f"data.datasets=[{data}]"]


def test_a_model_that_its_memory_cannot_hold_is_refused(
    cluster: Cluster, pretrain: list[str]
) -> None:
    large = ("model.size=7b", "model.family=sequence", "train.workers=2", "--cluster", "test")
    done = cluster.mesocosm(*pretrain, *large)
    assert done.returncode == 2 and "train.zero_stage" in done.stderr
    assert "GiB of memory on all nodes together and cluster 'test' grants" in done.stderr


def test_a_stopped_training_has_its_checkpoint_and_resumes(
    cluster: Cluster, pretrain: list[str]
) -> None:
    small = """model.size=10k model.members=1 model.base_steps=20 train.batch=8 model.head_steps=20
        train.steps=100000 train.checkpoint_every=1000000"""
    training = [*pretrain, *small.split()]
    first = submit(cluster, *training)
    storage, end = Storage(str(cluster.root)), time.monotonic() + 240
    while "loss" not in (status(cluster, first["id"])["progress"] or ""):
        assert time.monotonic() < end
        time.sleep(2)
    attached = submit(cluster, *training)
    assert attached["attached"] and attached["id"] == first["id"]
    stopped = report_of(cluster, "jobs", "stop", first["id"])
    assert stopped == {"id": first["id"], "state": "STOPPED"}
    world = status(cluster, first["id"])["artifact"].removeprefix("worlds/")
    saved = checkpoint.latest(storage, world)
    assert saved is not None and 0 < saved[1].step < 100000, "of the last step, though none was due"
    second = submit(cluster, *training)
    assert second["id"] == first["id"].removesuffix("-1") + "-2"
    message = f"resuming from step {saved[1].step}"
    while message not in cluster.mesocosm("jobs", "logs", second["id"]).stdout:
        assert time.monotonic() < end + 120
        time.sleep(2)
    cluster.mesocosm("jobs", "stop", second["id"])


def test_logs_outlive_the_cluster(cluster: Cluster, collected: dict[str, Any]) -> None:
    """The last: it ends the cluster. Nothing that anybody may read has the token."""
    cluster.end()
    logs = cluster.mesocosm("jobs", "logs", collected["id"])
    assert logs.returncode == 0 and "200/200 real steps" in logs.stdout
    report = status(cluster, collected["id"])
    assert report["state"] == "SUCCEEDED" and "does not answer" in report["unreached"]
    for path in [*cluster.root.rglob("*"), *cluster.home.rglob("*")]:
        assert not path.is_file() or cluster.token.encode() not in path.read_bytes(), path
