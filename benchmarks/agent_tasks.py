"""The tasks of `make bench-agents`: reality, target, demands, methods and their settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOOPS = HERE.parent / "configs" / "loop"
OWN = HERE / "agents"

WORLD = "world"
"""The world's agent: the job `loop`."""
FORMER = "world, PPO"
"""PPO in the world: cells of earlier commits, which are shown and not run."""
PLANNER = "planner"
"""The ablation in which a planner with the agent acts when it is measured."""
PEER = "SB3-SAC"
"""Stable-Baselines3's SAC (peers.py)."""


@dataclass(frozen=True)
class Task:
    config: Path
    """The loop's config: the reality, its price, the world's settings."""
    target: float
    """Return to reach. Of a DMC task: TD-MPC2's at 100,000 environment steps, mean of 3 seeds."""
    demands: dict[int, float | None]
    """Steps at which returns are compared, and the return that is demanded there."""
    methods: dict[str, list[str]] = field(default_factory=lambda: {WORLD: []})
    """Method -> its settings: overrides of `config`, or of mesocosm/agents/settings.py's REAL."""
    caps: dict[str, int] = field(default_factory=dict)
    """Real steps after which a model-free run is censored. A world's are its config's rounds."""
    minutes: dict[str, float] = field(default_factory=lambda: {WORLD: 30.0})
    """A guess of one seed's wall time on 2 cores, for --dry-run where no cell was measured."""
    every: int = 500
    """Steps between two measurements of a model-free policy."""
    repeat: int = 1
    """Environment steps of a decision, which is one step of the ledger. All steps shown are
    environment steps.
    """

    @property
    def published(self) -> bool:
        """It has published curves."""
        return self.repeat > 1


# RL Baselines3 Zoo: its PPO for CartPole-v1. It and the two other settings of RLlib's algorithms
# on the first two tasks are the best of three candidates each on seed 100.
ZOO_PPO = ["num_envs=8", "rollout=32", "gamma=0.98", "params.lambda_=0.8"]
ZOO_PPO += ["params.num_epochs=20", "params.minibatch_size=256"]
# RL Baselines3 Zoo: its SAC for PyBullet's continuous tasks.
ZOO_SAC = [f"params.{name}_lr=7.3e-4" for name in ("actor", "critic", "alpha")]
ZOO_SAC += ["params.tau=0.02", "gamma=0.98"]


def dmc(name: str, target: float, *settings: str) -> Task:
    """A task of the DeepMind Control Suite, by its name in the published curves."""
    settings = (f"reality.kwargs.task={name}", f"reality.success=return >= {target:g}", *settings)
    demands: dict[int, float | None] = {25_000: target, 50_000: target}
    return Task(OWN / "dmc.yaml", target, demands, {WORLD: list(settings)}, repeat=2)


TASKS = {
    "InvertedPendulum-v5": Task(
        OWN / "inverted-pendulum.yaml",
        950.0,
        {300: 950.0, 500: 950.0},
        {WORLD: [], FORMER: [], "PPO": ["rollout=128"], "SAC": ZOO_SAC},
        {"PPO": 30_000, "SAC": 6_000},
        {WORLD: 5.0, "PPO": 1.0, "SAC": 10.0},
    ),
    "CartPole-v1": Task(
        OWN / "cartpole.yaml",
        475.0,
        {300: 475.0, 500: 475.0},
        {WORLD: [], FORMER: [], "PPO": ZOO_PPO, "DQN": []},
        {"PPO": 30_000, "DQN": 8_000},
        {WORLD: 5.0, "PPO": 1.0, "DQN": 4.0},
    ),
    "Reacher-v5": Task(
        LOOPS / "reacher.yaml",
        -6.0,
        {1500: -6.0, 3000: -6.2},
        {WORLD: ["evaluate.episodes=100"], FORMER: [], "PPO": [], PEER: []},
        {"PPO": 100_000, PEER: 20_000},
        {WORLD: 15.0, "PPO": 10.0, PEER: 5.0},
    ),
    "Hopper-v5": Task(
        LOOPS / "hopper.yaml",
        1000.0,
        {4000: 190.0, 12_000: 400.0, 20_000: 1000.0},
        {WORLD: [], FORMER: [], PEER: []},
        {PEER: 20_000},
        {WORLD: 60.0, PEER: 15.0},
        every=2000,
    ),
    "HalfCheetah-v5": Task(
        OWN / "halfcheetah.yaml",
        3000.0,
        {10_000: None, 20_000: 3000.0},
        {WORLD: [], PEER: []},
        {PEER: 20_000},
        {WORLD: 60.0, PEER: 15.0},
        every=1000,
    ),
    "pendulum-swingup": dmc("pendulum-swingup", 724.0),
    "finger-spin": dmc("finger-spin", 948.0),
    "reacher-easy": dmc("reacher-easy", 937.0),
    "cup-catch": dmc("cup-catch", 981.0),
    "cartpole-swingup": dmc("cartpole-swingup", 839.0),
    "walker-walk": dmc("walker-walk", 962.0),
    "hopper-stand": dmc("hopper-stand", 28.0),
}

LEAN = ["evaluate.horizons=[1,15]", "evaluate.full=false", "evaluate.starts=32"]
LEAN += ["evaluate.samples=5", "agent.backend=local", "baselines=[]", "stop_at_target=true"]
"""Overrides of every world's run: the world itself is measured less, and the agent trains in one
process with the same trajectories.
"""

ABLATED = ("Reacher-v5", "cartpole-swingup")
ABLATIONS: dict[str, list[str]] = {
    "base_steps=100": ["pretrain.model.base_steps=100"],
    "base_steps=1500": ["pretrain.model.base_steps=1500"],
    "real_share=0": ["agent.real_share=0"],
    "real_share=0.5": ["agent.real_share=0.5"],
    "branch=1": ["agent.branch=1"],
    "branch=15": ["agent.branch=15"],
    "penalty=0.3": ["agent.penalty=0.3"],
    "members=1": ["pretrain.model.members=1"],
    "members=8": ["pretrain.model.members=8"],
    PLANNER: [],
    "planner collects": ["explore.behaviours=[{kind: planner}]"],
    "warm_start=false": ["warm_start=false"],
    "warm_start=auto": ["warm_start=auto"],
}
"""Name -> overrides of the task's settings; one that changes nothing there is not run."""
