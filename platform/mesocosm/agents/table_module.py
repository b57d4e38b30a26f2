"""RLlib's PPO module of an agent that attends to the slots of a table."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.policies.attention import HEADS, TableNetwork
from mesocosm.policies.heads import mask_columns
from mesocosm.policies.policy import Layout, Policy, masked

Space = gym.Space[Any]


class TableModule(TorchRLModule, ValueFunctionAPI):
    """A `TableNetwork`, whose width is the first of `fcnet_hiddens`, with masked logits."""

    def setup(self) -> None:
        config: Any = self.model_config
        spaces = [space_from_json(config[name]) for name in ("observation", "action")]
        self.mask = mask_columns(spaces[0])
        self.table = TableNetwork(spaces[0], spaces[1], config["width"])

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        observations = batch[Columns.OBS]
        logits, values = self.table(observations)
        if self.mask is not None:
            logits = masked(logits, observations[:, slice(*self.mask)])
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
        values: Tensor = self.table(batch[Columns.OBS])[1] if embeddings is None else embeddings
        return values


def table_spec(spaces: tuple[Space, Space], hidden: list[int]) -> RLModuleSpec:
    """The spec of a module between the environment's (observation, action) spaces."""
    width = -(-hidden[0] // HEADS) * HEADS
    config = {"observation": space_to_json(spaces[0]), "action": space_to_json(spaces[1])}
    return RLModuleSpec(module_class=TableModule, model_config=config | {"width": width})


def exported_table(algo: str, module: TableModule, spaces: tuple[Space, Space]) -> Policy:
    """The policy of a trained module."""
    config: Any = module.model_config
    policy = Policy(algo, *spaces, Layout("categorical", [], table_width=config["width"]))
    assert policy.network.table is not None
    policy.network.table.load_state_dict(module.table.state_dict())
    return policy
