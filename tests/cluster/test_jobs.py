"""Jobs on a real Ray cluster that wants a token, by the command line alone: submitted, attached to,
watched, stopped, begun again.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint

from .conftest import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
COLLECT = ("collect", "reality.env=CartPole-v1", "steps=200", "seed=3")


def submit(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    done = cluster.mesocosm(*arguments, "--cluster", "test", "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def status(cluster: Cluster, id: str) -> dict[str, Any]:
    done = cluster.mesocosm("jobs", "status", id, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def collected(cluster: Cluster) -> dict[str, Any]:
    return submit(cluster, *COLLECT, "--follow")


def test_a_job_runs_there_as_it_does_here(cluster: Cluster, collected: dict[str, Any]) -> None:
    assert (
        collected["state"] == "SUCCEEDED"
        and collected["id"].endswith("-1")
        and not collected["attached"]
    )
    report = status(cluster, collected["id"])
    here = cluster.mesocosm(*COLLECT, f"storage.root={cluster.folder}/.here", "--json")
    assert report["artifact"] == json.loads(here.stdout)["artifact"]
    there, own = (
        Storage(str(root)).artifact("datasets", report["artifact"]).path
        for root in (cluster.root, cluster.folder / ".here")
    )
    names = sorted(str(path.relative_to(there)) for path in there.rglob("*.npy"))
    assert names and all((there / name).read_bytes() == (own / name).read_bytes() for name in names)
    assert (
        "200/200 real steps" in report["progress"]
        and report["mlflow"]
        and report["state"] == "SUCCEEDED"
    )


def test_the_checklist_is_seen_from_inside(cluster: Cluster) -> None:
    done = cluster.mesocosm("cluster", "check", "test", "--json")
    report = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0 and list(report) == [
        "cluster",
        "python",
        "ray",
        "mesocosm",
        "nodes",
        "storage",
        "mlflow",
    ]
    assert (
        "with its token" in report["cluster"]["found"]
        and "1 nodes, 4 CPUs" in report["nodes"]["found"]
    )
    assert str(cluster.root) in report["storage"]["found"]
    wrong = cluster.mesocosm("cluster", "check", "wrong")
    assert (
        wrong.returncode == 1
        and "does not accept the token in" in wrong.stderr
        and "copy the cluster's token there" in wrong.stderr
    )


def test_again_is_said_and_does_nothing(cluster: Cluster, collected: dict[str, Any]) -> None:
    again = cluster.mesocosm(*COLLECT, "--cluster", "test")
    assert (
        again.returncode == 0
        and f"{collected['id']} has succeeded on test: nothing was submitted" in again.stderr
    )
    rows = json.loads(cluster.mesocosm("jobs", "list", "--json").stdout)
    assert [row["id"] for row in rows] == [collected["id"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "wrong"), "http://127.0.0.1.* does not accept the token in .*other"),
        (
            ("--cluster", "test", "workers=99"),
            "workers=99 asks for 99 CPUs and cluster 'test' has 4; lower it",
        ),
        (("--cluster", "test", "reality.env=Nope-v0"), "on cluster 'test': .*Nope-v0"),
        (("--cluster", "local"), "--cluster local is this machine"),
        (("--cluster", "tset"), "did you mean 'test'"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_sent(
    cluster: Cluster, arguments: tuple[str, ...], message: str
) -> None:
    import re

    done = cluster.mesocosm(*COLLECT, *arguments)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and cluster.token not in done.stderr


def test_a_model_that_its_memory_cannot_hold_is_refused(
    cluster: Cluster, collected: dict[str, Any]
) -> None:
    data = status(cluster, collected["id"])["artifact"].removeprefix("datasets/")
    done = cluster.mesocosm(
        "pretrain",
        f"data.datasets=[{data}]",
        "model.size=7b",
        "model.family=sequence",
        "train.workers=2",
        "--cluster",
        "test",
    )
    assert (
        done.returncode == 2
        and "GiB of memory on all nodes together and cluster 'test' grants" in done.stderr
        and "train.zero_stage" in done.stderr
    )


def test_a_stopped_training_has_its_checkpoint_and_goes_on(
    cluster: Cluster, collected: dict[str, Any]
) -> None:
    data = status(cluster, collected["id"])["artifact"].removeprefix("datasets/")
    small = (
        "model.size=10k",
        "model.members=1",
        "model.base_steps=20",
        "train.batch=8",
        "train.events=12",
    )
    training = (
        "pretrain",
        f"data.datasets=[{data}]",
        *small,
        "train.steps=100000",
        "train.checkpoint_every=1000000",
    )
    first = submit(cluster, *training)
    storage, end = Storage(str(cluster.root)), time.monotonic() + 240
    while "loss" not in (status(cluster, first["id"])["progress"] or ""):
        assert time.monotonic() < end
        time.sleep(2)
    attached = submit(cluster, *training)
    assert attached["attached"] and attached["id"] == first["id"]
    stopped = cluster.mesocosm("jobs", "stop", first["id"], "--json")
    assert json.loads(stopped.stdout) == {"id": first["id"], "state": "STOPPED"}, stopped.stderr
    world = status(cluster, first["id"])["artifact"].removeprefix("worlds/")
    saved = checkpoint.latest(storage, world)
    assert saved is not None and 0 < saved[1].step < 100000, "of the last step, though none was due"
    second = submit(cluster, *training)
    assert second["id"] == first["id"].removesuffix("-1") + "-2"
    while (
        f"resuming from step {saved[1].step}"
        not in cluster.mesocosm("jobs", "logs", second["id"]).stdout
    ):
        assert time.monotonic() < end + 120
        time.sleep(2)
    cluster.mesocosm("jobs", "stop", second["id"])


def test_what_was_said_outlives_the_cluster(cluster: Cluster, collected: dict[str, Any]) -> None:
    """The last: it ends the cluster. Nothing that anybody may read has the token."""
    cluster.end()
    logs = cluster.mesocosm("jobs", "logs", collected["id"])
    assert logs.returncode == 0 and "200/200 real steps" in logs.stdout
    report = status(cluster, collected["id"])
    assert report["state"] == "SUCCEEDED" and "does not answer" in report["unreached"]
    for path in [*cluster.root.rglob("*"), *cluster.home.rglob("*")]:
        assert not path.is_file() or cluster.token.encode() not in path.read_bytes(), path
