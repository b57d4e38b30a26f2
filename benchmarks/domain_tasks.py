"""The domains of `make bench-domains`: the loop's config, the expert, the target and the caps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

LOOPS = Path(__file__).resolve().parent.parent / "configs" / "loop"

WORLD, FREE, CLONE, EXPERT = "world", "PPO", "clone", "expert"
"""The world's agent (the job `loop`), model-free PPO (`baseline`), cloning (`clone`), a script."""
METHODS = (EXPERT, CLONE, FREE, WORLD)


@dataclass(frozen=True)
class Domain:
    config: Path
    """The loop's: the reality, its price, the world's and its agent's settings."""
    expert: str
    """`module:function` of the script."""
    scripts: dict[str, str]
    """Other scripts that are judged: name -> `module:function`."""
    target: float | None
    """Mean return to reach. None is the expert's, on the episodes that judge all methods."""
    episodes: int
    """Greedy episodes of a measurement. Those of one seed are the same for all methods."""
    steps: int
    """Real steps after which PPO is censored. The world's are its config's rounds."""
    every: int
    """Real steps between two measurements of PPO."""
    free: list[str] = field(default_factory=list)
    """PPO's settings."""
    clone: list[str] = field(default_factory=list)
    """Settings of `clone`."""
    minutes: dict[str, float] = field(default_factory=dict)
    """A guess of one seed's wall time on 2 cores, for --dry-run where no cell was measured."""


DOMAINS = {
    "training": Domain(
        LOOPS / "training.yaml",
        expert="mesocosm.envs.training_policies:AdaptiveRate",
        scripts={"LowRate, the best fixed plan": "bench_training:LowRate"},
        target=None,
        episodes=40,
        steps=7680,
        every=1280,
        free=["num_envs=4", "rollout=64"],
        clone=["share=0.2"],
        minutes={EXPERT: 1.0, CLONE: 3.0, FREE: 15.0, WORLD: 15.0},
    ),
    "browser": Domain(
        LOOPS / "browser.yaml",
        expert="mesocosm.envs.browser.experts:page_expert",
        scripts={},
        target=0.7,
        episodes=20,
        steps=8000,
        every=1000,
        free=["num_envs=1", "rollout=250"],
        clone=["share=0.5"],
        minutes={EXPERT: 1.0, CLONE: 3.0, FREE: 20.0, WORLD: 10.0},
    ),
}
