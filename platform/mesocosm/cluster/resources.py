"""The resources that a job asks of a cluster, from its config alone. Imports no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mesocosm.config import JobConfig

STAGES = ("collect", "explore", "pretrain", "serve", "agent", "evaluate")


@dataclass(frozen=True)
class Needs:
    cpus: float
    gpus: float
    key: str
    """The config key and value that need the most."""


def needs(config: JobConfig) -> Needs:
    """The most that the job holds at once. GPUs that the config does not set are not needed."""
    claims = list(_claims(config, ""))
    stages = {name: getattr(config, name, None) for name in STAGES}
    # A loop's stages follow each other, but the agent trains beside its served world.
    for name, stage in stages.items():
        if isinstance(stage, JobConfig):
            claims += _claims(stage, f"{name}.")
    if isinstance(stages["serve"], JobConfig) and isinstance(stages["agent"], JobConfig):
        (served,), (agent,) = _claims(stages["serve"], ""), _claims(stages["agent"], "")
        key = "serve.replicas with agent.runners"
        claims.append(Needs(served.cpus + agent.cpus, served.gpus + agent.gpus, key))
    most = max(claims, key=lambda need: need.cpus, default=Needs(1.0, 0.0, ""))
    return Needs(most.cpus, max((need.gpus for need in claims), default=0.0), most.key)


def _claims(config: Any, prefix: str) -> Iterator[Needs]:
    train: Any = getattr(config, "train", None)
    if hasattr(train, "workers"):
        gpus = train.workers * (train.gpus_per_worker or 0)
        yield Needs(train.workers, gpus, f"{prefix}train.workers={train.workers}")
    elif hasattr(config, "concurrent"):
        yield Needs(config.concurrent, 0, f"{prefix}concurrent={config.concurrent}")
    elif hasattr(config, "replicas"):
        gpus = config.replicas if config.device == "cuda" else 0
        yield Needs(config.replicas * config.cpus, gpus, f"{prefix}replicas={config.replicas}")
    elif hasattr(config, "runners"):
        yield Needs(max(config.runners, 1), 0, f"{prefix}runners={config.runners}")
    elif isinstance(getattr(config, "workers", None), int):
        yield Needs(config.workers, 0, f"{prefix}workers={config.workers}")
