"""RLlib's module of an agent that chooses among candidate commands."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mesocosm.agents.actor_critic import ActorCriticModule
from mesocosm.policies.candidates import Candidates, CandidateShape, load_source
from mesocosm.policies.scorer import CandidatePolicy, CandidateScorer

ALGORITHM = "PPO"
"""The algorithm that trains it."""


class CandidateModule(ActorCriticModule):
    """A `CandidateScorer` between rows of candidates and Discrete(K)."""

    def setup(self) -> None:
        config: Any = self.model_config
        self.scorer = CandidateScorer(CandidateShape(**config["shape"]))

    def logits_and_values(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = self.scorer(observations)
        return outputs

    def start_even(self) -> None:
        self.scorer.start_even()


def module_spec(candidates: Candidates) -> RLModuleSpec:
    """The spec of a module for these candidates."""
    config = {"candidates": candidates.source.name, "shape": candidates.shape.to_json()}
    return RLModuleSpec(module_class=CandidateModule, model_config=config)


def exported_scorer(
    algo: str, module: CandidateModule, spaces: tuple[gym.Space[Any], gym.Space[Any]]
) -> CandidatePolicy:
    """The policy of a trained module, between the environment's (observation, action) spaces."""
    config: Any = module.model_config
    source, shape = load_source(config["candidates"]), CandidateShape(**config["shape"])
    assert isinstance(spaces[1], gym.spaces.Text)
    policy = CandidatePolicy(algo, spaces[0], spaces[1], source, shape)
    policy.network.load_state_dict(module.scorer.state_dict())
    return policy


def row_space(shape: CandidateShape) -> gym.spaces.Box:
    """The space of a row: ids, features and the mask."""
    return gym.spaces.Box(-np.inf, np.inf, (shape.width,), np.float32)
