"""The effort of a planner, and the part of it that a client keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.model.spec import PartSpec
from mesocosm.model.tensors import Parts


@dataclass(frozen=True)
class PlanSize:
    """How many plans are imagined for one action."""

    horizon: int
    """Steps of a plan"""
    plans: int
    """Plans drawn in each iteration"""
    iterations: int
    proposals: int = 0
    """Plans of the agent in the first iteration: one of its greedy actions, the others drawn"""

    @property
    def elites(self) -> int:
        """The best plans, to which the next iteration's distribution is fitted."""
        return max(2, self.plans // 4)


@dataclass(frozen=True)
class PlanState:
    """The part of a planner that a client keeps between the steps of B environments."""

    seed: int
    step: int
    """Actions planned so far. The random numbers are a function of (seed, step)."""
    elites: Parts
    """[B, E, H, ...]: the best plans of the last step, moved on by one action"""
    planned: Tensor
    """[B] bool: false where the environment's episode begins, which has no earlier plans"""

    @staticmethod
    def begin(action: PartSpec, size: PlanSize, batch: int, seed: int) -> PlanState:
        """The state of `batch` environments before their first step."""
        elites = Parts.empty(action, batch, size.elites, size.horizon)
        return PlanState(seed, 0, elites, torch.zeros(batch, dtype=torch.bool))

    def restarted(self, mask: Tensor) -> PlanState:
        """The state with new episodes where `mask` [B] bool is true."""
        return replace(self, planned=self.planned & ~mask)

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Flat arrays for a wire without pickle."""
        return {
            "seed": np.asarray(self.seed, np.int64),
            "step": np.asarray(self.step, np.int64),
            "elites.numbers": self.elites.numbers.numpy(),
            "elites.categories": self.elites.categories.numpy(),
            "planned": self.planned.numpy(),
        }

    @staticmethod
    def from_numpy(arrays: Mapping[str, NDArray[Any]]) -> PlanState:
        """The inverse of `to_numpy`. The arrays are those of a state."""
        numbers, categories, planned = (
            torch.from_numpy(np.array(arrays[name]))
            for name in ("elites.numbers", "elites.categories", "planned")
        )
        elites = Parts(numbers, categories)
        return PlanState(int(arrays["seed"]), int(arrays["step"]), elites, planned)
