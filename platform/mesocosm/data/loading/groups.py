"""Columns of a world's slots that belong together: the action mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.masks import MASK, mask_size
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError

Array = NDArray[Any]


def mask_span(observation: SpaceCodec, action: SpaceCodec, body: Array) -> slice | None:
    """The action mask among the categories that a world predicts; None without one.

    Args:
        observation: The codec of observations.
        action: The codec of actions.
        body: [m] the category columns of observations that are predicted.

    Raises:
        UsageError: The mask is a task, or of another kind (`masks.mask_size`).
    """
    if mask_size(observation.space, action.space) is None:
        return None
    (leaf,) = observation.matching(MASK)
    if leaf.categories.start not in body:
        raise UsageError(
            f"reality.task must not name {MASK!r}, which changes with the state; leave it out"
        )
    start = int(np.searchsorted(body, leaf.categories.start))
    return slice(start, start + len(leaf.cardinalities))
