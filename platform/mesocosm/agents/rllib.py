"""RLlib (its new API stack) by config: an algorithm by name, its own parameter names, any vector environment; and the way out, a `Policy`.

The only module that imports RLlib.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
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

from mesocosm.agents.adapt import ActionMap, flat_space, flatten_batch
from mesocosm.agents.policy import Head, Layout, Policy, describe
from mesocosm.errors import ArtifactError, UsageError, nearest

ON_POLICY = ("PPO", "APPO", "IMPALA")
REPLAY = ("SAC", "DQN")
ALGORITHMS = (*ON_POLICY, *REPLAY)
"""Those whose policy can be exported."""
TRAINING_STATE = "training.safetensors"
"""All weights of the learner's module (critics and target networks too), from which another training can start."""


class AgentEnv(VectorEnv[Any, Any, Any]):
    """A NEXT_STEP vector environment as a network sees it: flat float32 observations, head-space actions, and no infos.

    RLlib turns infos into one dict an environment and step; what is needed of them (`info["disagreement"]`) is taken here:
    `penalty` times it is subtracted from the reward, and its sum is kept for `statistics`.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, env: VectorEnv[Any, Any, Any], penalty: float = 0.0):
        mode = env.metadata.get("autoreset_mode")
        assert mode == AutoresetMode.NEXT_STEP, f"RLlib assumes NEXT_STEP autoreset, this environment has {mode}"
        self.env, self.penalty, self.num_envs = env, penalty, env.num_envs
        self.map = ActionMap(env.single_action_space)
        self.single_observation_space = flat_space(env.single_observation_space)
        self.single_action_space = self.map.head
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.steps, self.disagreement = 0, 0.0

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observations, _ = self.env.reset(seed=seed, options=options)
        return flatten_batch(self.env.single_observation_space, observations), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminated, truncated, infos = self.env.step(self.map.to_raw(actions))
        disagreement = infos.get("disagreement")
        if disagreement is not None:
            self.steps += self.num_envs
            self.disagreement += float(disagreement.sum())
            if self.penalty:
                rewards = rewards - self.penalty * disagreement
        return flatten_batch(self.env.single_observation_space, observations), rewards, terminated, truncated, {}

    def statistics(self) -> tuple[int, float]:
        """(environment steps, sum of their disagreement) since the last call."""
        taken = (self.steps, self.disagreement)
        self.steps, self.disagreement = 0, 0.0
        return taken

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close(**kwargs)


def check(key: str, algo: str, params: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise UsageError where an algorithm, one of its parameters or one of the model's is not RLlib's. `key` names the config's section."""
    if algo not in ALGORITHMS:
        raise UsageError(f"{key}algo={algo!r} is not one of {', '.join(ALGORITHMS)}{nearest(algo, ALGORITHMS)}")
    known = parameters(algo)
    for name in params:
        if name not in known:
            raise UsageError(f"{key}params.{name} is not a parameter of RLlib's {algo}{nearest(name, known)}")
    fields = [f.name for f in dataclasses.fields(DefaultModelConfig)]
    for name in model:
        if name not in fields:
            raise UsageError(f"{key}model.{name} is not a field of RLlib's DefaultModelConfig{nearest(name, fields)}")
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
    """An algorithm on `make_env(num_envs)`, which every environment runner calls (with `runners` 0, this process).

    One `train()` of an on-policy algorithm takes num_envs x rollout x max(runners, 1) steps; of a replay algorithm, at least
    `steps_per_iteration`, in samples of num_envs x rollout. Files go to `folder`. Raises UsageError for values that RLlib refuses.
    """
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # several threads make small updates ten times slower
    name = f"mesocosm-{os.getpid()}-{id(make_env)}"
    tune.register_env(name, lambda context: make_env(context["num_envs"]))  # type: ignore[arg-type]
    base = get_trainable_cls(algo)
    trainable = type(base.__name__, (base,), {"_setup_logdir": lambda self: setattr(self, "_logdir", str(folder))})
    folder.mkdir(parents=True, exist_ok=True)
    config: AlgorithmConfig = base.get_default_config()
    config.algo_class = trainable
    try:
        config.environment(name, disable_env_checking=True)
        config.framework("torch")
        config.debugging(seed=seed)
        config.env_runners(
            num_env_runners=runners, num_envs_per_env_runner=num_envs, gym_env_vectorize_mode="vector_entry_point", rollout_fragment_length=rollout
        )
        config.learners(num_learners=0)
        config.rl_module(model_config=DefaultModelConfig(**model))
        config.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=steps_per_iteration or 0)
        defaults: dict[str, Any] = {"gamma": gamma}
        if algo in ON_POLICY:
            defaults["train_batch_size_per_learner"] = num_envs * rollout * max(runners, 1)
        config.training(**{**defaults, **params})
        return config.build_algo(use_copy=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"RLlib's {algo} refuses its settings: {' '.join(str(error).split())}") from error


def statistics(algorithm: Algorithm) -> tuple[int, float]:
    """AgentEnv.statistics, summed over all environment runners."""
    parts = _runners(algorithm).foreach_env_runner(lambda runner: runner.env.unwrapped.statistics() if runner.env is not None else (0, 0.0))
    return sum(steps for steps, _ in parts), sum(total for _, total in parts)


def export(algorithm: Algorithm, algo: str, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Policy:
    """The algorithm's present policy, between the environment's own (not its flat) spaces."""
    module: Any = _learner_module(algorithm)
    settings = module.model_config if isinstance(module.model_config, dict) else dataclasses.asdict(module.model_config)
    head: Head
    log_std, epsilon = None, 0.0
    if algo == "DQN":
        network = {"trunk": _mlp(module.encoder), "advantage": _mlp(module.af), "value": _mlp(module.vf) if settings["dueling"] else nn.Sequential()}
        layers = [describe(part) for part in network.values()]
        layout = Layout("values", *layers, atoms=int(settings["num_atoms"]), v_min=float(settings["v_min"]), v_max=float(settings["v_max"]))
        epsilon = float(module.epsilon_schedule.get_current_value())
    else:
        if algo == "SAC":
            encoder, head = module.pi_encoder, "squashed_gaussian"
        else:
            encoder, head = getattr(module.encoder, "actor_encoder", None) or module.encoder.encoder, "gaussian"
        if not isinstance(ActionMap(action_space).head, gym.spaces.Box):
            head = "categorical"
        log_std = getattr(module.pi, "log_std", None)
        clip = float(module.pi.log_std_clip_param) if module.pi.clip_log_std else None
        network = {"trunk": nn.Sequential(*_mlp(encoder), *_mlp(module.pi))}
        layout = Layout(head, describe(network["trunk"]), free_log_std=0 if log_std is None else len(log_std), log_std_clip=clip)
    policy = Policy(algo, observation_space, action_space, layout, epsilon)
    for name, part in network.items():
        getattr(policy.network, name).load_state_dict(part.state_dict())
    if log_std is not None:
        policy.network.load_state_dict({"log_std": log_std}, strict=False)
    return policy


def _mlp(module: Any) -> nn.Sequential:
    return module.net.mlp


def _runners(algorithm: Algorithm) -> EnvRunnerGroup:
    assert algorithm.env_runner_group is not None
    return algorithm.env_runner_group


def _learner_module(algorithm: Algorithm) -> Any:
    """The learner's module; the learner lives in this process (num_learners=0)."""
    group: Any = algorithm.learner_group
    return group._learner.module[DEFAULT_MODULE_ID]


def save_training(algorithm: Algorithm, folder: Path) -> None:
    """Write the learner module's weights, pickle-free."""
    state = _learner_module(algorithm).state_dict()
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, folder / TRAINING_STATE)


def load_training(algorithm: Algorithm, folder: Path) -> None:
    """Start from weights that `save_training` wrote. Raises ArtifactError where the networks differ."""
    try:
        _learner_module(algorithm).load_state_dict(load_file(folder / TRAINING_STATE))
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"init: {folder} does not hold weights of this network; use the same algo, model and spaces ({_first_line(error)})") from error
    _runners(algorithm).sync_weights(from_worker_or_learner_group=algorithm.learner_group, inference_only=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
