"""RLlib's PPO module for observations with an action mask."""

from __future__ import annotations

from typing import Any

from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns

from mesocosm.datasets.masks import MASK
from mesocosm.policies.policy import masked


class MaskedPPOModule(DefaultPPOTorchRLModule):
    """An RLModule whose logits are masked by `policy.masked`, as in the exported policy.
    `model_config` holds the mask's columns in an observation.
    """

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._masked(batch, super()._forward(batch, **kwargs))

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._masked(batch, super()._forward_train(batch, **kwargs))

    def _masked(self, batch: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        config: Any = self.model_config
        mask = batch[Columns.OBS][..., slice(*config[MASK])]
        logits = outputs[Columns.ACTION_DIST_INPUTS]
        return outputs | {Columns.ACTION_DIST_INPUTS: masked(logits, mask)}
