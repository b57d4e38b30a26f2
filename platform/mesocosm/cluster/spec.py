"""What a cluster is: `clusters/<name>.yaml` -> where it is, its groups of nodes, seconds and money,
its token. Imports no Ray.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

from mesocosm import config
from mesocosm.errors import UsageError, nearest

FOLDERS = (Path("clusters"), Path(__file__).resolve().parents[3] / "clusters")
"""Where the user stands, then beside the package's source."""

WHERE = ("local", "address", "launcher", "kuberay")
MADE = ("launcher", "kuberay")
"""Where clusters are made from what a file says."""
HEAD = "head"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAME = re.compile(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?")
"""What Kubernetes and EC2 both take for a name, with room for what they add to it."""


@dataclass
class NodeGroup:
    name: str = "workers"
    """The group named `head` is the head node, where a cluster is made from this file: one node, on
    which no task runs.
    """
    count: int = 1
    """Nodes at full size: what estimates reckon with, and the most that autoscaling starts."""
    cpus: int | None = None
    """Of each node; null: as many as this machine has."""
    gpus: int | None = 0
    """Of each node; null: as many as this machine has."""
    price_per_hour: float = 0.0
    """Of one node."""
    flops_per_s: float = 1e10
    """What one worker (a GPU where there are any, a core otherwise) computes in training, in
    counted FLOPs.
    """
    seconds_per_step: float = 0.0
    """What a step of one worker costs beside them: small models spend most of their time there."""
    min_count: int | None = None
    """Nodes that stay while nothing runs; null: `count`, so that none comes or goes. Of a cluster
    that somebody else keeps it says that more will come.
    """
    memory_gib: float | None = None
    """Of each pod."""
    instance: str | None = None
    """The instance type: on EC2 what is started, on Kubernetes the nodes that pods are placed on
    (null: any that has room).
    """
    spot: bool = False
    """Cheaper, and may be taken away; a job goes on from its last checkpoint."""
    identity: str | None = None
    """Whose rights the nodes have, to storage above all: the name of an EC2 instance profile, or of
    a Kubernetes service account.
    """

    @property
    def kept(self) -> int:
        """Nodes that stay while nothing runs."""
        return self.count if self.min_count is None else self.min_count


@dataclass
class ClusterConfig:
    nodes: list[NodeGroup] = field(default_factory=lambda: [NodeGroup()])
    """Training runs on the first group; all of them are paid for as long as it runs."""
    currency: str = "USD"
    where: str = "local"
    """`local`: this machine; `address`: a cluster that somebody else keeps; `launcher`: EC2, by
    Ray's cluster launcher; `kuberay`: Kubernetes.
    """
    address: str | None = None
    """The dashboard's URL, which answers Ray Jobs, as this machine reaches it: the near end of a
    tunnel or port-forward, or https.
    """
    token_file: str = "~/.ray/auth_token"
    """Ray's token, in a file of this machine that only its owner may read."""
    storage_root: str | None = None
    """`storage.root` of jobs that run there; null: their config's own."""
    tracking_uri: str | None = None
    """`tracking.uri` of jobs that run there; null: their config's own."""
    image: str | None = None
    """The container image of every node: clusters/Dockerfile, built and pushed to where nodes may
    pull it.
    """
    region: str | None = None
    """Of EC2."""
    ami: str | None = None
    """The machine image of EC2: an id, or `resolve:ssm:` and a public parameter. It needs Docker
    and NVIDIA's driver and container toolkit.
    """
    secret: str | None = None
    """The name of a Kubernetes Secret whose entries become environment variables of every pod:
    storage credentials, where `identity` gives no right to it.
    """

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

    @property
    def idle_price_per_hour(self) -> float:
        """While nothing runs."""
        return sum(group.kept * group.price_per_hour for group in self.nodes)

    @property
    def head(self) -> NodeGroup:
        return next(group for group in self.nodes if group.name == HEAD)

    @property
    def workers(self) -> list[NodeGroup]:
        return [group for group in self.nodes if group.name != HEAD]

    @property
    def grows(self) -> bool:
        """Whether nodes that are not there yet may come when a job asks for them."""
        return self.where in MADE or any(group.min_count is not None for group in self.nodes)

    def full(self, key: str) -> float:
        """What a cluster that grows has at full size, of `cpus`, `gpus` or `memory_gib`; 0 where it
        does not grow, or nothing says.
        """
        return (
            float(sum(group.count * (getattr(group, key) or 0) for group in self.workers))
            if self.grows
            else 0.0
        )

    @property
    def token_path(self) -> Path:
        return Path(self.token_file).expanduser()

    def seconds(self, flops: float, steps: int, workers: int = 1) -> float:
        """Estimated time of so many steps, that compute `flops` together."""
        here = self.nodes[0]
        return flops / (here.flops_per_s * workers) + steps * here.seconds_per_step


READ = {
    "address": ("address", *MADE),
    "token_file": ("address", *MADE),
    "image": MADE,
    "region": ("launcher",),
    "ami": ("launcher",),
    "secret": ("kuberay",),
    "min_count": ("address", *MADE),
    "instance": MADE,
    "identity": MADE,
    "spot": ("launcher",),
    "memory_gib": ("kuberay",),
}
"""Keys that not every `where` reads; elsewhere they are refused, rather than passed over."""

WANTED = {
    "address": {
        "address": (
            "the dashboard's URL as this machine reaches it, e.g. http://127.0.0.1:8265 through an"
            " SSH tunnel"
        )
    },
    "launcher": {
        "address": "http://127.0.0.1:8265, where `ray dashboard` brings the head's",
        "image": "what you built of clusters/Dockerfile and pushed",
        "region": "EC2's, e.g. us-west-2",
        "ami": "a machine image with Docker and NVIDIA's driver, see clusters/aws.yaml",
        "cpus": "the vCPUs of the instance",
        "instance": "an instance type, e.g. g6.2xlarge",
    },
    "kuberay": {
        "address": "http://127.0.0.1:8265, where `kubectl port-forward` brings the head's",
        "image": "what you built of clusters/Dockerfile and pushed",
        "cpus": "the CPUs of a pod",
        "memory_gib": "the memory of a pod",
    },
}
"""Keys that a `where` cannot do without, and what to give."""


def read(name: str) -> ClusterConfig:
    """The cluster `name`. Raises UsageError with the names that there are, or for a key that is
    wrong.
    """
    path = path_of(name)
    found = config.load(ClusterConfig, [path])
    _check(found, path)
    return found


def path_of(name: str) -> Path:
    """The file of the cluster `name`. Raises UsageError with the names that there are."""
    for folder in FOLDERS:
        if (path := folder / f"{name}.yaml").exists():
            return path
    known = names()
    raise UsageError(
        f"cluster={name!r}: there is no clusters/{name}.yaml; use one of"
        f" {', '.join(known) or 'your own'}{nearest(name, known)}"
    )


def names() -> list[str]:
    """The clusters that there are."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})


def _check(cluster: ClusterConfig, path: Path) -> None:
    file = repr(str(path))
    if not cluster.nodes:
        raise UsageError(f"{file}: nodes=[] names no group of nodes; give one at least")
    if cluster.where not in WHERE:
        raise UsageError(
            f"{file}: where={cluster.where!r} is not one of"
            f" {', '.join(WHERE)}{nearest(cluster.where, WHERE)}"
        )
    for group in cluster.nodes:
        for key, least in (
            ("count", 1),
            ("cpus", 1),
            ("gpus", 0),
            ("price_per_hour", 0),
            ("seconds_per_step", 0),
            ("min_count", 0),
        ):
            value = getattr(group, key)
            if value is not None and value < least:
                raise UsageError(
                    f"{file}: {key}={value} of {group.name!r} must be at least {least}"
                )
        for key in ("flops_per_s", "memory_gib"):
            value = getattr(group, key)
            if value is not None and not value > 0:
                raise UsageError(f"{file}: {key}={value} of {group.name!r} must be above 0")
        if group.kept > group.count:
            raise UsageError(
                f"{file}: min_count={group.min_count} of {group.name!r} is more than its"
                f" count={group.count}; lower it, or raise count"
            )
    _check_keys(cluster, file)
    if cluster.where in MADE:
        _check_made(cluster, path, file)
    if cluster.address is not None:
        _check_address(cluster.address, file)


def _check_keys(cluster: ClusterConfig, file: str) -> None:
    """Each key is read where the cluster is, and none is missing there."""
    wanted = WANTED.get(cluster.where, {})
    blocks: list[tuple[ClusterConfig | NodeGroup, str]] = [
        (cluster, ""),
        *((group, f" of {group.name!r}") for group in cluster.nodes),
    ]
    for block, of in blocks:
        for known in fields(block):
            key, value = known.name, getattr(block, known.name)
            if cluster.where not in READ.get(key, WHERE) and value != known.default:
                raise UsageError(
                    f"{file}: {key}={value!r}{of} is read with where={' or '.join(READ[key])} only,"
                    f" and where={cluster.where!r}; leave it out"
                )
            if key in wanted and not value:
                raise UsageError(
                    f"{file}: {key}={value!r}{of} is needed with where={cluster.where!r}; give"
                    f" {wanted[key]}"
                )
            if key in ("cpus", "gpus") and value is None and cluster.where != "local":
                raise UsageError(
                    f"{file}: {key}=null{of} would be this machine's; with where={cluster.where!r}"
                    " give the number that a node there has"
                )


def _check_made(cluster: ClusterConfig, path: Path, file: str) -> None:
    """What the launcher and KubeRay need of names, and of the head."""
    names = [group.name for group in cluster.nodes]
    for key, name in (("the file's name", path.stem), *(("name", name) for name in names)):
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{file}: {key} {name!r} cannot name nodes; use up to 30 small letters, digits and"
                " hyphens, a letter first"
            )
    if double := next((name for name in names if names.count(name) > 1 and name != HEAD), None):
        raise UsageError(f"{file}: nodes names {double!r} twice; give each group a name of its own")
    if names.count(HEAD) != 1 or names[0] == HEAD:
        raise UsageError(
            f"{file}: nodes={names} must hold one group named {HEAD!r}, after the group that trains"
        )
    head = cluster.head
    for key, value, meant in (
        ("count", head.count, 1),
        ("min_count", head.min_count, None),
        ("spot", head.spot, False),
        ("gpus", head.gpus, 0),
    ):
        if value != meant:
            raise UsageError(
                f"{file}: {key}={value} of {HEAD!r} cannot be: one node that stays, without GPUs,"
                " whose loss would end every job; leave it out"
            )


def _check_address(address: str, file: str) -> None:
    """A URL over which a token may travel: TLS, or the near end of a tunnel."""
    try:
        url = urlsplit(address)
        host, credentials = url.hostname, url.password
    except ValueError:
        host = credentials = None
    if not host or url.scheme not in ("http", "https"):
        raise UsageError(
            f"{file}: address={address!r} is no URL; give the dashboard's, e.g."
            " http://127.0.0.1:8265"
        )
    if credentials is not None or url.username is not None:
        raise UsageError(
            f"{file}: address names a user, and a config is no place for credentials; put the token"
            " into token_file"
        )
    if url.scheme == "http" and host not in LOOPBACK:
        raise UsageError(
            f"{file}: address={address!r} would carry the token unencrypted; use https, "
            f"or a tunnel (ssh -NL 8265:127.0.0.1:8265 {host}) and http://127.0.0.1:8265"
        )


def check_token(path: Path) -> None:
    """Raise UsageError unless the file is there, holds a token and is its owner's alone."""
    try:
        mode, empty = path.stat().st_mode, not path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"token_file {str(path)!r} cannot be read ({error}); `mesocosm cluster up` makes one"
            " where none is"
        ) from error
    if mode & 0o077:
        raise UsageError(
            f"token_file {str(path)!r} may be read by others (mode {mode & 0o777:o}); run: chmod"
            f" 600 {path}"
        )
    if empty:
        raise UsageError(
            f"token_file {str(path)!r} is empty; remove it, and `mesocosm cluster up` makes one"
        )


def make_token(path: Path, fix: str = "set token_file to a place of your own") -> bool:
    """Write a random token where none is, readable by its owner alone; whether it was made.

    Args:
        path: The token's file. Its folder is made with mode 0700.
        fix: What the error says to do when the file cannot be written.

    Raises:
        UsageError: `check_token` refuses the file, or it cannot be written.
    """
    try:
        write_private(path, secrets.token_hex(32), os.O_EXCL)
    except FileExistsError:
        _wait_until_written(path)
        check_token(path)
        return False
    except OSError as error:
        raise UsageError(
            f"token_file {str(path)!r} cannot be written ({error.strerror}); {fix}"
        ) from error
    return True


def _wait_until_written(path: Path) -> None:
    """Another process may be about to write the token that it has just created."""
    for _ in range(100):
        with suppress(OSError):
            if path.stat().st_size:
                return
        time.sleep(0.05)


def write_private(path: Path, text: str, flag: int) -> None:
    """Write a file that only its owner may read.

    Args:
        flag: `os.O_EXCL` to create the file, `os.O_TRUNC` to replace it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o600), "w") as file:
        file.write(text)
