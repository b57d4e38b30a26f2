"""What a user says of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesocosm.config import JobConfig
from mesocosm.errors import UsageError
from mesocosm.evaluation.open_loop import HORIZONS
from mesocosm.reality.config import RealityConfig


@dataclass
class EvaluateConfig(JobConfig):
    world: str = ""
    """`worlds/<id>`, or a unique prefix of the id."""
    agent: str | None = None
    """`agents/<id>` to judge in reality and to imagine in the world; None evaluates the world alone and takes no real step."""
    datasets: list[str] = field(default_factory=list)
    """Datasets whose validation split is used; none: those that the world was trained on."""
    reality: RealityConfig = field(default_factory=RealityConfig)
    """Where the agent is judged; without `reality.env`, the environment that the world is of."""
    episodes: int = 20
    """Judged episodes."""
    target: float | None = None
    """A return to reach, for the report."""
    horizons: list[int] = field(default_factory=lambda: [h for h in HORIZONS if isinstance(h, int)])
    """Steps ahead, for the open-loop error."""
    full: bool = True
    """Roll out whole validation episodes, too."""
    starts: int = 128
    """Logged states to start from, for each horizon."""
    samples: int = 19
    """Sampled rollouts from each start; their range is a (samples - 1) / (samples + 1) interval, 90% for 19."""
    ledger: str | None = None
    """The ledger that counts the real steps; None is one named as the evaluation."""

    def validate(self) -> None:
        """Raises UsageError naming the key, its value and the fix. Looks at nothing but the config."""
        if not self.world:
            raise UsageError("world is not set; give the world to evaluate, as in world=worlds/ab12")
        for key in ("episodes", "starts", "samples"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key}={getattr(self, key)} must be at least 1")
        if not self.horizons and not self.full:
            raise UsageError("horizons=[] and full=false leave nothing to measure; give horizons such as [1,5,15,50]")
        for horizon in self.horizons:
            if horizon < 1:
                raise UsageError(f"horizons={self.horizons}: {horizon} steps ahead is no horizon; give numbers of at least 1")
