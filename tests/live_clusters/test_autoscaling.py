"""Ray's own autoscaler, whose nodes are processes of the head's machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from mesocosm.store.artifacts import Storage

from .lab import HEAD, PORT, Lab, running, until
from .test_kills import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
LISTS = """cluster_synced_files initialization_commands setup_commands head_setup_commands
    worker_setup_commands head_start_ray_commands worker_start_ray_commands"""


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A head with one CPU, and an autoscaler that may add two nodes of one."""
    worker = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
    config: dict[str, object] = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{HEAD}:{PORT}",
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": worker | {"min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "file_mounts_sync_continuously": False,
    }
    config |= {key: {} for key in ("auth", "docker", "file_mounts")}
    config |= {key: [] for key in LISTS.split()}
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with running(tmp_path_factory.mktemp("growing"), fake) as lab:
        (lab.base / "autoscaling.json").write_text(json.dumps(config))
        lab.add("head", f"--autoscaling-config={lab.base / 'autoscaling.json'}")
        until(lambda: lab.alive() == 1, "the head")
        lab.cluster("test", str(lab.base / "remote" / "root"), min_count=1)
        yield lab


def test_nodes_come_for_a_job_and_go_after_it(growing: Lab, cart_root: Callable[..., str]) -> None:
    root = Storage(cart_root(growing.base / "remote"))
    assert growing.alive() == 1
    options = ("train.batch=12", "train.workers=3", "train.steps=30", "--cluster", "test")
    training = ("pretrain", "data.datasets=[cart]", *SMALL.split(), *options)
    too_many = growing.mesocosm(*training, "train.workers=4")
    assert too_many.returncode == 2
    assert "train.workers=4 asks for 4 CPUs and cluster 'test' has 3" in too_many.stderr
    id = growing.report(*training)["id"]
    until(lambda: growing.alive() == 3, "two more nodes")
    log = growing.mesocosm("jobs", "logs", id, "--follow", timeout=900)
    assert log.returncode == 0, log.stdout
    (world,) = root.list("worlds")
    assert root.commit_of("worlds", world) is not None
    until(lambda: growing.alive() == 1, "the end of both nodes")
