"""Actions of a world's parts, replaced where the mask of an observation forbids them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mesocosm.model import density
from mesocosm.model.tensors import Parts

LEAST_CHANCE = 1e-6
"""The least probability of a possible action that was in none of the best plans of earlier steps.
"""


class PossibleActions:
    """The masks of observations. Without a mask, all actions stay as they are."""

    def __init__(self, mask: slice | None, counts: Tensor):
        """A mask in a world's parts.

        Args:
            mask: The categories of an observation that are the mask.
            counts: [m] int64, the values of each component of an action.
        """
        self._mask, self._counts = mask, counts
        self._strides = counts.prod() // counts.cumprod(0)

    def allowed(self, observation: Parts) -> Tensor:
        """[..., n] bool, all true where a mask allows nothing."""
        assert self._mask is not None
        mask = observation.categories[..., self._mask] == 1
        return mask | ~mask.any(-1, keepdim=True)

    def anywhere(self, action: Parts, observation: Parts, u: Tensor) -> Parts:
        """Actions [N, ...], uniform draws by `u` [N] in place of those that are not possible."""
        if self._mask is None:
            return action
        return self._replaced(action, self.allowed(observation).float(), u)

    def first(
        self, plans: Parts, observation: Parts, chances: Tensor, generator: np.random.Generator
    ) -> Parts:
        """Plans whose first actions are possible.

        Args:
            plans: [B, P, H, ...].
            observation: [B, ...].
            chances: [B, m, C], by which other actions are drawn: those of each component.
            generator: Of the draws.
        """
        if self._mask is None:
            return plans
        joint = torch.ones_like(chances[:, 0, :1])
        for component, count in enumerate(self._counts.tolist()):
            joint = (joint.unsqueeze(-1) * chances[:, component, None, :count]).flatten(1)
        weights = self.allowed(observation) * (joint + LEAST_CHANCE)
        size = plans.categories.shape[1]
        u = torch.from_numpy(generator.random(len(weights) * size, np.float32)).to(weights.device)
        first = self._replaced(plans[:, :, 0].flatten(), weights.repeat_interleave(size, 0), u)
        categories = plans.categories.clone()
        categories[:, :, 0] = first.categories.unflatten(0, (-1, size))
        return Parts(plans.numbers, categories)

    def _replaced(self, action: Parts, weights: Tensor, u: Tensor) -> Parts:
        """Draws by `weights` [N, n] in place of the actions [N, ...] whose weight is 0."""
        place = (action.categories * self._strides).sum(-1, keepdim=True)
        drawn = density.categorical(weights.log(), u).unsqueeze(-1)
        place = torch.where(weights.gather(-1, place) > 0, place, drawn)
        return Parts(action.numbers, place // self._strides % self._counts)
