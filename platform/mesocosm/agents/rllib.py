"""RLlib (its new API stack) by config: an algorithm by name, its own parameter names, any vector
environment; and the way out, a `Policy`.

With `durations` and `learner_state` the only module that imports RLlib.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.tune.registry import get_trainable_cls
from safetensors.torch import load_file, save_file
from torch import nn

from mesocosm.agents import durations
from mesocosm.agents.settings import ALGORITHMS, ON_POLICY
from mesocosm.errors import ArtifactError, MesocosmError, UsageError, nearest
from mesocosm.policies.heads import ActionMap, flat_space, flatten_batch
from mesocosm.policies.policy import Head, Layout, Policy, describe
from mesocosm.serve.client import WorldVectorEnv

INITIAL_STD = 0.5
"""Of a Gaussian policy, where [-1, 1] is the action's whole range."""
TRAINING_STATE = "training.safetensors"
"""All weights of the learner's module (critics and target networks too), from which another
training can start.
"""


@dataclass
class Statistics:
    """What one or several AgentEnvs saw since they were last asked."""

    steps: int = 0
    """Steps taken (an ended environment's reset is none)."""
    disagreement: float = 0.0
    """Sum over the steps, in nats; 0 outside worlds."""
    diverged: int = 0
    """Episodes that a world cut because what it imagined was no longer finite."""
    returns: list[float] = field(default_factory=list)
    """Undiscounted returns, without penalty, of the episodes that ended."""
    lengths: list[int] = field(default_factory=list)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            *(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self))
        )


class AgentEnv(VectorEnv[Any, Any, Any]):
    """A NEXT_STEP vector environment as a network sees it: flat float32 observations, head-space
    actions, and of infos durations alone.

    RLlib makes of infos a dict for every environment and step, so what else is needed of them is
    taken here, for `statistics`.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, env: VectorEnv[Any, Any, Any]):
        mode = env.metadata.get("autoreset_mode")
        assert mode == AutoresetMode.NEXT_STEP, (
            f"RLlib assumes NEXT_STEP autoreset, this environment has {mode}"
        )
        self.env, self.num_envs = env, env.num_envs
        self.map = ActionMap(env.single_action_space)
        self._durations = durations.Durations(env.metadata)
        self.single_observation_space = flat_space(env.single_observation_space)
        self.single_action_space = self.map.head
        self.observation_space = gym.vector.utils.batch_space(
            self.single_observation_space, self.num_envs
        )
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self._begin()

    def _begin(self) -> None:
        self._seen = Statistics()
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observations, _ = self.env.reset(seed=seed, options=options)
        self._begin()
        return flatten_batch(self.env.single_observation_space, observations), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self.env.step(
            self.map.to_raw(actions)
        )
        stepped = ~self._ended
        self._return += np.where(stepped, infos.get("raw_reward", rewards), 0.0)
        self._length += stepped
        self._seen.steps += int(stepped.sum())
        if "disagreement" in infos:
            self._seen.disagreement += float(infos["disagreement"][stepped].sum())
            self._seen.diverged += int(infos["diverged"][stepped].sum())
        self._ended = np.logical_or(terminated, truncated)
        told = self._durations.infos(infos, stepped, self._ended)
        if self._ended.any():
            self._seen.returns += self._return[self._ended].tolist()
            self._seen.lengths += self._length[self._ended].tolist()
            self._return[self._ended] = 0.0
            self._length[self._ended] = 0
        return (
            flatten_batch(self.env.single_observation_space, observations),
            rewards,
            terminated,
            truncated,
            told,
        )

    def statistics(self) -> Statistics:
        """What was seen since the last call."""
        seen, self._seen = self._seen, Statistics()
        return seen

    def state(self) -> dict[str, Any]:
        """What the next steps of an imagined environment depend on, for `restore`.

        What `statistics` has not reported yet is not part of it.
        """
        assert isinstance(self.env, WorldVectorEnv), (
            "the state of a real environment cannot be saved"
        )
        episodes = {"ended": self._ended, "return": self._return, "length": self._length}
        return {
            "env": self.env.state(),
            "durations": self._durations.given,
            **copy.deepcopy(episodes),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        assert isinstance(self.env, WorldVectorEnv)
        self._begin()
        self.env.restore(state["env"])
        self._durations.given = state["durations"]
        self._ended, self._return = state["ended"], state["return"]
        self._length = state["length"]

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close(**kwargs)


def check(key: str, algo: str, params: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise UsageError where an algorithm, one of its parameters or one of the model's is not
    RLlib's. `key` names the config's section.
    """
    if algo not in ALGORITHMS:
        raise UsageError(
            f"{key}algo={algo!r} is not one of {', '.join(ALGORITHMS)}{nearest(algo, ALGORITHMS)}"
        )
    known = parameters(algo)
    for name in params:
        if name not in known:
            raise UsageError(
                f"{key}params.{name} is not a parameter of RLlib's {algo}{nearest(name, known)}"
            )
    fields = [f.name for f in dataclasses.fields(DefaultModelConfig)]
    for name in model:
        if name not in fields:
            raise UsageError(
                f"{key}model.{name} is not a field of RLlib's"
                f" DefaultModelConfig{nearest(name, fields)}"
            )
    if model.get("use_lstm"):
        raise UsageError(f"{key}model.use_lstm=true cannot be exported as a policy; leave it false")


def parameters(algo: str) -> list[str]:
    """The names that an algorithm's `.training()` takes, its base classes' included."""
    names: dict[str, None] = {}
    for cls in type(get_trainable_cls(algo).get_default_config()).__mro__:
        if "training" in vars(cls):
            for name, parameter in inspect.signature(vars(cls)["training"]).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    names[name] = None
    return list(names)


def build(
    algo: str,
    params: Mapping[str, Any],
    model: Mapping[str, Any],
    make_env: Callable[[int], AgentEnv],
    *,
    folder: Path,
    seed: int,
    gamma: float,
    num_envs: int,
    rollout: int,
    runners: int = 0,
    steps_per_iteration: int | None = None,
) -> Algorithm:
    """An algorithm on `make_env(num_envs)`, which every environment runner calls (with `runners` 0,
    this process).

    One `train()` of an on-policy algorithm takes num_envs x rollout x max(runners, 1) steps; of a
    replay algorithm, at least `steps_per_iteration`, in samples of num_envs x rollout. `gamma` is
    for a step, or for a unit of time where steps have durations. Files go to `folder`. Raises
    UsageError for values that RLlib refuses.
    """
    for noisy in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # several threads make small updates ten times slower
    name = f"mesocosm-{os.getpid()}-{id(make_env)}"
    tune.register_env(name, lambda context: make_env(context["num_envs"]))  # type: ignore[arg-type]
    base = get_trainable_cls(algo)
    trainable = type(
        base.__name__,
        (base,),
        {"_setup_logdir": lambda self: setattr(self, "_logdir", str(folder))},
    )
    folder.mkdir(parents=True, exist_ok=True)
    config: AlgorithmConfig = base.get_default_config()
    config.algo_class = trainable
    try:
        # AgentEnv rescales and clips whole batches; RLlib's connector does it action by action, at
        # a fifth of all sampling time.
        config.environment(
            name, disable_env_checking=True, normalize_actions=False, clip_actions=False
        )
        config.framework("torch")
        config.debugging(seed=seed)
        config.env_runners(
            num_env_runners=runners,
            num_envs_per_env_runner=num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=rollout,
        )
        config.learners(num_learners=0)
        config.rl_module(model_config=DefaultModelConfig(**model))
        config.reporting(
            min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=steps_per_iteration or 0
        )
        defaults: dict[str, Any] = {"gamma": gamma}
        if algo in ON_POLICY:
            defaults["train_batch_size_per_learner"] = num_envs * rollout * max(runners, 1)
        config.training(**{**defaults, **params})
        with (
            warnings.catch_warnings()
        ):  # Gymnasium's, of the id that RLlib registers again each time
            warnings.simplefilter("ignore")
            algorithm = config.build_algo(use_copy=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"RLlib's {algo} refuses its settings: {' '.join(str(error).split())}"
        ) from error
    if algo in ON_POLICY:
        _start_small(algorithm)
    durations.install(algorithm)
    return algorithm


def _start_small(algorithm: Algorithm) -> None:
    """Begin near one distribution for all observations: the policy's last layer a hundredth of its
    usual size, a Gaussian's std 0.5.

    Among all choices of on-policy training one of the most consequential (Andrychowicz et al.,
    arXiv 2006.05990, section 3.2).
    """
    pi: Any = _learner_module(algorithm).pi
    last = [layer for layer in pi.net.mlp if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.zero_()
        if pi.clip_log_std:  # a Gaussian head: means, then log stds (or these as a parameter)
            log_std = getattr(pi, "log_std", None)
            (last.bias[len(last.bias) // 2 :] if log_std is None else log_std).fill_(
                math.log(INITIAL_STD)
            )
    _sync(algorithm)


def statistics(algorithm: Algorithm) -> Statistics:
    """What all environment runners saw since the last call."""
    parts = runners(algorithm).foreach_env_runner(
        lambda runner: runner.env.unwrapped.statistics() if runner.env is not None else Statistics()
    )
    return sum(parts, Statistics())


def train(algorithm: Algorithm) -> dict[str, Any]:
    """One iteration. RLlib wraps what an environment raises in an empty RuntimeError: a sentence of
    our own comes through as it was.
    """
    try:
        return algorithm.train()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MesocosmError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is error:
            raise
        raise cause from error


def learned(result: Mapping[str, Any]) -> dict[str, float]:
    """What the learner says of itself, by RLlib's names: losses, entropy, the mean KL divergence."""
    module = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    wanted = (
        "total_loss",
        "policy_loss",
        "vf_loss",
        "entropy",
        "mean_kl_loss",
        "vf_explained_var",
        "qf_loss",
        "qf_mean",
        "alpha_value",
        "td_error_mean",
    )
    return {name: float(module[name]) for name in wanted if name in module}


def export(
    algorithm: Algorithm, algo: str, observation_space: gym.Space[Any], action_space: gym.Space[Any]
) -> Policy:
    """The algorithm's present policy, between the environment's own (not its flat) spaces."""
    module: Any = _learner_module(algorithm)
    settings = (
        module.model_config
        if isinstance(module.model_config, dict)
        else dataclasses.asdict(module.model_config)
    )
    head: Head
    log_std, epsilon = None, 0.0
    if algo == "DQN":
        network = {
            "trunk": _mlp(module.encoder),
            "advantage": _mlp(module.af),
            "value": _mlp(module.vf) if settings["dueling"] else nn.Sequential(),
        }
        trunk, advantage, value = (describe(part) for part in network.values())
        layout = Layout(
            "values",
            trunk,
            advantage,
            value,
            atoms=int(settings["num_atoms"]),
            v_min=float(settings["v_min"]),
            v_max=float(settings["v_max"]),
        )
        epsilon = float(module.epsilon_schedule.get_current_value())
    else:
        if algo == "SAC":
            encoder, head = module.pi_encoder, "squashed_gaussian"
        else:
            encoder, head = (
                getattr(module.encoder, "actor_encoder", None) or module.encoder.encoder,
                "gaussian",
            )
        if not isinstance(ActionMap(action_space).head, gym.spaces.Box):
            head = "categorical"
        log_std = getattr(module.pi, "log_std", None)
        clip = float(module.pi.log_std_clip_param) if module.pi.clip_log_std else None
        network = {"trunk": nn.Sequential(*_mlp(encoder), *_mlp(module.pi))}
        layout = Layout(
            head,
            describe(network["trunk"]),
            free_log_std=0 if log_std is None else len(log_std),
            log_std_clip=clip,
        )
    policy = Policy(algo, observation_space, action_space, layout, epsilon)
    for name, part in network.items():
        getattr(policy.network, name).load_state_dict(part.state_dict())
    if log_std is not None:
        policy.network.load_state_dict({"log_std": log_std}, strict=False)
    return policy


def _mlp(module: Any) -> nn.Sequential:
    return module.net.mlp


def runners(algorithm: Algorithm) -> EnvRunnerGroup:
    assert algorithm.env_runner_group is not None
    return algorithm.env_runner_group


def _learner_module(algorithm: Algorithm) -> Any:
    """The learner's module; the learner lives in this process (num_learners=0)."""
    group: Any = algorithm.learner_group
    return group._learner.module[DEFAULT_MODULE_ID]


def save_training(algorithm: Algorithm, folder: Path) -> None:
    """Write the learner module's weights, pickle-free."""
    state = _learner_module(algorithm).state_dict()
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in state.items()},
        folder / TRAINING_STATE,
    )


def load_training(algorithm: Algorithm, folder: Path) -> None:
    """Start from weights that `save_training` wrote. Raises ArtifactError where the networks
    differ.
    """
    try:
        _learner_module(algorithm).load_state_dict(load_file(folder / TRAINING_STATE))
    except (OSError, RuntimeError) as error:
        raise ArtifactError(
            f"init: {folder} does not hold weights of this network; use the same algo, model and"
            f" spaces ({_first_line(error)})"
        ) from error
    _sync(algorithm)


def _sync(algorithm: Algorithm) -> None:
    """The learner's weights to all environment runners."""
    runners(algorithm).sync_weights(
        from_worker_or_learner_group=algorithm.learner_group, inference_only=True
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
