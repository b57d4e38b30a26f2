"""Configs of `train-agent` and of the model-free `baseline`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesocosm.config import ADDED, JobConfig
from mesocosm.envs.config import RealityConfig


@dataclass
class AgentConfig(JobConfig):
    world: str = ""
    """The world to train in: `worlds/ID`, an id, or a unique prefix of one."""
    backend: str = "serve"
    """`serve` (the Ray Serve application `app`) or `local` (in the environment runner's process).
    Both give the same trajectories.
    """
    app: str = "mesocosm"
    """Name of the Serve application on the Ray at `ray.address`. Without an address the job serves
    the world itself.
    """
    algo: str = "PPO"
    """PPO, APPO, IMPALA, SAC or DQN of RLlib."""
    params: dict[str, Any] = field(default_factory=dict)
    """Arguments of RLlib's `.training()`: lr, num_epochs, minibatch_size, ... Defaults are in
    `settings.IMAGINED`.
    """
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of RLlib's DefaultModelConfig. Defaults are in `settings.MODEL`."""
    candidates: str | None = field(default=None, metadata=ADDED)
    """The commands from which an agent chooses in a text environment. Either `module:function`, a
    function (first text, latest text) -> commands whose name begins with `candidates`, or `infos`:
    the commands in reality's info["admissible_commands"], which worlds do not have.
    """
    max_candidates: int = field(default=32, metadata=ADDED)
    """The most candidates of a step. Further ones are left out."""
    gamma: float = 0.99
    """Discount per step; per unit of time where the environment has info["duration"]."""
    iterations: int = 40
    num_envs: int = 64
    """Imagined environments of an environment runner, stepped together."""
    rollout: int = 64
    """Steps of each environment in an iteration, which takes num_envs x rollout imagined steps. SAC
    rounds it up to whole branches.
    """
    snapshots: int = 8
    """Policies saved during training, evenly spread over the iterations: `agents/ID@ITERATION`. The
    agent is the best of these and the last policy, by the return of greedy imagined episodes. 0
    saves none.
    """
    runners: int = 0
    """Environment runners in Ray actors, each with `num_envs` environments; 0 for one in the job's
    process.
    """
    learners: int = 0
    """RLlib's remote learners, in Ray actors that share each batch, with a CPU each, or a GPU each
    where this Ray has that many; 0 for one in the job's process. SAC cannot use any.
    """
    horizon: int | None = None
    """Imagined steps after which an episode is truncated (its last value stands for the rest).
    Defaults to the environment's time limit, or else to the longest truncated episode of the
    world's data. Short horizons from logged starts rely less on the world, and teach less about
    late events.
    """
    starts: str | None = None
    """`generated`: imagined episodes begin at samples of the world; `logged`: uniformly at
    observations of the world's datasets. Defaults to `logged` for SAC and in worlds of images,
    `generated` for the others.
    """
    datasets: list[str] = field(default_factory=list)
    """Datasets of logged starts, and of SAC's real transitions. Defaults to those that the world
    was trained on.
    """
    branch: int = 5
    """SAC: imagined steps from a start."""
    real_share: float = 0.1
    """SAC: share of a batch that is logged transitions. `objective=disagreement` uses none, because
    their rewards are the environment's.
    """
    updates_per_real_step: float = 5.0
    """SAC: updates of the whole training for each logged transition; with `init`, for each of the
    datasets that the earlier agent has not learned from (all, if there are none).
    """
    objective: str = "return"
    """`return`, or `disagreement` for an adversary that seeks disagreement between the members, for
    evaluate's off-policy table.
    """
    penalty: float = 0.3
    """Penalty subtracted from the reward at a disagreement of 1 (a tenth of held-out transitions
    have more), in units of the root mean square of the data's rewards, and at most one unit.
    Without it agents drift to states that the world does not know (docs/benchmarks.md).
    """
    max_disagreement: float | None = None
    """Truncate imagined episodes after a step with more disagreement (its last value stands for the
    rest).
    """
    init: str | None = None
    """`agents/ID`: start from the weights of an earlier agent with the same algorithm, network and
    spaces. The earlier agent is kept if training makes it worse in this world.
    """
    rival: str | None = None
    """`agents/ID`: an earlier agent with the same spaces. It is kept if the new one is worse in
    this world. `init` is also a rival.
    """


@dataclass
class BaselineConfig(JobConfig):
    reality: RealityConfig = field(default_factory=RealityConfig)
    algo: str = "PPO"
    params: dict[str, Any] = field(default_factory=dict)
    """Arguments of RLlib's `.training()`. Defaults are in `settings.REAL`."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of RLlib's DefaultModelConfig. Defaults are in `settings.MODEL`."""
    candidates: str | None = field(default=None, metadata=ADDED)
    """The commands from which an agent chooses in a text environment. Either `module:function`, a
    function (first text, latest text) -> commands whose name begins with `candidates`, or `infos`:
    the commands in reality's info["admissible_commands"], which worlds do not have.
    """
    max_candidates: int = field(default=32, metadata=ADDED)
    """The most candidates of a step. Further ones are left out."""
    tokenizer: str | None = field(default=None, metadata=ADDED)
    """`tokenizers/ID` of `mesocosm tokenize`: the agent sees images as the codes of this tokenizer,
    as agents in a world do. None if no observation is an image.
    """
    gamma: float = 0.99
    """Discount per step; per unit of time where the environment has info["duration"]."""
    steps: int = 20_000
    """Real steps of training and selection together."""
    num_envs: int | None = None
    rollout: int | None = None
    """Steps of each environment between updates. Both default to `settings.SHAPE`."""
    iteration_steps: int = 256
    """Replay algorithms: steps between two points of the curve."""
    target: float | None = None
    """Stop at this mean return of greedy episodes. Defaults to using all steps."""
    judge_every: int | None = None
    """Real training steps between two evaluations of the greedy policy. Agents of worlds are
    evaluated the same way. The evaluations decide whether the target is reached. Their steps are
    counted in the ledger (purpose `judge`), not in the curve. Defaults to no evaluations: then
    `select_episodes` decides.
    """
    judge_episodes: int = 10
    window: int = 10
    """The number of last training episodes whose mean return is the curve's training return. It
    needs no extra steps, but lags and includes exploration.
    """
    select_episodes: int = 5
    """Greedy real episodes that confirm a policy whose training return has reached the target.
    Their steps count, under the purpose `select`. 0 confirms without episodes.
    """
    select_every: int = 1000
    """Least real training steps between two confirmations."""
    ledger: str | None = None
    """The ledger of the steps. Defaults to one of this run, so that the budget of the world's data
    is not used.
    """
