"""RLlib algorithms (new API stack) from a config, and the export of their policies.

Only this package imports RLlib.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.tune.registry import get_trainable_cls
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mesocosm.agents import durations
from mesocosm.agents.env import AgentEnv, Statistics
from mesocosm.agents.settings import ALGORITHMS, ON_POLICY
from mesocosm.errors import ArtifactError, MesocosmError, UsageError, nearest
from mesocosm.policies.heads import ActionMap, flat_space
from mesocosm.policies.policy import Head, Layout, Policy, describe

INITIAL_STD = 0.5
"""Initial std of a Gaussian policy, in units of the head space's [-1, 1]."""
TRAINING_STATE = "training.safetensors"
"""All weights of the learner's module, critics and target networks included."""
ACTIONS: Mapping[str, tuple[type[gym.Space[Any]], ...]] = {
    "DQN": (gym.spaces.Discrete,),
    "SAC": (gym.spaces.Discrete, gym.spaces.Box),
}
"""Head spaces of the algorithms that do not support all of them."""
LEARNER_METRICS = (
    *("total_loss", "policy_loss", "vf_loss", "entropy", "mean_kl_loss", "vf_explained_var"),
    *("qf_loss", "qf_mean", "alpha_value", "td_error_mean"),
)


def check(key: str, algo: str, params: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise UsageError where RLlib lacks the algorithm or a parameter; `key` prefixes the keys."""
    if algo not in ALGORITHMS:
        raise UsageError(
            f"{key}algo must be one of {', '.join(ALGORITHMS)}, got"
            f" {algo!r}{nearest(algo, ALGORITHMS)}"
        )
    names = parameters(algo)
    for name in params:
        if name not in names:
            raise UsageError(
                f"{key}params.{name} is not a parameter of RLlib's {algo}{nearest(name, names)}"
            )
    fields = [f.name for f in dataclasses.fields(DefaultModelConfig)]
    for name in model:
        if name not in fields:
            raise UsageError(
                f"{key}model.{name} is not a field of RLlib's"
                f" DefaultModelConfig{nearest(name, fields)}"
            )
    if model.get("use_lstm"):
        raise UsageError(f"{key}model.use_lstm must be false, got true; LSTMs cannot be exported")


def parameters(algo: str) -> list[str]:
    """The parameter names of an algorithm's `.training()`, with those of its base classes."""
    names: dict[str, None] = {}
    for cls in type(get_trainable_cls(algo).get_default_config()).__mro__:
        if "training" in vars(cls):
            for name, parameter in inspect.signature(vars(cls)["training"]).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    names[name] = None
    return list(names)


def _configure(
    config: AlgorithmConfig,
    algo: str,
    params: Mapping[str, Any],
    model: Mapping[str, Any],
    shape: tuple[int, int],
    runners: int,
) -> None:
    """Apply the settings of an algorithm; `shape` is (environments, rollout) per runner."""
    for noisy in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    num_envs, rollout = shape
    config.framework("torch")
    config.learners(num_learners=0)
    config.env_runners(
        num_env_runners=runners,
        num_envs_per_env_runner=num_envs,
        gym_env_vectorize_mode="vector_entry_point",
        rollout_fragment_length=rollout,
    )
    config.rl_module(model_config=DefaultModelConfig(**model))
    batch: dict[str, Any] = {}
    if algo in ON_POLICY:
        batch["train_batch_size_per_learner"] = num_envs * rollout * max(runners, 1)
    config.training(**{**batch, **params})


def check_agent(
    algo: str,
    params: Mapping[str, Any],
    model: Mapping[str, Any],
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    shape: tuple[int, int],
    runners: int = 0,
) -> Any:
    """Build the algorithm's network without starting Ray.

    Args:
        algo: The algorithm's name.
        params: Its `.training()` arguments, complete.
        model: Fields of DefaultModelConfig, complete.
        spaces: The observation and the action space of the environment.
        shape: Environments of a runner, and steps of each between updates.
        runners: Environment runners; 0 for one in this process.

    Returns:
        The RLModule.

    Raises:
        UsageError: An agent cannot use the spaces, or RLlib rejects a setting.
    """
    observations, head = flat_space(spaces[0]), ActionMap(spaces[1]).head
    supported = ACTIONS.get(algo)
    if supported is not None and not isinstance(head, supported):
        names = " or ".join(kind.__name__ for kind in supported)
        raise UsageError(f"algo={algo} needs {names} actions, got {spaces[1]}; use PPO")
    try:
        config: AlgorithmConfig = get_trainable_cls(algo).get_default_config()
        config.environment(observation_space=observations, action_space=head)
        _configure(config, algo, params, model, shape, runners)
        config.validate()
        module_spaces: Any = {DEFAULT_MODULE_ID: (observations, head)}
        spec: Any = config.get_multi_rl_module_spec(spaces=module_spaces)
        return spec.build()[DEFAULT_MODULE_ID]
    except Exception as error:  # RLlib raises all kinds for wrong settings
        raise _refused(algo, error) from error


def check_init(module: Any, agent: Path, name: str) -> None:
    """Raise UsageError where the weights of an earlier agent do not fit `module`."""
    with safe_open(agent / TRAINING_STATE, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for key, tensor in module.state_dict().items():
        if shapes.get(key) != tuple(tensor.shape):
            raise UsageError(
                f"init={name} is of another network ({key} must be {tuple(tensor.shape)}, got"
                f" {shapes.get(key)}); use the same algo, model and spaces"
            )


def _refused(algo: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(f"RLlib's {algo} refuses its settings: {reason}")


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
    """Build an algorithm on `make_env(num_envs)`, which every environment runner calls.

    Args:
        algo: The algorithm's name.
        params: Its `.training()` arguments.
        model: Fields of DefaultModelConfig.
        make_env: Called by every runner; with `runners` 0 by this process.
        folder: Folder of RLlib's files.
        seed: Seed of RLlib.
        gamma: Discount per step, or per unit of time where steps have durations.
        num_envs: Environments of a runner.
        rollout: Steps of each environment in a sample.
        runners: Environment runners in Ray actors.
        steps_per_iteration: Least steps of a `train()` of a replay algorithm. On-policy algorithms
            take num_envs x rollout x max(runners, 1).

    Raises:
        UsageError: RLlib rejects a setting.
    """
    torch.set_num_threads(1)  # several threads make small updates ten times slower
    name = f"mesocosm-{os.getpid()}-{id(make_env)}"
    tune.register_env(name, lambda context: make_env(context["num_envs"]))  # type: ignore[arg-type]
    base = get_trainable_cls(algo)
    folder.mkdir(parents=True, exist_ok=True)
    in_folder = {"_setup_logdir": lambda self: setattr(self, "_logdir", str(folder))}
    config: AlgorithmConfig = base.get_default_config()
    config.algo_class = type(base.__name__, (base,), in_folder)
    try:
        # AgentEnv rescales and clips whole batches. RLlib's connector does it action by action, at
        # a fifth of all sampling time.
        off: dict[str, Any] = {"normalize_actions": False, "clip_actions": False}
        config.environment(name, disable_env_checking=True, **off)
        _configure(config, algo, {"gamma": gamma, **params}, model, (num_envs, rollout), runners)
        config.debugging(seed=seed)
        steps = steps_per_iteration or 0
        config.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=steps)
        with warnings.catch_warnings():  # Gymnasium's, of an id that RLlib registers repeatedly
            warnings.simplefilter("ignore")
            algorithm = config.build_algo(use_copy=False)
    except (TypeError, ValueError) as error:
        raise _refused(algo, error) from error
    if algo in ON_POLICY:
        _start_small(algorithm)
    durations.install(algorithm)
    return algorithm


def _start_small(algorithm: Algorithm) -> None:
    """Start near one distribution for all observations: scale the policy's last layer by 0.01.

    One of the most consequential choices of on-policy training (Andrychowicz et al., arXiv
    2006.05990, section 3.2).
    """
    pi: Any = learner_of(algorithm).module[DEFAULT_MODULE_ID].pi
    last = [layer for layer in pi.net.mlp if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.zero_()
        if pi.clip_log_std:  # a Gaussian head: means, then log stds (or these as a parameter)
            log_std = getattr(pi, "log_std", None)
            target = last.bias[len(last.bias) // 2 :] if log_std is None else log_std
            target.fill_(math.log(INITIAL_STD))
    _sync(algorithm)


def statistics(algorithm: Algorithm) -> Statistics:
    """The statistics of all environment runners since the last call."""
    parts = runners(algorithm).foreach_env_runner(
        lambda runner: runner.env.unwrapped.statistics() if runner.env is not None else Statistics()
    )
    return sum(parts, Statistics())


def train(algorithm: Algorithm) -> dict[str, Any]:
    """Run one iteration.

    RLlib wraps an environment's error in an empty RuntimeError. A MesocosmError is raised as it
    was.
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
    """The learner's metrics by RLlib's names: losses, entropy, the mean KL divergence."""
    module = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    return {name: float(module[name]) for name in LEARNER_METRICS if name in module}


def export(
    algorithm: Algorithm, algo: str, observation_space: gym.Space[Any], action_space: gym.Space[Any]
) -> Policy:
    """The algorithm's current policy, between the environment's own (not flat) spaces."""
    module: Any = learner_of(algorithm).module[DEFAULT_MODULE_ID]
    log_std, epsilon = None, 0.0
    if algo == "DQN":
        settings = module.model_config
        settings = settings if isinstance(settings, dict) else dataclasses.asdict(settings)
        network = {"trunk": module.encoder.net.mlp, "advantage": module.af.net.mlp}
        network["value"] = module.vf.net.mlp if settings["dueling"] else nn.Sequential()
        atoms, v_min, v_max = (settings[name] for name in ("num_atoms", "v_min", "v_max"))
        layers: dict[str, Any] = {name: describe(part) for name, part in network.items()}
        support: dict[str, Any] = {"atoms": int(atoms), "v_min": float(v_min)}
        support["v_max"] = float(v_max)
        layout = Layout("values", **layers, **support)
        epsilon = float(module.epsilon_schedule.get_current_value())
    else:
        if algo == "SAC":
            encoder = module.pi_encoder
        else:
            encoder = getattr(module.encoder, "actor_encoder", None) or module.encoder.encoder
        pi = module.pi
        log_std = getattr(pi, "log_std", None)
        network = {"trunk": nn.Sequential(*encoder.net.mlp, *pi.net.mlp)}
        head: Head = "squashed_gaussian" if algo == "SAC" else "gaussian"
        if not isinstance(ActionMap(action_space).head, gym.spaces.Box):
            head = "categorical"
        layout = Layout(
            head,
            describe(network["trunk"]),
            free_log_std=0 if log_std is None else len(log_std),
            log_std_clip=float(pi.log_std_clip_param) if pi.clip_log_std else None,
        )
    policy = Policy(algo, observation_space, action_space, layout, epsilon)
    for name, part in network.items():
        getattr(policy.network, name).load_state_dict(part.state_dict())
    if log_std is not None:
        policy.network.load_state_dict({"log_std": log_std}, strict=False)
    return policy


def runners(algorithm: Algorithm) -> EnvRunnerGroup:
    assert algorithm.env_runner_group is not None
    return algorithm.env_runner_group


def learner_of(algorithm: Algorithm) -> Any:
    """The learner, which lives in this process (num_learners=0)."""
    group: Any = algorithm.learner_group
    return group._learner


def save_training(algorithm: Algorithm, folder: Path) -> None:
    """Write the weights of the learner's module, without pickle."""
    state = learner_of(algorithm).module[DEFAULT_MODULE_ID].state_dict()
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(weights, folder / TRAINING_STATE)


def load_training(algorithm: Algorithm, folder: Path) -> None:
    """Load the weights that `save_training` wrote.

    Raises:
        ArtifactError: They belong to another network.
    """
    module = learner_of(algorithm).module[DEFAULT_MODULE_ID]
    try:
        module.load_state_dict(load_file(folder / TRAINING_STATE))
    except (OSError, RuntimeError) as error:
        raise ArtifactError(
            f"init: {folder} does not hold weights of this network; use the same algo, model and"
            f" spaces ({str(error).strip().splitlines()[0]})"
        ) from error
    _sync(algorithm)


def _sync(algorithm: Algorithm) -> None:
    """Send the learner's weights to all environment runners."""
    group = algorithm.learner_group
    runners(algorithm).sync_weights(from_worker_or_learner_group=group, inference_only=True)
