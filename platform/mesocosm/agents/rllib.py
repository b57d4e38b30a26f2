"""RLlib algorithms (new API stack), and the export of their policies."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import ray
import torch
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.tune.registry import get_trainable_cls
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mesocosm import checks, compat
from mesocosm.agents import discounts, mbpo
from mesocosm.agents.actor_critic import ActorCriticModule
from mesocosm.agents.candidate_module import (
    ALGORITHM,
    CandidateModule,
    exported_scorer,
    module_spec,
)
from mesocosm.agents.config import AgentConfig, BaselineConfig
from mesocosm.agents.env import AgentEnv, AgentRunner, Statistics, head_spaces, root_error
from mesocosm.agents.learner_access import copied_weights, load_weights, on_learners
from mesocosm.agents.masked_module import MaskedPPOModule
from mesocosm.agents.sac_learner import unnormalized
from mesocosm.agents.settings import ALGORITHMS, ON_POLICY, Setup
from mesocosm.agents.table_module import TableModule, exported_table, table_spec
from mesocosm.datasets.masks import MASK, has_mask
from mesocosm.errors import UsageError, nearest
from mesocosm.policies.candidates import load_source
from mesocosm.policies.heads import ActionMap
from mesocosm.policies.image_policy import ImagePolicy
from mesocosm.policies.images import ImageEncoder
from mesocosm.policies.policy import TRAINING_STATE, Head, Layout, Policy, describe
from mesocosm.policies.stored import StoredPolicy

INITIAL_STD = 0.5
"""Initial std of a Gaussian policy, in units of the head space's [-1, 1]."""
ACTIONS: Mapping[str, tuple[type[gym.Space[Any]], ...]] = {
    "DQN": (gym.spaces.Discrete,),
    "SAC": (gym.spaces.Discrete, gym.spaces.Box),
}
"""Head spaces of the algorithms that do not support all of them."""
LEARNER_METRICS = (
    *("total_loss", "policy_loss", "vf_loss", "entropy", "mean_kl_loss", "vf_explained_var"),
    *("qf_loss", "qf_mean", "alpha_value", "td_error_mean"),
)


def check(config: AgentConfig | BaselineConfig) -> None:
    """Raise UsageError where RLlib lacks the config's algorithm, parameter or model field."""
    checks.one_of(config, ALGORITHMS, "algo")
    algo = config.algo
    fields = [f.name for f in dataclasses.fields(DefaultModelConfig)]
    for key, values, names, meaning in (
        ("params", config.params, _parameters(algo), f"parameter of RLlib's {algo}"),
        ("model", config.model, fields, "field of RLlib's DefaultModelConfig"),
    ):
        for name in values:
            if name not in names:
                raise UsageError(f"{key}.{name} is not a {meaning}{nearest(name, names)}")
    checks.at_least(config, 2, "max_candidates")
    if config.candidates is not None:
        load_source(config.candidates)
        if algo != ALGORITHM:
            raise UsageError(f"algo must be {ALGORITHM} with candidates, got {algo!r}")
        if config.model:
            raise UsageError(
                f"model must be {{}} with candidates, got {config.model}; the network that scores"
                " them has one size"
            )
    if config.model.get("use_lstm"):
        raise UsageError("model.use_lstm must be false, got true; LSTMs cannot be exported")


def _parameters(algo: str) -> list[str]:
    """The parameter names of an algorithm's `.training()`, with those of its base classes."""
    names: list[str] = []
    for cls in type(get_trainable_cls(algo).get_default_config()).__mro__:
        if "training" in vars(cls):
            parameters = inspect.signature(vars(cls)["training"]).parameters.values()
            names += [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return names


def _configure(config: AlgorithmConfig, setup: Setup, gpus: int = 0) -> None:
    for noisy in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    config.framework("torch")
    config.learners(num_learners=setup.learners, num_gpus_per_learner=gpus)
    config.env_runners(
        env_runner_cls=AgentRunner,
        num_env_runners=setup.runners,
        num_envs_per_env_runner=setup.num_envs,
        gym_env_vectorize_mode="vector_entry_point",
        rollout_fragment_length=setup.rollout,
        sample_timeout_s=None,  # RLlib drops the samples of a slow runner after a minute
    )
    # RLlib would go on without the samples of a lost runner, and end with another policy.
    config.fault_tolerance(restart_failed_env_runners=False)
    model = DefaultModelConfig(**setup.model)
    if setup.candidates is not None:
        config.rl_module(rl_module_spec=module_spec(setup.candidates))
    elif setup.attends:
        assert setup.spaces is not None
        config.rl_module(rl_module_spec=table_spec(setup.spaces, setup.model["fcnet_hiddens"]))
    elif setup.mask is not None:
        config.rl_module(model_config=dataclasses.asdict(model) | {MASK: setup.mask})
        if not setup.branches:
            config.rl_module(rl_module_spec=RLModuleSpec(module_class=MaskedPPOModule))
    else:
        config.rl_module(model_config=model)
    batch: dict[str, Any] = {}
    if setup.algo in ON_POLICY:
        steps = setup.num_envs * setup.rollout * max(setup.runners, 1)
        batch["train_batch_size_per_learner"] = steps // max(setup.learners, 1)
    config.training(**{"gamma": setup.gamma, **batch, **setup.params})
    config.debugging(seed=setup.seed)
    if setup.branches:
        mbpo.configure(config)


def check_agent(setup: Setup, spaces: tuple[gym.Space[Any], gym.Space[Any]]) -> Any:
    """Build the algorithm's RLModule for (observation, action) spaces, without starting Ray.

    Raises:
        UsageError: An agent cannot use the spaces, or RLlib rejects a setting.
    """
    observations, head = head_spaces(spaces, setup.candidates)
    setup = dataclasses.replace(setup, spaces=spaces)
    if setup.mask is not None and not (setup.algo == "PPO" or setup.branches):
        raise UsageError(
            f"algo must be PPO, or SAC in a world, where observations have an {MASK}, got"
            f" {setup.algo!r}"
        )
    supported = ACTIONS.get(setup.algo)
    if supported is not None and not isinstance(head, supported):
        names = " or ".join(kind.__name__ for kind in supported)
        raise UsageError(f"algo={setup.algo} needs {names} actions, got {spaces[1]}; use PPO")
    try:
        config: AlgorithmConfig = get_trainable_cls(setup.algo).get_default_config()
        config.environment(observation_space=observations, action_space=head)
        _configure(config, setup)
        config.validate()
        module_spaces: Any = {DEFAULT_MODULE_ID: (observations, head)}
        spec: Any = config.get_multi_rl_module_spec(spaces=module_spaces)
        return spec.build()[DEFAULT_MODULE_ID]
    except Exception as error:  # RLlib raises all kinds for wrong settings
        raise _refused(setup.algo, error) from error


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
    setup: Setup, make_env: Callable[[int], AgentEnv | mbpo.BranchEnv], folder: Path
) -> Algorithm:
    """Build an algorithm on `make_env(num_envs)`, with RLlib's files in `folder`.

    Every environment runner calls `make_env`; without runners this process does.

    Raises:
        UsageError: RLlib rejects a setting.
    """
    torch.set_num_threads(1)  # several threads make small updates ten times slower
    name = f"mesocosm-{os.getpid()}-{id(make_env)}"
    tune.register_env(name, lambda context: make_env(context["num_envs"]))  # type: ignore[arg-type]
    base = mbpo.WorldSAC if setup.branches else get_trainable_cls(setup.algo)
    folder.mkdir(parents=True, exist_ok=True)
    config: AlgorithmConfig = base.get_default_config()
    config.algo_class = compat.algorithm_in_folder(base, setup.algo, folder)
    try:
        # AgentEnv rescales and clips whole batches. RLlib's connector does it action by action, at
        # a fifth of all sampling time.
        off: dict[str, Any] = {"normalize_actions": False, "clip_actions": False}
        config.environment(name, disable_env_checking=True, **off)
        _configure(config, setup, gpus_per_learner(setup))
        steps = 0 if setup.branches else setup.iteration_steps
        config.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=steps)
        with warnings.catch_warnings():  # Gymnasium's, of an id that RLlib registers repeatedly
            warnings.simplefilter("ignore")
            algorithm = config.build_algo(use_copy=False)
    except (TypeError, ValueError) as error:
        raise _refused(setup.algo, error) from error
    compat.wait_for_weights(runners(algorithm))
    if setup.algo in ON_POLICY:
        _start_small(algorithm)
    if not setup.branches:
        discounts.install(algorithm)
    return algorithm


def gpus_per_learner(setup: Setup) -> int:
    """1 if this Ray has a GPU for every remote learner, otherwise 0."""
    gpus = ray.cluster_resources().get("GPU", 0) if setup.learners else 0
    return int(gpus >= setup.learners > 0)


def _start_small(algorithm: Algorithm) -> None:
    """Start near one distribution for all observations: scale the policy's last layer by 0.01
    (Andrychowicz et al., arXiv 2006.05990, section 3.2).
    """
    on_learners(algorithm, _start_learner_small)
    _sync(algorithm)


def _start_learner_small(learner: Any) -> None:
    module: Any = learner.module[DEFAULT_MODULE_ID].unwrapped()
    if isinstance(module, ActorCriticModule):
        module.start_even()
        return
    pi = module.pi
    last = [layer for layer in pi.net.mlp if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.zero_()
        if pi.clip_log_std:  # a Gaussian head: means, then log stds (or these as a parameter)
            log_std = getattr(pi, "log_std", None)
            target = last.bias[len(last.bias) // 2 :] if log_std is None else log_std
            target.fill_(math.log(INITIAL_STD))


def statistics(algorithm: Algorithm) -> Statistics:
    """The statistics of all environment runners since the last call."""
    parts = runners(algorithm).foreach_env_runner(
        lambda runner: runner.env.unwrapped.statistics() if runner.env is not None else Statistics()
    )
    return sum(parts, Statistics())


def train(algorithm: Algorithm) -> dict[str, Any]:
    """Run one iteration. Raises a MesocosmError of an environment, which RLlib wraps, as it was."""
    try:
        return algorithm.train()
    except Exception as error:
        cause = root_error(error)
        if cause is None or cause is error:
            raise
        raise cause from error


def learned(result: Mapping[str, Any]) -> dict[str, float]:
    """The learner's metrics by RLlib's names: losses, entropy, the mean KL divergence."""
    module = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    return {name: float(module[name]) for name in LEARNER_METRICS if name in module}


def export(
    algorithm: Algorithm,
    module: Any,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    encoder: ImageEncoder | None = None,
) -> StoredPolicy:
    """The current policy of an algorithm and its `module_of`, with the arguments of
    `export_module`.
    """
    policy = export_module(type(algorithm).__name__, module, spaces, encoder)
    if isinstance(algorithm, mbpo.WorldSAC):
        assert isinstance(policy, Policy)
        first: Any = policy.network.trunk[0]
        first.load_state_dict(unnormalized(first, module))
    return policy


def export_module(
    algo: str,
    module: Any,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    encoder: ImageEncoder | None = None,
) -> StoredPolicy:
    """The policy of an RLModule.

    Args:
        algo: Its name in the policy: an algorithm, whose module it is, or `clone` for PPO's.
        module: The module.
        spaces: The (observation, action) spaces of its network.
        encoder: How it sees images, which the policy includes; `spaces` are then those that it
            makes (`encoders.seen_spaces`).
    """
    if isinstance(module, CandidateModule):
        return exported_scorer(algo, module, spaces)
    if isinstance(module, TableModule):
        return exported_table(algo, module, spaces)
    log_std, epsilon = None, 0.0
    if algo == "DQN":
        settings = module.model_config
        settings = settings if isinstance(settings, dict) else dataclasses.asdict(settings)
        network = {"trunk": module.encoder.net.mlp, "advantage": module.af.net.mlp}
        network["value"] = module.vf.net.mlp if settings["dueling"] else nn.Sequential()
        layers: dict[str, Any] = {name: describe(part) for name, part in network.items()}
        layout = Layout(
            "values",
            **layers,
            atoms=int(settings["num_atoms"]),
            v_min=float(settings["v_min"]),
            v_max=float(settings["v_max"]),
        )
        epsilon = float(module.epsilon_schedule.get_current_value())
    else:
        pi = module.pi
        if algo == "SAC":
            trunk = module.pi_encoder
        else:
            trunk = getattr(module.encoder, "actor_encoder", None) or module.encoder.encoder
        log_std = getattr(pi, "log_std", None)
        network = {"trunk": nn.Sequential(*trunk.net.mlp, *pi.net.mlp)}
        head: Head = "squashed_gaussian" if algo == "SAC" else "gaussian"
        if not isinstance(ActionMap(spaces[1], has_mask(spaces[0])).head, gym.spaces.Box):
            head = "categorical"
        layout = Layout(
            head,
            describe(network["trunk"]),
            free_log_std=0 if log_std is None else len(log_std),
            log_std_clip=float(pi.log_std_clip_param) if pi.clip_log_std else None,
        )
    policy = Policy(algo, *spaces, layout, epsilon)
    for name, part in network.items():
        getattr(policy.network, name).load_state_dict(part.state_dict())
    if log_std is not None:
        policy.network.load_state_dict({"log_std": log_std}, strict=False)
    return policy if encoder is None else ImagePolicy(policy, encoder)


def runners(algorithm: Algorithm) -> EnvRunnerGroup:
    assert algorithm.env_runner_group is not None
    return algorithm.env_runner_group


def save_training(module: Any, folder: Path) -> None:
    """Write the weights of a `module_of`, without pickle."""
    save_file(copied_weights(module), folder / TRAINING_STATE)


def load_training(algorithm: Algorithm, folder: Path) -> None:
    """Load the weights that `save_training` wrote, which `check_init` has checked."""
    on_learners(algorithm, partial(load_weights, load_file(folder / TRAINING_STATE)))
    _sync(algorithm)


def _sync(algorithm: Algorithm) -> None:
    """Send the learner's weights to all environment runners."""
    group = algorithm.learner_group
    runners(algorithm).sync_weights(from_worker_or_learner_group=group, inference_only=True)
