"""The whole state of an RLlib algorithm in training, from which another process continues with the
same bits.

`Algorithm.get_state` has weights, optimizers, connectors and RLlib's counters. This module adds the
replay buffer, the learners' adapted values (PPO's KL coefficient, SAC's temperature, the time of
the last target update) and the environment runners' unfinished episodes.

Random state is not saved. `reseed` makes the randomness of an iteration a function of
(seed, iteration, runner). APPO and IMPALA learn in a thread whose timing decides their bits: they
continue, but do not repeat.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME

from mesocosm.agents.learner_access import learner_of, on_learners
from mesocosm.agents.mbpo import WorldSAC
from mesocosm.agents.rllib import runners
from mesocosm.config import fingerprint

ADAPTED = ("curr_kl_coeffs_per_module", "curr_log_alpha")
"""Attributes of learners: tensors by module, which `Learner.get_state` leaves out"""
TARGET_UPDATES = ("last_update_ts_by_mid", "_last_update_ts_by_mid")
"""Attributes of learners: the step of the last target network update by module"""
SCHEDULERS = "entropy_coeff_schedulers_per_module"
SAMPLED = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
EPISODES = {
    "episodes": "_ongoing_episodes",
    "to_module": "_cached_to_module",
    "shared": "_shared_data",
}
"""Attributes of runners with their unfinished episodes, by key of the saved state"""


def reseed(algorithm: Algorithm, seed: int, iteration: int) -> None:
    """Seed all random generators of the next iteration, in this process and in the runners."""

    def derived(part: str) -> int:
        return int(fingerprint("agent-iteration", seed, iteration, part)[:8], 16)

    def seed_all(value: int) -> None:
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)

    runners(algorithm).foreach_env_runner(
        lambda runner: seed_all(derived(f"runner {runner.worker_index}"))
    )
    if not algorithm.learner_group.is_local:  # type: ignore[union-attr]
        on_learners(
            algorithm, lambda learner: seed_all(derived(f"learner {learner._learner_index}"))
        )
    seed_all(derived("learner"))
    buffer: Any = getattr(algorithm, "local_replay_buffer", None)
    if buffer is not None:
        buffer.rng = np.random.default_rng(derived("replay"))


def capture(algorithm: Algorithm) -> dict[str, Any]:
    """The state between two iterations. It refers to live objects: pickle it before the next."""
    return {
        "algorithm": algorithm.get_state(),
        "learners": on_learners(algorithm, _learner_state),
        "runners": runners(algorithm).foreach_env_runner(_runner_state),
        "replay": _replay_state(algorithm),
    }


def restore(algorithm: Algorithm, state: dict[str, Any]) -> None:
    """Restore a captured state into a freshly built algorithm of the same settings."""
    algorithm.set_state(state["algorithm"])
    assert algorithm.metrics is not None
    sampled = algorithm.metrics.peek(SAMPLED, default=0)
    on_learners(algorithm, partial(_restore_learner, state["learners"], sampled))
    states = {part["index"]: part for part in state["runners"] if part is not None}
    runners(algorithm).foreach_env_runner(partial(_restore_runner, states))
    if isinstance(algorithm, WorldSAC):
        algorithm.imagined.restore(state["replay"]["imagined"])
        learner_of(algorithm).updates = state["replay"]["updates"]
    elif state["replay"] is not None:
        buffer: Any = algorithm.local_replay_buffer
        buffer.episodes = state["replay"]["episodes"]
        buffer.set_state(state["replay"])  # keeps the existing episodes


def _learner_state(learner: Any) -> dict[str, Any]:
    """The values that `Learner.get_state` leaves out. Each remote learner adapts to its share of a
    batch.
    """
    return {
        "index": learner._learner_index,
        "adapted": {
            name: {id: tensor.detach().cpu() for id, tensor in getattr(learner, name).items()}
            for name in ADAPTED
            if hasattr(learner, name)
        },
        "target_updates": {
            name: dict(getattr(learner, name)) for name in TARGET_UPDATES if hasattr(learner, name)
        },
    }


def _restore_learner(states: list[dict[str, Any]], sampled: int, learner: Any) -> None:
    (state,) = (state for state in states if state["index"] == learner._learner_index)
    with torch.no_grad():
        for name, tensors in state["adapted"].items():
            for id, tensor in tensors.items():
                getattr(learner, name)[id].copy_(tensor)  # in place: an optimizer refers to it
    for name, steps in state["target_updates"].items():
        getattr(learner, name).update(steps)
    if hasattr(learner, SCHEDULERS):  # a schedule's value is set only after an update
        getattr(learner, SCHEDULERS)[DEFAULT_MODULE_ID].update(timestep=sampled)


def _replay_state(algorithm: Algorithm) -> dict[str, Any] | None:
    """The replay buffer's state. Its episodes stay objects: converting each one is slow."""
    if isinstance(algorithm, WorldSAC):
        return {"imagined": algorithm.imagined.state(), "updates": learner_of(algorithm).updates}
    buffer: Any = getattr(algorithm, "local_replay_buffer", None)
    if buffer is None:
        return None
    episodes, buffer.episodes = buffer.episodes, deque()
    try:
        state: dict[str, Any] = buffer.get_state()
    finally:
        buffer.episodes = episodes
    return state | {"episodes": episodes}


def _runner_state(runner: Any) -> dict[str, Any] | None:
    """A runner's state, including the parts that `SingleAgentEnvRunner.get_state` leaves out."""
    if runner.env is None:
        return None
    return {
        "index": runner.worker_index,
        "state": runner.get_state(),
        "metrics": runner.metrics.get_state(),
        "env": runner.env.unwrapped.state(),
        **{key: getattr(runner, name) for key, name in EPISODES.items()},
    }


def _restore_runner(states: dict[int, dict[str, Any]], runner: Any) -> None:
    if runner.env is None:
        return
    state = copy.deepcopy(states[runner.worker_index])  # arrays from Ray are read-only
    runner.set_state(state["state"] | {"weights_seq_no": 0})  # 0: always take the weights
    runner._weights_seq_no = state["state"]["weights_seq_no"]
    runner.metrics.set_state(state["metrics"])
    runner.env.unwrapped.restore(state["env"])
    for key, name in EPISODES.items():
        setattr(runner, name, state[key])
    runner._needs_initial_reset = False
