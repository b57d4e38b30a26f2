"""Whether an algorithm can be trained on an environment's spaces, without training it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.tune.registry import get_trainable_cls
from safetensors import safe_open

from mesocosm.agents.rllib import TRAINING_STATE
from mesocosm.agents.settings import ON_POLICY
from mesocosm.errors import UsageError
from mesocosm.policies.heads import ActionMap, flat_space

ACTIONS: Mapping[str, tuple[type[gym.Space[Any]], ...]] = {
    "DQN": (gym.spaces.Discrete,),
    "SAC": (gym.spaces.Discrete, gym.spaces.Box),
}
"""Action spaces of the algorithms that do not take all of them."""


def check_agent(
    algo: str,
    params: Mapping[str, Any],
    model: Mapping[str, Any],
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    shape: tuple[int, int],
    runners: int = 0,
) -> Any:
    """Build the algorithm's network, and throw it away. Starts no Ray.

    Args:
        algo: the algorithm's name.
        params: its `.training()` arguments, complete.
        model: fields of DefaultModelConfig, complete.
        spaces: the observation and the action space of the environment.
        shape: environments of a runner, and steps of each between updates.
        runners: environment runners; 0 is one in this process.

    Returns:
        The RLModule.

    Raises:
        UsageError: an agent cannot observe or act in the spaces, the algorithm does not support
            the actions, or RLlib refuses a setting.
    """
    observations, head = flat_space(spaces[0]), ActionMap(spaces[1]).head
    supported = ACTIONS.get(algo)
    if supported is not None and not isinstance(head, supported):
        names = " or ".join(kind.__name__ for kind in supported)
        raise UsageError(f"algo={algo} needs {names} actions, got {spaces[1]}; use PPO")
    for noisy in ("ray.rllib", "ray._common.deprecation"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    num_envs, rollout = shape
    defaults: dict[str, Any] = {}
    if algo in ON_POLICY:
        defaults["train_batch_size_per_learner"] = num_envs * rollout * max(runners, 1)
    try:
        config: AlgorithmConfig = get_trainable_cls(algo).get_default_config()
        config.environment(observation_space=observations, action_space=head)
        config.framework("torch")
        config.learners(num_learners=0)
        config.env_runners(
            num_env_runners=runners,
            num_envs_per_env_runner=num_envs,
            rollout_fragment_length=rollout,
        )
        config.rl_module(model_config=DefaultModelConfig(**model))
        config.training(**{**defaults, **params})
        config.validate()
        module_spaces: Any = {DEFAULT_MODULE_ID: (observations, head)}
        spec: Any = config.get_multi_rl_module_spec(spaces=module_spaces)
        return spec.build()[DEFAULT_MODULE_ID]
    except Exception as error:  # RLlib raises whatever its settings run into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"RLlib's {algo} refuses its settings: {reason}") from error


def check_init(module: Any, agent: Path, name: str) -> None:
    """Raise UsageError where the weights of an earlier agent do not fit `module`."""
    with safe_open(agent / TRAINING_STATE, "pt") as file:
        names = list(file.keys())
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in names}
    for key, tensor in module.state_dict().items():
        saved, needed = shapes.get(key), tuple(tensor.shape)
        if saved != needed:
            fix = "use the same algo, model and spaces"
            difference = f"{key} is {saved}, not {needed}"
            raise UsageError(f"init={name} is of another network ({difference}); {fix}")
