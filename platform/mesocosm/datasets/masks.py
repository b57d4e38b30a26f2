"""Action masks: the entry `action_mask` of an observation says which actions are possible.

It is a MultiBinary with one value for each action of a Discrete or MultiDiscrete space, those of a
MultiDiscrete in row-major order. Where a mask allows nothing, as a world may imagine, all actions
are possible.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.errors import UsageError

MASK = "action_mask"
"""The key of the mask, at the top of a Dict."""
Space = gymnasium.Space[Any]
Rng = np.random.Generator


def mask_size(observation: Space, action: Space) -> int | None:
    """The number of actions in a mask; None if the observation has no mask.

    Raises:
        UsageError: The mask or the action space is of another kind.
    """
    if not has_mask(observation):
        return None
    assert isinstance(observation, spaces.Dict)
    if not isinstance(action, spaces.Discrete | spaces.MultiDiscrete):
        raise UsageError(
            f"observation.{MASK} needs Discrete or MultiDiscrete actions, got {action}; rename the"
            " key, or use such actions"
        )
    size, mask = int(np.prod(counts(action))), observation[MASK]
    if not isinstance(mask, spaces.MultiBinary) or mask.shape != (size,):
        raise UsageError(
            f"observation.{MASK} must be MultiBinary({size}), a value for each action of {action},"
            f" got {mask}; rename the key, or correct its space"
        )
    return size


def has_mask(observation: Space) -> bool:
    """True if the observations of a space have a mask."""
    return isinstance(observation, spaces.Dict) and MASK in observation.spaces


def counts(action: Any) -> list[int]:
    """The number of values of each component of a Discrete or MultiDiscrete space."""
    return [int(n) for n in np.ravel(action.nvec if hasattr(action, "nvec") else action.n)]


def mask_of(observation: Any) -> NDArray[np.bool_] | None:
    """The mask of an observation [n], or of a batch in vector layout [B, n]; None without one."""
    if not isinstance(observation, dict) or MASK not in observation:
        return None
    mask = np.asarray(observation[MASK]) > 0
    return np.logical_or(mask, ~mask.any(-1, keepdims=True))


def draw(action: Space, mask: NDArray[np.bool_], rng: Rng) -> Any:
    """A uniform draw from the possible actions.

    Args:
        action: A Discrete or MultiDiscrete space.
        mask: [n] as `mask_of` gives it.
        rng: The generator of the draw.
    """
    return action_at(action, int(rng.choice(np.flatnonzero(mask))))


def action_at(action: Any, number: int) -> Any:
    """The action at a place of the mask."""
    if isinstance(action, spaces.Discrete):
        return np.int64(int(action.start) + number)
    values = np.unravel_index(number, counts(action))
    return (np.reshape(values, action.shape) + action.start).astype(action.dtype)


def place_of(action: Any, value: Any) -> int:
    """The inverse of `action_at`."""
    values = np.ravel(np.asarray(value) - action.start)
    return int(np.ravel_multi_index(tuple(values.tolist()), counts(action)))
