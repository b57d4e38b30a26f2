"""The config of Ray's cluster launcher on EC2, from templates/launcher.yaml.j2.

Every node starts with token authentication. The dashboard listens on the head's loopback only. The
head is on demand and runs no tasks. Nodes are terminated: a stopped node's disk costs money.
"""

from __future__ import annotations

from typing import Any

from mesocosm.cluster.kuberay import fill
from mesocosm.cluster.spec import ClusterConfig

TOKEN = "~/.ray/auth_token"
"""The file in which Ray looks for the token, in every container."""


def launcher_config(name: str, cluster: ClusterConfig) -> dict[str, Any]:
    """The config for `ray up`."""
    (config,) = fill("launcher", name=name, cluster=cluster)
    return config
