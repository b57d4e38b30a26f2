"""What a cluster is, as far as estimates need it: `clusters/<name>.yaml` -> seconds and money. Imports no Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mesocosm import config
from mesocosm.errors import UsageError, nearest

FOLDERS = (Path("clusters"), Path(__file__).resolve().parents[3] / "clusters")
"""Where the user stands, then beside the package's source."""


@dataclass
class NodeGroup:
    name: str = "workers"
    count: int = 1
    cpus: int | None = None
    """Of each node; null: as many as this machine has."""
    gpus: int | None = 0
    """Of each node; null: as many as this machine has."""
    price_per_hour: float = 0.0
    """Of one node."""
    flops_per_s: float = 1e10
    """What one worker (a GPU where there are any, a core otherwise) computes in training, in counted FLOPs."""
    seconds_per_step: float = 0.0
    """What a step of one worker costs beside them: small models spend most of their time there."""


@dataclass
class ClusterConfig:
    nodes: list[NodeGroup] = field(default_factory=lambda: [NodeGroup()])
    """Training runs on the first group; all of them are paid for as long as it runs."""
    currency: str = "USD"

    @property
    def gpus(self) -> int:
        """Of the group that trains."""
        here = self.nodes[0]
        if here.gpus is not None:
            return here.gpus * here.count
        import torch

        return torch.cuda.device_count() * here.count

    @property
    def slots(self) -> int:
        """Workers that train at full speed at once."""
        here = self.nodes[0]
        return self.gpus or here.count * (here.cpus or os.cpu_count() or 1)

    @property
    def price_per_hour(self) -> float:
        return sum(group.count * group.price_per_hour for group in self.nodes)

    def seconds(self, flops: float, steps: int, workers: int = 1) -> float:
        """Estimated time of so many steps, that compute `flops` together."""
        here = self.nodes[0]
        return flops / (here.flops_per_s * workers) + steps * here.seconds_per_step


def read(name: str) -> ClusterConfig:
    """The cluster `name`. Raises UsageError with the names that there are, or for a key that is wrong."""
    for folder in FOLDERS:
        if (path := folder / f"{name}.yaml").exists():
            found = config.load(ClusterConfig, [path])
            _check(found, path)
            return found
    known = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
    raise UsageError(f"cluster={name!r}: there is no clusters/{name}.yaml; use one of {', '.join(known) or 'your own'}{nearest(name, known)}")


def _check(cluster: ClusterConfig, path: Path) -> None:
    if not cluster.nodes:
        raise UsageError(f"{str(path)!r}: nodes=[] names no group of nodes; give one at least")
    for group in cluster.nodes:
        for key, least in (("count", 1), ("cpus", 1), ("gpus", 0), ("price_per_hour", 0), ("seconds_per_step", 0)):
            value = getattr(group, key)
            if value is not None and value < least:
                raise UsageError(f"{str(path)!r}: {key}={value} of {group.name!r} must be at least {least}")
        if not group.flops_per_s > 0:
            raise UsageError(f"{str(path)!r}: flops_per_s={group.flops_per_s} of {group.name!r} must be above 0")
