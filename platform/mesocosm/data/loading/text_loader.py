"""The loader of token streams: rows of packed segments, a pure function of (dataset, seed, step).

The tokens of the split are in memory. Its segments are packed into rows once; an epoch passes over
all rows in an order that the seed draws, so a resume continues the same sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.loading.index import ORDER
from mesocosm.data.loading.texts import TextCodec, text_episodes
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.permutation import key, permute
from mesocosm.datasets.split import Split
from mesocosm.errors import UsageError
from mesocosm.model.language.stream import Marked, Segment, TokenRows, collate, pack, segments


class TextLoader:
    """Rows of a split, with the interface of `Loader`: a window is a row of tokens."""

    def __init__(
        self,
        dataset: Dataset,
        codec: TextCodec,
        tokenizer: Marked,
        split: Split,
        window: int,
        batch: int,
        seed: int,
        members: int = 1,
    ):
        """Read and pack the split.

        Args:
            dataset: The data.
            codec: Of the data.
            tokenizer: Of the world.
            split: `train` or `valid`.
            window: Tokens of a row.
            batch: Rows of a step, over all workers.
            seed: Of the order.
            members: K; the members that read a segment take turns.

        Raises:
            UsageError: The split is empty, or an episode's start and a step do not fit in a row.
        """
        self.dataset, self.window, self.batch_size, self.seed = dataset, window, batch, seed
        self.members = members
        parts: list[Segment] = []
        for episode in text_episodes(dataset, codec, split):
            parts += segments(episode, tokenizer, codec.spec, window)
        if not parts:
            ids = ", ".join(dataset.ids)
            raise UsageError(f"the {split} split of {ids} is empty; collect more episodes")
        packed = pack([len(part) for part in parts], window)
        self._rows = [[parts[index] for index in row] for row in packed]
        self._steps = np.array([sum(part.steps for part in row) for row in self._rows], np.int64)

    @property
    def windows_per_epoch(self) -> int:
        """Rows of the split."""
        return len(self._rows)

    @property
    def transitions_per_epoch(self) -> int:
        """Transitions of the split."""
        return int(self._steps.sum())

    def transitions_seen(self, step: int) -> int:
        """The exact number of transitions in the batches 0..step-1, repetitions counted."""
        epochs, rest = divmod(step * self.batch_size, len(self._rows))
        last = self._order(np.arange(rest) + epochs * len(self._rows))
        return epochs * self.transitions_per_epoch + int(self._steps[last].sum())

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> TokenRows:
        """Batch `step`, or `rank`'s slice; the ranks' slices, in order, are the batch.

        Raises:
            UsageError: The batch does not divide by `world_size`.
        """
        low, high = self._slice(self.batch_size, rank, world_size)
        first = step * self.batch_size
        rows = self._order(np.arange(first + low, first + high))
        return self._collated(rows.tolist(), draw=first // len(self._rows))

    def eval_batches(
        self, batch: int | None = None, rank: int = 0, world_size: int = 1, most: int | None = None
    ) -> Iterator[TokenRows]:
        """Pass over the split once. Every rank gets the same number of batches of the same shape.
        Rows that only fill up the last batch are all padding.

        Args:
            batch: Rows of a batch, over all workers; None: as in training.
            rank: The worker that reads.
            world_size: The number of workers.
            most: Take at most this many rows, evenly spread over the split.
        """
        size = self.batch_size if batch is None else batch
        low, high = self._slice(size, rank, world_size)
        total = len(self._rows)
        taken = total if most is None else min(most, total)
        for first in range(0, taken, size):
            numbers = range(first + low, first + high)
            yield self._collated([n * total // taken if n < taken else -1 for n in numbers])

    def _collated(self, rows: list[int], draw: int = 0) -> TokenRows:
        parts = [self._rows[row] if row >= 0 else [] for row in rows]
        return collate(parts, self.window, members=self.members, draw=draw)

    def _order(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each sample."""
        epochs, numbers = np.divmod(samples, len(self._rows))
        return permute(numbers, len(self._rows), key(self.seed, ORDER, epochs))

    def _slice(self, size: int, rank: int, world_size: int) -> tuple[int, int]:
        if size % world_size:
            raise UsageError(
                f"a batch of {size} rows does not divide by {world_size} workers; use a multiple of"
                f" {world_size}"
            )
        return rank * size // world_size, (rank + 1) * size // world_size
