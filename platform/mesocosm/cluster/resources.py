"""What a job asks of a cluster, from its config alone. Imports no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mesocosm.config import JobConfig


@dataclass(frozen=True)
class Needs:
    cpus: float
    gpus: float
    what: str
    """The keys that ask for the most"""


def needs(config: JobConfig) -> Needs:
    """The most that the job holds at once. Where a config says nothing of GPUs, none is needed:
    what is there is used.
    """
    found = list(_asked(config, ""))
    for name in ("collect", "explore", "pretrain", "serve", "agent", "evaluate"):
        if isinstance(
            getattr(config, name, None), JobConfig
        ):  # a loop's stages follow each other, but for the agent beside its world
            found += _asked(getattr(config, name), f"{name}.")
    served, agent = getattr(config, "serve", None), getattr(config, "agent", None)
    if isinstance(served, JobConfig) and isinstance(agent, JobConfig):
        a, b = (
            max(_asked(block, ""), key=lambda n: n.cpus, default=Needs(0, 0, ""))
            for block in (served, agent)
        )
        found.append(Needs(a.cpus + b.cpus, a.gpus + b.gpus, "serve.replicas with agent.runners"))
    return Needs(
        max((n.cpus for n in found), default=1.0),
        max((n.gpus for n in found), default=0.0),
        max(found, key=lambda n: n.cpus).what if found else "",
    )


def _asked(config: Any, prefix: str) -> list[Needs]:
    found = []
    train: Any = getattr(config, "train", None)
    if hasattr(train, "workers"):
        found.append(
            Needs(
                train.workers,
                train.workers * (train.gpus_per_worker or 0),
                f"{prefix}train.workers={train.workers}",
            )
        )
    elif hasattr(config, "concurrent"):
        found.append(Needs(config.concurrent, 0, f"{prefix}concurrent={config.concurrent}"))
    elif hasattr(config, "replicas"):
        gpus = config.replicas if config.device == "cuda" else 0
        found.append(
            Needs(config.replicas * config.cpus, gpus, f"{prefix}replicas={config.replicas}")
        )
    elif hasattr(config, "runners"):
        found.append(Needs(max(config.runners, 1), 0, f"{prefix}runners={config.runners}"))
    elif isinstance(getattr(config, "workers", None), int):
        found.append(Needs(config.workers, 0, f"{prefix}workers={config.workers}"))
    return found
