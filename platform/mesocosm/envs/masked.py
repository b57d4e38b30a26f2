"""Reality refuses an action that its mask does not allow, before the environment takes it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from mesocosm.datasets.masks import MASK, mask_size, place_of
from mesocosm.envs.api import Env, take_reset, take_step
from mesocosm.errors import MesocosmError


class MaskedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises MesocosmError on an action that `observation.action_mask` does not allow. An
    observation that allows no action although the episode continues is an error of the environment
    (ValueError).
    """

    def __init__(self, env: Env):
        """Raises UsageError where the mask does not fit the actions (`masks.mask_size`)."""
        super().__init__(env)
        mask_size(env.observation_space, env.action_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        result = take_reset(self.env, seed=seed, options=options)
        self._note(result[0])
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if not self._mask[place_of(self.env.action_space, action)]:
            raise MesocosmError(
                f"the action must be one that observation.{MASK} allows, got {action!r}; choose"
                " among the places where the mask is 1"
            )
        result = take_step(self.env, action)
        if not (result[2] or result[3]):
            self._note(result[0])
        return result

    def _note(self, observation: Any) -> None:
        self._mask = np.array(observation[MASK], np.bool_)
        if not self._mask.any():
            raise ValueError(f"observation.{MASK} allows no action; end the episode, or allow one")
