"""The config of a collection."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesocosm import checks
from mesocosm.config import JobConfig
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import UsageError
from mesocosm.policies import behaviours as acting
from mesocosm.policies.behaviours import BehaviourConfig


@dataclass
class CollectConfig(JobConfig):
    reality: RealityConfig = field(default_factory=RealityConfig)
    steps: int = 1000
    """Real steps to take, including those of dropped episodes."""
    lanes: int = 2
    """Number of episode sequences that share the steps. It changes which episodes are collected."""
    workers: int = 1
    """Ray actors that run the lanes. 0 runs them in this process, where a step that hangs cannot be
    ended.
    """
    behaviours: list[BehaviourConfig] = field(default_factory=lambda: [BehaviourConfig()])
    valid_fraction: float = 0.1
    """Share of the episodes held out for validation; 0 holds none out. Fewer than 5 episodes may
    all be trained on.
    """
    ledger: str | None = None
    """The ledger that counts the steps. Defaults to one with the dataset's id."""


def check(cfg: CollectConfig) -> None:
    """Raise UsageError on the first wrong value. Makes no environment."""
    checks.at_least(cfg, 1, "steps", "lanes")
    checks.at_least(cfg, 0, "workers")
    checks.within(cfg, 0, 1, "valid_fraction", open="]")
    if cfg.lanes > cfg.steps:
        raise UsageError(f"lanes must be <= steps={cfg.steps}, got {cfg.lanes}")
    acting.check(cfg.behaviours)
    acting.check_tasks(cfg.behaviours, cfg.reality)
