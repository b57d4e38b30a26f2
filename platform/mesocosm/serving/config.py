"""What `serve` deploys: which world, on how many replicas."""

from __future__ import annotations

from dataclasses import dataclass

from mesocosm.config import JobConfig


@dataclass
class ServeConfig(JobConfig):
    world: str = ""
    """The default world: an artifact id, a unique prefix of one, or a folder that every replica can read. Clients may ask for any other by id."""
    name: str = "mesocosm"
    """The Serve application's name, by which clients find it."""
    replicas: int = 1
    threads: int = 1
    """Torch threads of a replica. A trajectory is the same to the last bit only where this is the same."""
    cpus: float = 1.0
    """Logical CPUs reserved for each replica."""
    device: str = "cpu"
    max_sessions: int = 64
    """Sessions whose caches a replica keeps; the least recently used goes first, and its client goes on with one replay."""
    max_worlds: int = 3
    """World versions a replica keeps loaded."""
