"""The config of Ray's cluster launcher on EC2, made from `clusters/NAME.yaml`.

Every node starts with token authentication. The dashboard listens on the head's loopback only. The
head is on demand and runs no tasks. Nodes are terminated: a stopped node's disk costs money.
"""

from __future__ import annotations

from typing import Any

from mesocosm.cluster.spec import HEAD, ClusterConfig, NodeGroup

TOKEN = "~/.ray/auth_token"
"""The file in which Ray looks for the token, in every container."""
DISK_GIB = 200
"""The disk of each node. The image takes about 30 GiB; the rest caches shards and checkpoints."""
IDLE_MINUTES = 10
START = "ulimit -n 65536; RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ray start"


def launcher_config(name: str, cluster: ClusterConfig) -> dict[str, Any]:
    """The config for `ray up`."""
    return {
        "cluster_name": f"mesocosm-{name}",
        "max_workers": sum(group.count for group in cluster.workers),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {"type": "aws", "region": cluster.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": cluster.image,
            "container_name": "mesocosm",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536"],
        },
        "head_node_type": HEAD,
        "available_node_types": {
            group.name: _node_type(cluster, group) for group in (cluster.head, *cluster.workers)
        },
        # Ray's rsync preserves the mode. The head copies the file to the workers.
        "file_mounts": {TOKEN: cluster.token_file},
        "cluster_synced_files": [],
        # The new group needs a new login; the launcher's connections last 10 s.
        "initialization_commands": ["sudo usermod -aG docker $USER", "sleep 15"],
        # The launcher's defaults would install another Ray.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            (
                f"{START} --head --port=6379 --object-manager-port=8076 --num-cpus=0 --num-gpus=0"
                " --dashboard-host=127.0.0.1 --dashboard-port=8265"
                " --autoscaling-config=~/ray_bootstrap_config.yaml"
            ),
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{START} --address=$RAY_HEAD_IP:6379 --object-manager-port=8076",
        ],
    }


def _node_type(cluster: ClusterConfig, group: NodeGroup) -> dict[str, Any]:
    disk = {"VolumeSize": DISK_GIB, "VolumeType": "gp3", "Encrypted": True}
    node: dict[str, Any] = {
        "InstanceType": group.instance,
        "ImageId": cluster.ami,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required"},
    }
    if group.identity is not None:
        node["IamInstanceProfile"] = {"Name": group.identity}
    if group.spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    head = group.name == HEAD
    return {
        "resources": {"CPU": 0 if head else group.cpus, "GPU": 0 if head else group.gpus},
        "node_config": node,
        "min_workers": 0 if head else group.min_nodes,
        "max_workers": 0 if head else group.count,
    }
