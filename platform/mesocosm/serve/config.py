"""Config of `mesocosm serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesocosm.config import JobConfig
from mesocosm.errors import UsageError, nearest

DEVICES = ("cpu", "cuda")
PLANNERS = ("icem",)


@dataclass
class ServeConfig(JobConfig):
    world: str = ""
    """The default world: an artifact id, a unique prefix of one, or a folder that every replica can
    read. Clients may ask for any other world by id.
    """
    planner: str | None = None
    """`icem`: also plan actions for real environments in the default world
    (`mesocosm.ServedPlanner`); null serves no planner.
    """
    agent: str | None = None
    """`agents/ID`, with `planner`: its proposals and its value function guide the plans. Planning
    without an agent takes several times as long and earns less.
    """
    name: str = "mesocosm"
    """Name of the Serve application."""
    replicas: int = 1
    autoscaling: dict[str, Any] = field(default_factory=dict)
    """Fields of Ray Serve's AutoscalingConfig: the number of replicas follows the clients' requests
    between `min_replicas` and `max_replicas`, so that each has `target_ongoing_requests` at once.
    Empty for always `replicas`.
    """
    threads: int = 1
    """Torch threads per replica. A trajectory has the same bits only for the same value."""
    cpus: float = 1.0
    """Logical CPUs reserved per replica."""
    device: str = "cpu"
    """`cpu`, or `cuda` for one GPU per replica."""
    max_sessions: int = 64
    """Cached sessions per replica. The least recently used is evicted; its client replays it once.
    """
    max_worlds: int = 3
    """Loaded world versions per replica."""
    http: int | None = None
    """Port of an HTTP ingress to the default world, on this machine's loopback address, with a
    bearer token. 0 takes any free port. null opens no port.
    """


def check(config: ServeConfig) -> None:
    """Raise UsageError on the first invalid value. Reads no storage and starts nothing."""
    for key, least in dict(replicas=1, threads=1, max_sessions=1, max_worlds=1, cpus=0).items():
        if not getattr(config, key) >= least:
            raise UsageError(f"serve.{key} must be >= {least}, got {getattr(config, key)}")
    if config.autoscaling:
        _check_autoscaling(config)
    if config.http is not None and not 0 <= config.http <= 65535:
        ports = "a port from 1024 to 65535, 0 for any free port or null for none"
        raise UsageError(f"serve.http must be {ports}, got {config.http}")
    if config.planner is not None:
        if config.planner not in PLANNERS:
            hint = f"got {config.planner!r}{nearest(config.planner, PLANNERS)}"
            raise UsageError(f"serve.planner must be one of {', '.join(PLANNERS)} or null, {hint}")
        if not config.world:
            raise UsageError("serve.world must be set with serve.planner, got serve.world=''")
    elif config.agent is not None:
        raise UsageError(
            f"serve.agent must be null without serve.planner, got {config.agent!r}; set"
            " serve.planner=icem"
        )
    if not config.name:
        raise UsageError("serve.name must not be empty, got ''; name the application")
    if config.device not in DEVICES:
        hint = f"got {config.device!r}{nearest(config.device, DEVICES)}"
        raise UsageError(f"serve.device must be one of {', '.join(DEVICES)}, {hint}")


def first_replicas(config: ServeConfig) -> int:
    """The number of replicas that start with the application."""
    if not config.autoscaling:
        return config.replicas
    least: int = config.autoscaling.get("min_replicas", 1)
    first: int | None = config.autoscaling.get("initial_replicas")
    return least if first is None else first


def _check_autoscaling(config: ServeConfig) -> None:
    """Raise UsageError where Ray Serve has no such field, or refuses its value."""
    from pydantic import ValidationError
    from ray.serve.config import AutoscalingConfig  # Ray, which most commands do not need

    if config.replicas != 1:
        fix = "set serve.autoscaling.initial_replicas instead"
        raise UsageError(
            f"serve.replicas must be 1 with serve.autoscaling, got {config.replicas}; {fix}"
        )
    names = [name for name in AutoscalingConfig.model_fields if name != "policy"]
    for name in config.autoscaling:
        if name not in names:
            message = f"serve.autoscaling.{name} is not a field of Ray Serve's AutoscalingConfig"
            raise UsageError(f"{message} that a world can use{nearest(name, names)}")
    try:
        AutoscalingConfig(**config.autoscaling)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["serve.autoscaling", *map(str, first["loc"])])
        value = first["input"] if first["loc"] else config.autoscaling
        raise UsageError(f"{key} is refused by Ray Serve: {first['msg']}, got {value}") from error
