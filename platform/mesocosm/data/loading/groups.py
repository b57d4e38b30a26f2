"""Columns of a world's slots that belong together: the action mask, and the table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.masks import MASK, mask_size
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.tables import PRESENT, slot_columns, table_of
from mesocosm.errors import UsageError
from mesocosm.model.spec import TableSpan

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


def table_span(
    observation: SpaceCodec, action: SpaceCodec, numbers: Array, categories: Array
) -> TableSpan | None:
    """The table among the columns that a world predicts; None without one.

    Args:
        observation: The codec of observations.
        action: The codec of actions.
        numbers: [n] the number columns of observations that are predicted.
        categories: [m] the category columns, likewise.

    Raises:
        UsageError: A part of the table is a task.
    """
    table = table_of(observation.space, action.space)
    if table is None:
        return None
    of_numbers: list[Array] = []
    of_categories: list[Array] = []
    present = 0
    for leaf in observation.leaves:
        mask = leaf.path == (MASK,) and table.pointer
        if leaf.path[0] != table.key and not mask:
            continue
        if leaf.path == (table.key, PRESENT):
            present = sum(columns.shape[1] for columns in of_categories)
        of_numbers.append(slot_columns(leaf.numbers, table.slots, mask))
        of_categories.append(slot_columns(leaf.categories, table.slots, mask))
    spans: list[tuple[tuple[int, ...], ...]] = []
    for columns, body in ((of_numbers, numbers), (of_categories, categories)):
        joined = np.concatenate(columns, 1)
        if not np.isin(joined, body).all():
            raise UsageError(
                f"reality.task must not name the table {table.key!r} or a part of it; leave it out"
            )
        spans.append(tuple(map(tuple, np.searchsorted(body, joined).tolist())))
    pointer = len(action.cardinalities) - 1 if table.pointer else None
    return TableSpan(spans[0], spans[1], present, pointer)


def number_groups(observation: SpaceCodec, action: SpaceCodec) -> Array:
    """[p, N]: the number columns of an observation that are one column of its table."""
    table = table_of(observation.space, action.space)
    if table is None:
        return np.zeros((0, 0), np.int64)
    leaves = [leaf for leaf in observation.leaves if leaf.path[0] == table.key]
    columns = [slot_columns(leaf.numbers, table.slots) for leaf in leaves]
    return np.concatenate(columns, 1).T
