"""What `serve` deploys: which world, on how many replicas."""

from __future__ import annotations

from dataclasses import dataclass

from mesocosm.config import JobConfig
from mesocosm.errors import UsageError, nearest

DEVICES = ("cpu", "cuda")


@dataclass
class ServeConfig(JobConfig):
    world: str = ""
    """The default world: an artifact id, a unique prefix of one, or a folder that every replica can
    read. Clients may ask for any other by id.
    """
    name: str = "mesocosm"
    """The Serve application's name, by which clients find it."""
    replicas: int = 1
    threads: int = 1
    """Torch threads of a replica. A trajectory is the same to the last bit only where this is the
    same.
    """
    cpus: float = 1.0
    """Logical CPUs reserved for each replica."""
    device: str = "cpu"
    """`cpu` or `cuda`: one GPU for each replica."""
    max_sessions: int = 64
    """Sessions whose caches a replica keeps; the least recently used goes first, and its client
    goes on with one replay.
    """
    max_worlds: int = 3
    """World versions a replica keeps loaded."""
    http: int | None = None
    """Port of an HTTP ingress to the default world, on the loopback of the machine that runs this,
    behind a bearer token; 0: any free one; null: none.
    """


def check(config: ServeConfig) -> None:
    """Raise UsageError on the first value that cannot be meant. Reads no storage, starts nothing."""
    for key in ("replicas", "threads", "max_sessions", "max_worlds"):
        value = getattr(config, key)
        if value < 1:
            raise UsageError(f"serve.{key}={value} must be at least 1")
    if config.http is not None and not 0 <= config.http <= 65535:
        raise UsageError(
            f"serve.http={config.http} is no port; set it to one of 1024 to 65535, to 0 for any"
            " free one, or to null for none"
        )
    if not config.cpus >= 0:
        raise UsageError(f"serve.cpus={config.cpus} must be at least 0")
    if not config.name:
        raise UsageError(
            "serve.name='' names no application; give it a name, by which clients find it"
        )
    if config.device not in DEVICES:
        raise UsageError(
            f"serve.device={config.device!r} is not one of"
            f" {', '.join(DEVICES)}{nearest(config.device, DEVICES)}"
        )
