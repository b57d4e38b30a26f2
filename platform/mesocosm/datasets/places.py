"""Places of rows in the shards of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def grouped(shards: Array) -> Iterator[tuple[int, Array | slice]]:
    """Each distinct value of [K] and its positions."""
    if not len(shards):
        return
    if (shards == shards[0]).all():  # the usual case, which needs no sorting
        yield int(shards[0]), slice(None)
        return
    order = np.argsort(shards, kind="stable")
    for positions in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
        yield int(shards[positions[0]]), positions


def episode_rows(first: Array, lengths: Array) -> tuple[Array, Array]:
    """The rows within their shards of whole episodes one after the other, [R], and the end of each
    episode among them, [E]; from first rows [E] and transitions [E].
    """
    ends = np.cumsum(lengths + 1)
    return np.arange(ends[-1]) + np.repeat(first - (ends - lengths - 1), lengths + 1), ends
