"""RLlib's parameters by algorithm: its defaults suit long runs on Atari. A config's `params` win.

`config` has the keys that do not depend on the algorithm: horizon, gamma, rollout, penalty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym

from mesocosm.agents.config import AgentConfig, BaselineConfig
from mesocosm.policies.attention import attends
from mesocosm.policies.candidates import Candidates, CandidateShape, load_source
from mesocosm.policies.heads import mask_columns
from mesocosm.policies.images import ImageEncoder

Settings = dict[str, dict[str, Any]]
ON_POLICY = ("PPO", "APPO", "IMPALA")
REPLAY = ("SAC", "DQN")
ALGORITHMS = (*ON_POLICY, *REPLAY)
"""Algorithms whose policy can be exported"""

_PPO: dict[str, Any] = {"lr": 1e-3, "lambda_": 0.95, "clip_param": 0.2, "vf_clip_param": 1e6}
"""RLlib clips the squared error of the value at 10: returns above 3 would have no gradient"""
_BATCH = "train_batch_size_per_learner"
_WARMUP = "num_steps_sampled_before_learning_starts"
_UPDATE = "target_network_update_freq"
_SAC_RATES = ("actor_lr", "critic_lr", "alpha_lr")

IMAGINED: Settings = {
    "PPO": _PPO
    | {"minibatch_size": 256, "num_epochs": 8}
    | {"entropy_coeff": 0.005, "kl_coeff": 0.2, "kl_target": 0.03},
    "SAC": dict.fromkeys(_SAC_RATES, 1e-3) | {_BATCH: 128},
    "DQN": {"lr": 1e-3, _BATCH: 256, _WARMUP: 1024, _UPDATE: 1024},
}
"""Settings in a world, where steps are cheap and taken in batches of hundreds."""

REAL: Settings = {
    "PPO": _PPO | {"minibatch_size": 64, "num_epochs": 10, "use_kl_loss": False},
    # Haarnoja et al. (arXiv 1812.05905), one update a step; learning starts early, as short runs
    # need. Batches of 64: RLlib builds an episode object for every sampled transition, and 256 of
    # them cost a tenth of a second an update.
    "SAC": dict.fromkeys(_SAC_RATES, 1e-3) | {_BATCH: 64, "training_intensity": 64, _WARMUP: 256},
    # RL Baselines3 Zoo, CartPole-v1: 128 updates of 64 every 256 steps.
    "DQN": {"lr": 2.3e-3, _BATCH: 64, "training_intensity": 32, _WARMUP: 1000, _UPDATE: 20}
    | {"epsilon": [[0, 1.0], [8000, 0.04]]},
}
"""Settings in reality, where every step has a price."""

SHAPE = {"PPO": (4, 256), "APPO": (4, 64), "IMPALA": (4, 64), "SAC": (1, 8), "DQN": (1, 256)}
"""(environments, steps of each between updates) in reality"""

_SMALL = {"fcnet_hiddens": [64, 64], "vf_share_layers": False}
_WIDE = {"fcnet_hiddens": [256, 256], "fcnet_activation": "relu"}
MODEL: Settings = dict.fromkeys(ON_POLICY, _SMALL) | dict.fromkeys(REPLAY, _WIDE)
"""Networks in reality. In a world, where a step costs less than an update, SAC's are smaller."""
IMAGINED_MODEL: Settings = MODEL | {"SAC": _WIDE | {"fcnet_hiddens": [128, 128]}}
WORLD_SAC_PARAMS = (*_SAC_RATES, _BATCH, "initial_alpha", "target_entropy", "tau")
"""RLlib's parameters that `mbpo.WorldSAC` uses"""
INITIAL_ALPHA = 0.1
"""SAC's initial temperature in a world: this many times the root mean square of the data's rewards,
and at most this. RLlib's default of 1 takes thousands of updates to fall where rewards are small.
"""
ADVERSARY_REWARD = math.log(2.0)
"""The size of an adversary's rewards, log(1 + disagreement): a tenth of held-out transitions have
more than 1.
"""
DISCRETE_ENTROPY = 0.2
"""SAC's default target entropy for n discrete actions in a world, as a share of log(n)."""

DISAGREEMENT_EVERY = 16
"""Disagreement is computed at one in this many steps, for the log, where rewards do not need it. It
lengthens a step by about a tenth.
"""


@dataclass(frozen=True)
class Setup:
    """An algorithm with all its settings."""

    algo: str
    params: dict[str, Any]
    """Arguments of RLlib's `.training()`."""
    model: dict[str, Any]
    """Fields of RLlib's DefaultModelConfig."""
    num_envs: int
    """Environments of a runner."""
    rollout: int
    """Steps of each environment in a sample."""
    iteration_steps: int
    """Fewest steps of an iteration of a replay algorithm. Others take one sample from each runner.
    """
    runners: int
    gamma: float
    seed: int
    imagined: bool = False
    """It trains in a world, where SAC is `mbpo.WorldSAC`."""
    learners: int = 0
    """Learners in Ray actors; 0 for one in this process."""
    candidates: Candidates | None = None
    """How it lists and sees commands, where its actions are texts."""
    encoder: ImageEncoder | None = None
    """How it sees images."""
    spaces: tuple[gym.Space[Any], gym.Space[Any]] | None = None
    """The (observation, action) spaces: the environment's, or those that `encoder` makes of them. A
    mask of actions in them is used.
    """

    @property
    def mask(self) -> tuple[int, int] | None:
        """The columns of the action mask in flat observations (`heads.mask_columns`)."""
        return None if self.spaces is None else mask_columns(self.spaces[0])

    @property
    def attends(self) -> bool:
        """Its network attends to the slots of a table (`table_module`)."""
        return self.algo == "PPO" and self.spaces is not None and attends(*self.spaces)

    @property
    def branches(self) -> bool:
        """It learns from short branches (`mbpo`)."""
        return self.imagined and self.algo == "SAC"


def imagined(
    config: AgentConfig, reward_size: float = 1.0, actions: gym.Space[Any] | None = None
) -> Setup:
    """The setup of training in a world.

    Args:
        config: Its values win over the defaults.
        reward_size: Root mean square of the rewards of the world's data.
        actions: The head space (`heads.ActionMap`).
    """
    if config.algo == "SAC":
        size = ADVERSARY_REWARD if config.objective == "disagreement" else reward_size
        derived: dict[str, Any] = {"initial_alpha": INITIAL_ALPHA * min(size, 1.0)}
        if isinstance(actions, gym.spaces.Discrete):
            derived["target_entropy"] = DISCRETE_ENTROPY * math.log(actions.n)
        config = replace(config, params=derived | config.params)
    steps = config.num_envs * config.rollout
    rollout = config.rollout if config.algo in ON_POLICY else 1
    tables = IMAGINED, IMAGINED_MODEL
    steps_per_learner = steps * max(config.runners, 1) // max(config.learners, 1)
    batch = min(steps, steps_per_learner)
    setup = _setup(config, tables, batch, config.num_envs, rollout, steps, config.runners)
    return replace(setup, learners=config.learners)


def real(config: BaselineConfig) -> Setup:
    """The setup of training in reality."""
    num_envs, rollout = SHAPE[config.algo]
    num_envs = num_envs if config.num_envs is None else config.num_envs
    rollout = rollout if config.rollout is None else config.rollout
    steps = config.iteration_steps if config.algo in REPLAY else 0
    tables = REAL, MODEL
    return _setup(config, tables, num_envs * rollout, num_envs, rollout, steps, runners=0)


def _setup(
    config: AgentConfig | BaselineConfig,
    tables: tuple[Settings, Settings],
    batch: int,
    num_envs: int,
    rollout: int,
    iteration_steps: int,
    runners: int,
) -> Setup:
    defaults, models = tables
    params = {**defaults.get(config.algo, {}), **config.params}
    if "minibatch_size" in params and "minibatch_size" not in config.params:
        params["minibatch_size"] = min(params["minibatch_size"], batch)
    model = {**models[config.algo], **config.model}
    shape = num_envs, rollout, iteration_steps, runners
    imagined = models is IMAGINED_MODEL
    setup = Setup(config.algo, params, model, *shape, config.gamma, config.seed, imagined)
    return replace(setup, candidates=candidates_of(config))


def candidates_of(config: AgentConfig | BaselineConfig) -> Candidates | None:
    """How the agent of a config lists and sees commands. Raises UsageError as `load_source`."""
    if config.candidates is None:
        return None
    shape = CandidateShape(candidates=config.max_candidates)
    return Candidates(load_source(config.candidates), shape)


def candidate_facts(config: AgentConfig | BaselineConfig) -> dict[str, Any]:
    """The identity of the candidates, which also decides the result of training; {} without
    candidates.
    """
    candidates = candidates_of(config)
    return {} if candidates is None else {"candidates": candidates.source.identity}
