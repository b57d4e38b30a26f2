"""RLlib's module of an agent that chooses among candidate commands."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from mesocosm.policies.candidates import Candidates, CandidateShape, load_source
from mesocosm.policies.scorer import CandidatePolicy, CandidateScorer

ALGORITHM = "PPO"
"""The algorithm that trains it."""


class CandidateModule(TorchRLModule, ValueFunctionAPI):
    """A `CandidateScorer` between rows of candidates and Discrete(K)."""

    def setup(self) -> None:
        config: Any = self.model_config
        self.scorer = CandidateScorer(CandidateShape(**config["shape"]))

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        logits, values = self.scorer(batch[Columns.OBS])
        return {Columns.ACTION_DIST_INPUTS: logits, Columns.EMBEDDINGS: values}

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = super()._forward_inference(batch, **kwargs)
        outputs.pop(Columns.EMBEDDINGS)
        return outputs

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = super()._forward_exploration(batch, **kwargs)
        outputs.pop(Columns.EMBEDDINGS)  # the runner would store them with the episode
        return outputs

    def compute_values(self, batch: dict[str, Any], embeddings: Any | None = None) -> Tensor:
        """The values [B] of a batch; `embeddings` are those of the same forward pass."""
        values: Tensor = self.scorer(batch[Columns.OBS])[1] if embeddings is None else embeddings
        return values


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
