"""RLlib's learners, in this process (`learners=0`) or in Ray actors that share each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.apis import TargetNetworkAPI

from mesocosm.errors import MesocosmError

T = TypeVar("T")


def learner_of(algorithm: Algorithm) -> Any:
    """The learner, where it lives in this process (num_learners=0)."""
    group: Any = algorithm.learner_group
    return group._learner


def on_learners(algorithm: Algorithm, function: Callable[[Any], T]) -> list[T]:
    """The results of `function(learner)`, run by each learner in its own process, in order.

    Raises:
        MesocosmError: A learner failed.
    """
    group: Any = algorithm.learner_group
    results = [result.get() for result in group.foreach_learner(function).result_or_errors]
    for error in results:
        if isinstance(error, Exception):
            raise MesocosmError(f"a learner failed: {' '.join(str(error).split())}") from error
    return results


def module_of(algorithm: Algorithm) -> Any:
    """The trained RLModule: the learner's, or a copy of it where learners are remote."""
    group: Any = algorithm.learner_group
    if group.is_local:
        return learner_of(algorithm).module[DEFAULT_MODULE_ID]
    module = group._module_spec.build()[DEFAULT_MODULE_ID]
    if isinstance(module, TargetNetworkAPI):
        module.make_target_networks()
    module.load_state_dict(on_learners(algorithm, weights_of)[0])
    return module


def weights_of(learner: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights of a learner's module, on the CPU."""
    return copied_weights(learner.module[DEFAULT_MODULE_ID])


def copied_weights(module: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights of a module, on the CPU."""
    state = module.unwrapped().state_dict()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def load_weights(weights: Mapping[str, torch.Tensor], learner: Any) -> None:
    """Load weights that `weights_of` copied into a learner's module."""
    learner.module[DEFAULT_MODULE_ID].unwrapped().load_state_dict(weights)
