"""RLlib's PPO module of an agent that attends to the slots of a table."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor

from mesocosm.agents.actor_critic import ActorCriticModule
from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.policies.attention import HEADS, TableNetwork
from mesocosm.policies.heads import mask_columns
from mesocosm.policies.policy import Layout, Policy, masked

Space = gym.Space[Any]


class TableModule(ActorCriticModule):
    """A `TableNetwork`, whose width is the first of `fcnet_hiddens`, with masked logits."""

    def setup(self) -> None:
        config: Any = self.model_config
        spaces = [space_from_json(config[name]) for name in ("observation", "action")]
        self.mask = mask_columns(spaces[0])
        self.table = TableNetwork(spaces[0], spaces[1], config["width"])

    def logits_and_values(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        logits, values = self.table(observations)
        if self.mask is not None:
            logits = masked(logits, observations[:, slice(*self.mask)])
        return logits, values

    def start_even(self) -> None:
        self.table.start_even()


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
