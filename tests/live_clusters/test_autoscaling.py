"""Ray's own autoscaler, whose nodes are processes of the head's machine: it brings what a job waits
for, and takes it away again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesocosm.store.artifacts import Storage

from .lab import HEAD, PORT, Lab, permitted, until
from .test_kills import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ALIVE = (
    "import ray; ray.init('auto', log_to_driver=False); print('ALIVE', sum(node['Alive'] for node"
    " in ray.nodes()))"
)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A head with one CPU, and an autoscaler that may add two nodes of one."""
    if not permitted():
        pytest.skip(
            "making network and PID namespaces is not permitted here: run as root, or in a"
            " container with CAP_SYS_ADMIN"
        )
    made = Lab.make(
        tmp_path_factory.mktemp("growing"),
        {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
    )
    config = {
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
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    (made.base / "autoscaling.json").write_text(json.dumps(config))
    try:
        made.add("head", f"--autoscaling-config={made.base / 'autoscaling.json'}")
        made.ready()
        made.cluster("test", str(made.base / "there" / "root"), count=3, min_count=1)
        yield made
    finally:
        print(next(iter(made.nodes.values())).said("ray"))
        made.end()


def alive(lab: Lab) -> int:
    head = lab.nodes["head"]
    done = subprocess.run(
        head.command(sys.executable, "-c", ALIVE),
        env=lab.node_env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return int(done.stdout.rsplit("ALIVE", 1)[1])


def test_nodes_come_for_a_job_and_go_after_it(growing: Lab, cart_root: object) -> None:
    assert callable(cart_root)
    cart_root(growing.base / "there")
    assert alive(growing) == 1
    training = (
        "pretrain",
        "data.datasets=[cart]",
        *SMALL,
        "train.batch=12",
        "train.workers=3",
        "train.steps=30",
    )
    too_many = growing.mesocosm(*training, "train.workers=4", "--cluster", "test")
    assert (
        too_many.returncode == 2
        and "train.workers=4 asks for 4 CPUs and cluster 'test' has 3" in too_many.stderr
    )
    done = growing.mesocosm(*training, "--cluster", "test", "--json")
    assert done.returncode == 0, done.stderr
    id = json.loads(done.stdout)["id"]
    until(lambda: alive(growing) == 3, "two more nodes")
    followed = growing.mesocosm("jobs", "logs", id, "--follow", timeout=900)
    assert followed.returncode == 0, followed.stdout
    (world,) = Storage(str(growing.base / "there" / "root")).list("worlds")
    assert (Path(growing.base) / "there" / "root" / "worlds" / world / "COMMIT.json").exists()
    until(lambda: alive(growing) == 1, "the end of both nodes")
