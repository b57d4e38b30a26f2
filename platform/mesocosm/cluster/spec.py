"""Cluster files, `clusters/NAME.yaml`: place, nodes, prices and token. Imports no Ray."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

from mesocosm import checks, config, shipped
from mesocosm.errors import UsageError, nearest

FOLDERS = (Path("clusters"), shipped.CLUSTERS)
"""The user's folder, then the package's."""
WHERE = ("local", "address", "launcher", "kuberay")
MADE = ("launcher", "kuberay")
"""The clusters that are made from their file."""
HEAD = "head"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?")
"""Names that Kubernetes and EC2 accept, with room for their additions."""


@dataclass
class NodeGroup:
    name: str = "workers"
    """The group `head` of a cluster made from this file is its head node, which runs no tasks."""
    count: int = 1
    """Nodes at full size: for estimates, and the limit of autoscaling."""
    cpus: int | None = None
    """CPUs per node. Defaults to this machine's CPU count."""
    gpus: int | None = 0
    """GPUs per node; null: this machine's GPU count."""
    price_per_hour: float = 0.0
    """Price of one node."""
    flops_per_s: float = 1e10
    """Counted FLOPs per second of one training worker: a GPU, or a core if there is no GPU."""
    seconds_per_step: float = 0.0
    """Seconds per step of one worker in addition; small models spend most of their time there."""
    min_count: int | None = None
    """Nodes of an idle cluster. Defaults to `count`: the cluster does not grow."""
    memory_gib: float | None = None
    """Memory of each pod."""
    instance: str | None = None
    """EC2's instance type, or the type of the Kubernetes nodes for the pods (null: any)."""
    spot: bool = False
    """Cheaper, and may be taken away; a job continues from its last checkpoint."""
    identity: str | None = None
    """The EC2 instance profile or Kubernetes service account that gives nodes access to storage."""

    @property
    def min_nodes(self) -> int:
        return self.count if self.min_count is None else self.min_count


@dataclass
class ClusterConfig:
    nodes: list[NodeGroup] = field(default_factory=lambda: [NodeGroup()])
    """Training runs on the first group; all groups are paid for while it runs."""
    currency: str = "USD"
    where: str = "local"
    """`local` (this machine), `address` (an existing cluster), `launcher` (EC2) or `kuberay`."""
    address: str | None = None
    """The dashboard's URL, as this machine reaches it: the near end of a tunnel, or https."""
    token_file: str = "~/.ray/auth_token"
    """The file of Ray's token on this machine, which only its owner may read."""
    storage_root: str | None = None
    """`storage.root` of jobs on the cluster. Defaults to that of their config."""
    tracking_uri: str | None = None
    """`tracking.uri` of jobs on the cluster. Defaults to that of their config."""
    image: str | None = None
    """The container image of every node, built of clusters/Dockerfile."""
    region: str | None = None
    """EC2's region."""
    ami: str | None = None
    """EC2's machine image with Docker and NVIDIA's toolkit: an id, or `resolve:ssm:...`."""
    secret: str | None = None
    """A Kubernetes Secret with the environment of every pod, e.g. storage credentials."""

    @property
    def gpus(self) -> int:
        """GPUs of the group that trains."""
        group = self.nodes[0]
        if group.gpus is not None:
            return group.gpus * group.count
        import torch

        return torch.cuda.device_count() * group.count

    @property
    def slots(self) -> int:
        """Workers that can train at full speed at once."""
        group = self.nodes[0]
        return self.gpus or group.count * (group.cpus or os.cpu_count() or 1)

    @property
    def price_per_hour(self) -> float:
        return sum(group.count * group.price_per_hour for group in self.nodes)

    @property
    def idle_price_per_hour(self) -> float:
        """The price while nothing runs."""
        return sum(group.min_nodes * group.price_per_hour for group in self.nodes)

    @property
    def head(self) -> NodeGroup:
        return next(group for group in self.nodes if group.name == HEAD)

    @property
    def workers(self) -> list[NodeGroup]:
        return [group for group in self.nodes if group.name != HEAD]

    @property
    def grows(self) -> bool:
        """True if nodes may be added when a job asks for them."""
        return self.where in MADE or any(group.min_count is not None for group in self.nodes)

    def full(self, key: str) -> float:
        """The full `cpus`, `gpus` or `memory_gib` of a cluster that grows; 0 if unknown."""
        if not self.grows:
            return 0.0
        return float(sum(group.count * (getattr(group, key) or 0) for group in self.workers))

    @property
    def token_path(self) -> Path:
        return Path(self.token_file).expanduser()

    def seconds(self, flops: float, steps: int, workers: int = 1) -> float:
        """Estimated seconds of training steps that compute `flops` together."""
        group = self.nodes[0]
        return flops / (group.flops_per_s * workers) + steps * group.seconds_per_step


REMOTE = ("address", *MADE)
KEYS: dict[str, tuple[Sequence[str], Sequence[str], str]] = {
    "address": (REMOTE, REMOTE, "the dashboard's URL, e.g. http://127.0.0.1:8265 by a tunnel"),
    "token_file": (REMOTE, (), ""),
    "image": (MADE, MADE, "what was built of clusters/Dockerfile and pushed"),
    "region": (("launcher",), ("launcher",), "EC2's region, e.g. us-west-2"),
    "ami": (("launcher",), ("launcher",), "a machine image with Docker, see clusters/aws.yaml"),
    "secret": (("kuberay",), (), ""),
    "cpus": (WHERE, MADE, "the CPUs of a node"),
    "min_count": (REMOTE, (), ""),
    "instance": (MADE, ("launcher",), "an instance type, e.g. g6.2xlarge"),
    "identity": (MADE, (), ""),
    "spot": (("launcher",), (), ""),
    "memory_gib": (("kuberay",), ("kuberay",), "the memory of a pod"),
}
"""By key: the values of `where` that allow it (others are an error), the values of `where` that
require it, and a description of its value for messages.
"""


def read(name: str) -> ClusterConfig:
    """The cluster `name`. Raises UsageError where there is none, or its file is wrong."""
    path = path_of(name)
    cluster = config.load(ClusterConfig, [path])
    try:
        _check(cluster, path.stem)
    except UsageError as error:
        raise UsageError(f"{str(path)!r}: {error}") from None
    return cluster


def path_of(name: str) -> Path:
    """The file of the cluster `name`. Raises UsageError where there is none."""
    for folder in FOLDERS:
        if (path := folder / f"{name}.yaml").exists():
            return path
    fix = f"use one of {', '.join(names())}{nearest(name, names())}"
    raise UsageError(f"cluster={name!r}: there is no clusters/{name}.yaml; {fix}")


def names() -> list[str]:
    """The names of all cluster files."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})


def _check(cluster: ClusterConfig, name: str) -> None:
    where = cluster.where
    if not cluster.nodes:
        raise UsageError("nodes must name at least one group, got []")
    checks.one_of(cluster, WHERE, "where")
    _check_keys(cluster, where, "")
    for group in cluster.nodes:
        prefix = f"nodes.{group.name}."
        _check_keys(group, where, prefix)
        checks.at_least(group, 1, "count", "cpus", prefix=prefix)
        keys = ("gpus", "min_count", "price_per_hour", "seconds_per_step")
        checks.at_least(group, 0, *keys, prefix=prefix)
        for key in ("flops_per_s", "memory_gib"):
            value = getattr(group, key)
            if value is not None and not value > 0:
                raise UsageError(f"{prefix}{key} must be > 0, got {value}")
        if group.min_nodes > group.count:
            limit = f"count={group.count}"
            raise UsageError(f"{prefix}min_count must be <= {limit}, got {group.min_count}")
    if where in MADE:
        _check_groups(cluster, name)
    if cluster.address is not None:
        _check_address(cluster.address)


def _check_keys(block: ClusterConfig | NodeGroup, where: str, prefix: str) -> None:
    """Raise UsageError for a key that `where` does not use, or requires."""
    for entry in fields(block):
        key, value = f"{prefix}{entry.name}", getattr(block, entry.name)
        used_with, required_by, description = KEYS.get(entry.name, (WHERE, (), ""))
        if where not in used_with and value != entry.default:
            problem = f"{key} must be left out with where={where!r}, got {value!r}"
            raise UsageError(f"{problem}; it is used with where={' or '.join(used_with)}")
        if where in required_by and not value:
            raise UsageError(f"{key} must be {description}, got {value!r}")
        if entry.name in ("cpus", "gpus") and value is None and where != "local":
            raise UsageError(f"{key} must be a node's number with where={where!r}, got null")


def _check_groups(cluster: ClusterConfig, file_name: str) -> None:
    """Raise UsageError for names or a head that the launcher or KubeRay cannot use."""
    names = [group.name for group in cluster.nodes]
    for name in (file_name, *names):
        if not NAME.fullmatch(name):
            form = "up to 30 lower-case letters, digits and hyphens, a letter first"
            raise UsageError(f"name must be {form}, got {name!r}")
    if names.count(HEAD) != 1 or names[0] == HEAD:
        position = f"one group named {HEAD!r}, after the group that trains"
        raise UsageError(f"nodes must hold {position}, got {names}")
    if len(set(names)) < len(names):
        raise UsageError(f"nodes must have different names, got {names}")
    # The loss of the head ends every job.
    for key, required in (("count", 1), ("min_count", None), ("spot", False), ("gpus", 0)):
        if (value := getattr(cluster.head, key)) != required:
            raise UsageError(f"nodes.{HEAD}.{key} must be left out, got {value}")


def _check_address(address: str) -> None:
    """Raise UsageError unless a token may travel to the URL: over TLS, or into a local tunnel."""
    try:
        url = urlsplit(address)
        host, has_user = url.hostname, "@" in url.netloc
    except ValueError:
        host = None
    if not host or url.scheme not in ("http", "https"):
        example = "the dashboard's URL, e.g. http://127.0.0.1:8265"
        raise UsageError(f"address must be {example}, got {address!r}")
    if has_user:
        raise UsageError("address must not name a user or password; put the token into token_file")
    if url.scheme == "http" and host not in LOOPBACK:
        raise UsageError(
            f"address must be https, or the near end of a tunnel (ssh -NL 8265:127.0.0.1:8265"
            f" {host}) such as http://127.0.0.1:8265, got {address!r}: the token would travel"
            " unencrypted"
        )


def check_token(path: Path) -> None:
    """Raise UsageError unless the file holds a token that only its owner may read."""
    name = f"token_file {str(path)!r}"
    try:
        mode, token = path.stat().st_mode, path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        fix = "`mesocosm cluster up` makes one"
        raise UsageError(f"{name} cannot be read ({error}); {fix}") from error
    if mode & 0o077:
        problem = f"{name} may be read by others (mode {mode & 0o777:o})"
        raise UsageError(f"{problem}; run: chmod 600 {path}")
    if not token:
        raise UsageError(f"{name} is empty; remove it, and make a new one")


def make_token(path: Path, fix: str = "set token_file to a file of your own") -> bool:
    """Write a random token for its owner alone, if there is none, and return whether it was made.

    Raises:
        UsageError: `check_token` refuses the file, or it cannot be written; ends with `fix`.
    """
    try:
        write_private(path, secrets.token_hex(32), os.O_EXCL)
        return True
    except FileExistsError:
        end = time.monotonic() + 5
        while not path.stat().st_size and time.monotonic() < end:
            time.sleep(0.05)  # another process is about to write it
        check_token(path)
        return False
    except OSError as error:
        problem = f"token_file {str(path)!r} cannot be written ({error.strerror})"
        raise UsageError(f"{problem}; {fix}") from error


def write_private(path: Path, text: str, flag: int) -> None:
    """Write a file that only its owner may read, with `os.O_EXCL` or `os.O_TRUNC` as `flag`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o600), "w") as file:
        file.write(text)
