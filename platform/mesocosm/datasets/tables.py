"""Element tables: a Dict in an observation whose entries are columns over shared slots.

Every leaf of the entry has the same leading dimension N, its slots, and the leaf `present`, a
MultiBinary(N), says which slots hold something. The last component of a MultiDiscrete action points
to a slot if it has N values and the observation has an action mask. The mask then is also a column
of the table. Other actions point to none, whatever their number: 4 directions beside 4 slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.images import is_image
from mesocosm.datasets.masks import counts, has_mask
from mesocosm.errors import UsageError

PRESENT = "present"
Space = gymnasium.Space[Any]


@dataclass(frozen=True)
class ElementTable:
    """The table of an observation."""

    key: str
    slots: int
    pointer: bool
    """True if the last component of an action points to a slot. The action mask is then also a
    column of the table.
    """


def table_of(observation: Space, action: Space) -> ElementTable | None:
    """The table of an observation; None without one.

    Raises:
        UsageError: There are two tables, or a leaf of one does not have its slots.
    """
    if not isinstance(observation, spaces.Dict):
        return None
    keys = [key for key, entry in observation.items() if _is_table(entry)]
    if not keys:
        return None
    if len(keys) > 1:
        raise UsageError(
            f"an observation may have one table (a Dict with the leaf {PRESENT!r}), got"
            f" {' and '.join(keys)}; join them, or rename the leaf"
        )
    entry: Any = observation[keys[0]]
    slots = int(entry[PRESENT].shape[0])
    for name, leaf in entry.items():
        _check(f"observation.{keys[0]}.{name}", leaf, slots)
    pointer = isinstance(action, spaces.MultiDiscrete) and counts(action)[-1] == slots
    return ElementTable(keys[0], slots, pointer and has_mask(observation))


def _is_table(space: Space) -> bool:
    if not isinstance(space, spaces.Dict) or PRESENT not in space.spaces:
        return False
    present = space[PRESENT]
    return isinstance(present, spaces.MultiBinary) and len(present.shape) == 1


def _check(name: str, leaf: Any, slots: int) -> None:
    if is_image(leaf):
        raise UsageError(f"{name} must not be an image, got {leaf}; move it out of the table")
    kinds = spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete
    if not isinstance(leaf, kinds) or not leaf.shape or leaf.shape[0] != slots:
        raise UsageError(
            f"{name} must have the leading dimension {slots} of {PRESENT!r}, the table's slots, got"
            f" {leaf}; move it out of the table"
        )
    if isinstance(leaf, spaces.MultiDiscrete):
        values = leaf.nvec.reshape(slots, -1)
        if (values != values[0]).any():
            raise UsageError(
                f"{name} must have the same number of values in every slot, got {leaf}; use the"
                " largest number"
            )


def slot_columns(columns: slice, slots: int, mask: bool = False) -> NDArray[np.int64]:
    """[N, w]: the columns of each slot.

    Args:
        columns: The columns of a leaf [N, ...], or of an action mask, whose slots come last.
        slots: The number of slots N.
        mask: True for a mask.
    """
    flat = np.arange(columns.start, columns.stop, dtype=np.int64)
    return flat.reshape(-1, slots).T if mask else flat.reshape(slots, -1)
