"""Config of `mesocosm play`."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesocosm.config import JobConfig
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import UsageError


@dataclass
class PlayConfig(JobConfig):
    world: str = ""
    """The world: an artifact id, a unique prefix of one, or a folder."""
    port: int = 0
    """Port of the page, on this machine's loopback. 0 takes any free one."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """The real environment, by default the world's own. With a budget (`reality.budget.steps` or
    `money`) it is stepped together with the world. Without a budget no real step is taken.
    """
    ledger: str | None = None
    """The ledger that counts the real steps. Defaults to one of this world and this environment, so
    that the budget bounds all playing together.
    """

    @property
    def has_budget(self) -> bool:
        """True if real steps may be taken."""
        budget = self.reality.budget
        return budget.steps is not None or budget.money is not None


def check(config: PlayConfig) -> None:
    """Raise UsageError on the first invalid value. Reads no storage and starts nothing."""
    if not config.world:
        raise UsageError("world must name a world, got ''; try world=worlds/ID")
    if not 0 <= config.port <= 65535:
        raise UsageError(
            f"port must be from 1024 to 65535, or 0 for any free one, got {config.port}"
        )
    if config.has_budget:
        return
    for key in ("env", "kwargs", "task", "task_options", "horizon"):
        if value := getattr(config.reality, key):
            raise UsageError(
                f"reality.budget.steps must be set with reality.{key}={value!r}: playing takes no"
                " real step without a budget; try reality.budget.steps=200"
            )
