"""RLlib's module of our own networks, which give logits and values in one pass."""

from __future__ import annotations

from typing import Any

from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor


class ActorCriticModule(TorchRLModule, ValueFunctionAPI):
    """A subclass makes its network in `setup` and gives `logits_and_values`."""

    def logits_and_values(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [B, n] of actions, and the values [B], of observations [B, ...]."""
        raise NotImplementedError

    def start_even(self) -> None:
        """Scale the last layers, so that all actions begin almost equally likely."""
        raise NotImplementedError

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        logits, values = self.logits_and_values(batch[Columns.OBS])
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
        if embeddings is not None:
            values: Tensor = embeddings
            return values
        return self.logits_and_values(batch[Columns.OBS])[1]
