"""What `train-agent` and the model-free baselines take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesocosm.config import JobConfig
from mesocosm.envs.config import RealityConfig


@dataclass
class AgentConfig(JobConfig):
    world: str = ""
    """The world to train in: `worlds/<id>`, an id, or a unique prefix of one."""
    backend: str = "serve"
    """`serve` (the Ray Serve application `app`) or `local` (in the environment runner's own
    process); the trajectories are the same.
    """
    app: str = "mesocosm"
    """The Serve application's name, on the Ray at `ray.address`; without an address the job serves
    the world itself while it trains.
    """
    algo: str = "PPO"
    """PPO, APPO, IMPALA, SAC or DQN of RLlib."""
    params: dict[str, Any] = field(default_factory=dict)
    """RLlib's own names, as its `.training()` takes them: lr, num_epochs, minibatch_size, ...;
    those not named are `settings.IMAGINED`'s.
    """
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of RLlib's DefaultModelConfig; those not named are `settings.MODEL`'s."""
    gamma: float = 0.99
    """A step's discount; a unit of time's where the environment gives info["duration"]."""
    iterations: int = 40
    num_envs: int = 64
    """Imagined environments of an environment runner, stepped together."""
    rollout: int = 64
    """Steps of each environment in an iteration, which is num_envs x rollout imagined steps long.
    """
    snapshots: int = 8
    """Policies kept on the way, evenly spread over the iterations: `agents/<id>@<iteration>`. The
    agent is the best of them and the last, by greedy imagined episodes; 0 keeps none.
    """
    runners: int = 0
    """Environment runners in Ray actors, each with `num_envs` environments; 0: one in the job's own
    process.
    """
    horizon: int | None = None
    """Imagined steps after which an episode is cut (the value of its last observation stands for
    the rest); None: the environment's own time limit, or where it registers none the longest
    truncated episode of the world's data. Short horizons from logged starts trust the world less
    far, and teach less of what comes late.
    """
    starts: str = "generated"
    """`generated`: imagined episodes begin at the world's own samples; `logged`: at observations of
    the world's datasets, uniformly.
    """
    datasets: list[str] = field(default_factory=list)
    """Datasets of logged starts; empty: those that the world was trained on."""
    objective: str = "return"
    """`return`, or `disagreement`: an adversary, which seeks what the members do not agree on
    (evaluate's off-policy table wants one).
    """
    penalty: float = 0.3
    """Reward lost for a disagreement of 1 between the world's members (what a tenth of held-out
    transitions exceed), in units of the root mean square of the data's rewards, and at most one
    such unit. Without it agents drift off where nothing is known (docs/benchmarks.md).
    """
    max_disagreement: float | None = None
    """Imagined episodes are truncated after a step whose disagreement exceeds this (the value of
    its last observation stands for the rest).
    """
    init: str | None = None
    """`agents/<id>`: begin with the weights of an earlier agent of the same algorithm, network and
    spaces. Where training leaves it worse in this world than it was, the earlier agent is kept.
    """


@dataclass
class BaselineConfig(JobConfig):
    reality: RealityConfig = field(default_factory=RealityConfig)
    algo: str = "PPO"
    params: dict[str, Any] = field(default_factory=dict)
    """RLlib's own names, as its `.training()` takes them; those not named are `settings.REAL`'s."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of RLlib's DefaultModelConfig; those not named are `settings.MODEL`'s."""
    gamma: float = 0.99
    """A step's discount; a unit of time's where the environment gives info["duration"]."""
    steps: int = 20_000
    """Real steps that training and selection may take together."""
    num_envs: int | None = None
    rollout: int | None = None
    """Steps of each environment between updates; both None: as `settings.SHAPE` has it for the
    algorithm.
    """
    iteration_steps: int = 256
    """Replay algorithms only: steps between two points of the curve."""
    target: float | None = None
    """Stop once this mean return is reached in greedy episodes; None: use all the steps."""
    judge_every: int | None = None
    """Real steps of training between two measurements of the present greedy policy, as a world's
    agents are measured: the ledger has them under `judge` and the curve does not count them. They
    decide whether the target is reached; None: selection does.
    """
    judge_episodes: int = 10
    window: int = 10
    """The curve's training return is the mean of so many last training episodes: free, of exploring
    policies, and behind its time.
    """
    select_episodes: int = 5
    """Greedy real episodes that confirm a policy whose training return has reached the target; they
    count, as `select`. 0: none are needed.
    """
    select_every: int = 1000
    """Real steps of training, at least, between two such confirmations."""
    ledger: str | None = None
    """The ledger to count in; None: one of this run's own, so that a budget of the world's data is
    not touched.
    """
