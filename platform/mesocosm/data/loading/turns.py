"""Shares of a sequence of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mesocosm.data.loading.index import Index
from mesocosm.errors import UsageError

SLOTS = 10_000


class Turns:
    """Which source sample g is from, where each source has a weight.

    A pattern of SLOTS repeats, spread so evenly that every stretch of n samples has each source's
    share of n to within a few. The samples of a source are counted from 0 in g's order.

    Raises:
        UsageError: a positive weight is less than half a slot.
    """

    def __init__(self, weights: Sequence[float]):
        exact = np.array(weights, np.float64) / sum(weights) * SLOTS
        slots = np.floor(exact).astype(np.int64)
        slots[np.argsort(slots - exact, kind="stable")[: SLOTS - slots.sum()]] += 1
        for weight, count in zip(weights, slots, strict=True):
            if weight > 0 and count == 0:
                raise UsageError(
                    f"data.weights: {weight:g} of {sum(weights):g} is less than one sample in"
                    f" {SLOTS}; leave that dataset out, or give it more"
                )
        self._slots: Index = slots
        self.shares: list[float] = (slots / SLOTS).tolist()
        source = np.repeat(np.arange(len(slots)), slots)
        own = np.arange(SLOTS) - np.repeat(np.cumsum(slots) - slots, slots)
        order = np.lexsort((source, (2 * own + 1) / (2 * slots[source])))
        self._source: Index = source[order]
        self._own: Index = own[order]

    def of(self, samples: Index) -> Iterator[tuple[int, Index | slice, Index]]:
        """Each source of [K] samples: its number, their positions, and its own sample numbers."""
        if len(self._slots) == 1:
            yield 0, slice(None), samples
            return
        slot = samples % SLOTS
        source: Index = self._source[slot]
        own: Index = self._own[slot] + samples // SLOTS * self._slots[source]
        for number in np.unique(source).tolist():
            here = np.flatnonzero(source == number)
            yield number, here, own[here]

    def before(self, sample: int) -> list[int]:
        """How many of the samples 0..`sample`-1 each source has."""
        rounds, slot = divmod(sample, SLOTS)
        partial = np.bincount(self._source[:slot], minlength=len(self._slots))
        counts: list[int] = (rounds * self._slots + partial).tolist()
        return counts
