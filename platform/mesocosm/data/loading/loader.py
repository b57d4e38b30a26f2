"""The loader is an index, not a stream: step -> windows is a pure function of (dataset, seed,
step).

Its position is one integer, whatever the number of workers, so a resume continues the very same
sequence. Global sample number g = step * batch + i; epoch = g // windows; a keyed permutation of
the epoch's windows says which one g is (index.py: and how a permutation of blocks of shards comes
before it). Of several datasets by weight each has an order and epochs of its own, and a fixed
pattern says whose turn g is.

Tiling. An episode of T transitions is cut into n windows of W: window j covers the transitions [jW
- s, (j+1)W - s) of [0, T), the shift s drawn by (seed, epoch, episode). n is ceil(T/W) or that plus
one, whichever leaves more shifts for which no window is empty (at least W/2 of them, but T <= W is
always one window): so n does not depend on the epoch, every transition is seen exactly once an
epoch, and after how much context it is seen varies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.format.permutation import key, permute
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.index import (
    FIRST_ROW,
    HASH,
    LENGTH,
    SAMPLE,
    TERMINAL,
    UNIFORM,
    Found,
    Index,
    Order,
    Tables,
    merged,
)
from mesocosm.data.loading.windows import Place, batches, windows
from mesocosm.errors import UsageError
from mesocosm.model.spec import Events, Windows

READ_AHEAD = 16 << 20
"""Bytes of raw rows that are read at once: alone, the smaller batches would cost more in calls than
in bytes.
"""
AT_ONCE = 128
"""Batches that are read at once, at most."""


class Loader:
    """Windows of `window` transitions of a split, `batch` a step, and `events` single transitions
    beside them (0: none).

    block: shards that must be on this machine at once (None: all; see index.py), and as many more
    that are fetched meanwhile. Events then come from
        the block of their step's first window, and evaluation lets go of each shard after it.
    weights: of the batches' windows and events, the share of each of the dataset's `paths` (None:
    each as much as it has). A dataset's epochs
        then are its own; `windows_per_epoch` counts those of all.
    Raises UsageError where the split, or one that has a weight, is empty, or the shards' cache is
    too small for two blocks. Memory: a few integers a shard, at most `index.EPISODES` episodes, and
    READ_AHEAD.
    """

    def __init__(
        self,
        dataset: Dataset,
        codec: Codec,
        split: Split,
        window: int,
        batch: int,
        seed: int,
        events: int = 0,
        *,
        block: int | None = None,
        weights: Sequence[float] | None = None,
    ):
        if window < 1 or batch < 1:
            raise UsageError(
                f"a window of {window} transitions and a batch of {batch} windows cannot be loaded;"
                " use at least 1 of each"
            )
        self.dataset, self.codec, self.split = dataset, codec, split
        self.window, self.batch_size, self.events, self.seed = window, batch, events, seed
        if 0 < events < 3:
            raise UsageError(
                f"{events} events a batch cannot be a third terminals; use 0 or at least 3"
            )
        self._tables = Tables(dataset, codec, split, window)
        every = np.arange(len(dataset.shards))
        if weights is None:
            self._orders = [Order(self._tables, every, seed, block)]
        else:
            self._orders = [
                Order(self._tables, every[dataset.shard_part == part], seed, block, (part,))
                for part in range(len(dataset.paths))
            ]
        for order, of in zip(
            self._orders, [", ".join(dataset.ids)] if weights is None else dataset.ids, strict=True
        ):
            if not order.windows:
                raise UsageError(f"the {split} split of {of} is empty; collect more episodes")
        self._block = block
        observation, action = dataset.observation_codec, dataset.action_codec
        row = 8 * (observation.numbers + action.numbers + 2) + 4 * (
            observation.categories + action.categories
        )
        most = READ_AHEAD // (row * window * batch)
        if (
            block is not None
        ):  # so that what is read at once lies in one block, or at the end of one and the start of the next
            most = min(
                most,
                min(order.windows * block // len(order.shards) for order in self._orders)
                // (4 * batch),
            )
        self._at_once = max(1, min(most, AT_ONCE))
        self._read_ahead = -1, dict[tuple[int, int], list[Windows]]()
        self._turns = Turns([1.0] if weights is None else weights)
        with_terminals = [
            share * (order.terminals > 0)
            for share, order in zip(self._turns.shares, self._orders, strict=True)
        ]
        self._oversampled = (np.arange(events) % 3 == 0) & (sum(with_terminals) > 0)
        self._terminal_turns = Turns(with_terminals) if sum(with_terminals) else self._turns
        self._event_order: Index = (
            np.where(self._oversampled, np.cumsum(self._oversampled), np.cumsum(~self._oversampled))
            - 1
        )
        if (
            block is not None
            and dataset.most is not None
            and (needed := 2 * sum(order.largest() for order in self._orders)) > dataset.most
        ):
            raise UsageError(
                f"two blocks of data.block={block} shards may have {needed / 2**30:.3g} GiB, more"
                f" than data.cache_gib={dataset.most / 2**30:.3g}; lower data.block, or raise"
                " data.cache_gib"
            )

    # -- counts
    # --------------------------------------------------------------------------------------------------

    @property
    def windows_per_epoch(self) -> int:
        return sum(order.windows for order in self._orders)

    @property
    def transitions_per_epoch(self) -> int:
        return sum(order.transitions for order in self._orders)

    def transitions_seen(self, step: int) -> int:
        """Transitions in the batches 0..step-1, repetitions counted: exact. Whole epochs are free,
        the last one is looked up.
        """
        seen = 0
        for order, samples in zip(
            self._orders, self._turns.before(step * self.batch_size), strict=True
        ):
            epochs, rest = divmod(samples, order.windows)
            seen += epochs * order.transitions
            for start in range(0, rest, 1 << 16):
                numbers = np.arange(start, min(rest, start + (1 << 16))) + epochs * order.windows
                found, shift = order.find(numbers)
                seen += int(self._cut(found, found.rest * self.window - shift).length.sum())
        return seen

    # -- training
    # ------------------------------------------------------------------------------------------------

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Windows:
        """Batch `step`'s windows, or the slice of them that is `rank`'s: the ranks' slices, in
        order, are the batch.

        Raises UsageError where the batch or the events do not divide by `world_size`.
        """
        rank_slice = self._slice(self.batch_size, "batch of windows", rank, world_size)
        events_slice = self._slice(self.events, "side batch of events", rank, world_size)
        first = step - step % self._at_once
        if self._read_ahead[0] != first:
            self._read_ahead = first, {}
        read = self._read_ahead[1]
        if (rank, world_size) not in read:
            found = batches(
                windows(self.dataset, self.codec, self._coming(first, *rank_slice), self.window),
                self._at_once,
            )
            if self.events:
                events = batches(self._events(first, *events_slice), self._at_once)
                found = [replace(one, events=side) for one, side in zip(found, events, strict=True)]
            read[rank, world_size] = found
        return read[rank, world_size][step - first]

    def _slice(self, size: int, what: str, rank: int, world_size: int) -> tuple[int, int]:
        if size % world_size:
            raise UsageError(
                f"a {what} of {size} does not divide by {world_size} workers; use a multiple of"
                f" {world_size}"
            )
        each = size // world_size
        return rank * each, (rank + 1) * each

    def _coming(self, first: int, lo: int, hi: int) -> Place:
        """Where the slices of the batches that are read at once lie; their blocks are here, then."""
        self._turn(first, lo, hi)
        steps = np.arange(first, first + self._at_once)
        return self._places((steps[:, None] * self.batch_size + np.arange(lo, hi)).reshape(-1))

    def _turn(self, step: int, lo: int, hi: int) -> None:
        """Hold the blocks of a slice of the batches that are read with `step`, and of their events."""
        if self._block is None:
            return
        now: set[int] = set()
        ahead: set[int] = set()
        first, last = step * self.batch_size, (step + self._at_once - 1) * self.batch_size
        starts = self._turns.before(first) if self.events else self._turns.before(first + lo)
        for order, start, end in zip(
            self._orders, starts, self._turns.before(last + hi), strict=True
        ):
            here, after = order.near(start, max(start, end - 1))
            now.update(here)
            ahead.update(after)
        self.dataset.turn(sorted(now), sorted(ahead - now))

    def _places(self, samples: Index) -> Place:
        parts, shifts = [], np.empty(len(samples), np.int64)
        for number, here, own in self._turns.of(samples):
            found, shifts[here] = self._orders[number].find(own)
            parts.append((here, found))
        whole = merged(len(samples), parts)
        return self._cut(whole, whole.rest * self.window - shifts)

    def _cut(self, found: Found, start: Index) -> Place:
        first = np.maximum(start, 0)
        return Place(found, first, np.minimum(start + self.window, found.facts[:, LENGTH]) - first)

    # -- rare events
    # ---------------------------------------------------------------------------------------------

    def _events(self, first: int, lo: int, hi: int) -> Events:
        """A slice of the events of the batches that are read at once. Every third is a terminal,
        the others are uniform over all transitions; both walk their own permutation, round and
        round.

        With q = the share of terminals so drawn and p their natural rate, a transition's
        probability is the mixture of both ways, so the weights are p / (q + (1 - q) p) for a
        terminal and 1 / (1 - q) for another: they average 1 and restore p. Of several datasets by
        weight a terminal's share of q is that of its dataset among those that have any, and what is
        restored is the weighted mixture.
        """
        codec, steps = self.codec, np.arange(first, first + self._at_once)
        drawn = int(self._oversampled.sum())
        each = np.where(self._oversampled, drawn, self.events - drawn)
        order = (self._event_order + steps[:, None] * each)[:, lo:hi].reshape(-1)
        chosen = np.tile(self._oversampled[lo:hi], len(steps))
        starts = np.repeat(
            np.array([self._turns.before(step * self.batch_size) for step in steps.tolist()]),
            hi - lo,
            0,
        )
        parts: list[tuple[Index | slice, Found]] = []
        weight, oversampled = np.empty(len(order)), np.empty(len(order))
        q = drawn / self.events
        for salt, turns, some in (
            (TERMINAL, self._terminal_turns, chosen),
            (UNIFORM, self._turns, ~chosen),
        ):
            inside = np.flatnonzero(some)
            for number, which, own in turns.of(order[inside]) if len(inside) else ():
                here = inside[which]
                found, terminals, transitions = self._orders[number].draw(
                    salt, own, starts[here, number]
                )
                parts.append((here, found))
                share, more = self._turns.shares[number], q * self._terminal_turns.shares[number]
                p = np.where(terminals, terminals / transitions, 1.0)
                oversampled[here] = share * p / (more + (1 - q) * p * share)
                weight[here] = np.where(terminals, 1 / (1 - q), share / (more + (1 - q) * share))
        found = merged(len(order), parts)
        rows = found.facts[:, FIRST_ROW] + found.rest
        pairs = rows[:, None] + np.arange(2)
        data = self.dataset.gathered(
            found.shards,
            {
                "obs_num": pairs,
                "obs_cat": pairs,
                "act_num": rows,
                "act_cat": rows,
                "terminated": rows,
            },
        )
        numbers, categories, terminated = data["obs_num"], data["obs_cat"], data["terminated"]
        observations = codec.observation_parts(numbers, categories)
        weight = np.where(terminated, oversampled, weight) if drawn else np.ones(len(order))
        return Events(
            observation=observations[:, 0],
            action=codec.action_parts(data["act_num"], data["act_cat"]),
            next_observation=observations[:, 1],
            task=codec.task_parts(numbers[:, 0], categories[:, 0], found.options),
            terminated=torch.from_numpy(terminated.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            episode=torch.from_numpy(found.facts[:, HASH].copy()),
        )

    # -- evaluation
    # ----------------------------------------------------------------------------------------------

    def eval_batches(
        self, batch: int | None = None, rank: int = 0, world_size: int = 1, most: int | None = None
    ) -> Iterator[Windows]:
        """The split once, in order, cut from each episode's start; every rank gets as many batches
        of the same shape. Of more windows than `most` as many as that, evenly spread over the
        split: of several datasets each has its share. With blocks, over the same few shards every
        time: as many as a block has, or as hold `most` windows.

        Windows that only fill up the last batch have an all-false mask and no start.
        """
        size = self.batch_size if batch is None else batch
        lo, hi = self._slice(size, "batch of windows", rank, world_size)
        every = np.arange(len(self.dataset.shards))
        if self._block is not None and most is not None:
            every = permute(every, len(every), key(self.seed, SAMPLE))
            enough = int(np.searchsorted(np.cumsum(self._tables.counts["cuts"][every]), most)) + 1
            every = np.sort(every[: max(enough, self._block)])
        ends = np.cumsum(self._tables.counts["cuts"][every])
        total = int(ends[-1])
        taken = total if most is None else min(most, total)
        if self._block is not None:
            self.dataset.turn(())
        for first in range(0, taken, size):
            places = np.arange(first + lo, first + hi)
            there = places < taken
            found = self._tables.find(
                "cuts", every, ends, np.minimum(places, taken - 1) * total // taken
            )
            place = self._cut(found, np.where(there, found.rest, 0) * self.window)
            cut = Place(found, place.first, np.where(there, place.length, 0))
            yield windows(self.dataset, self.codec, cut, self.window)
        if self._block is not None:
            self.dataset.turn(())


class Turns:
    """Whose turn sample g is, of those with a positive weight: a pattern of SLOTS that repeats,
    spread so evenly that every stretch of n samples has each one's share of n to within a few. Each
    one's own samples are counted from 0 in g's order, so g says them.
    """

    SLOTS = 10_000

    def __init__(self, weights: Sequence[float]):
        """Raises UsageError for a weight of less than half a slot."""
        total = sum(weights)
        exact = np.array(weights, np.float64) / total * self.SLOTS
        slots = np.floor(exact).astype(np.int64)
        slots[np.argsort(slots - exact, kind="stable")[: self.SLOTS - slots.sum()]] += 1
        for weight, got in zip(weights, slots, strict=True):
            if weight > 0 and got == 0:
                raise UsageError(
                    f"data.weights: {weight:g} of {total:g} is less than one sample in"
                    f" {self.SLOTS}; leave that dataset out, or give it more"
                )
        self._slots: Index = slots
        self.shares: list[float] = (slots / self.SLOTS).tolist()
        whose = np.repeat(np.arange(len(slots)), slots)
        own = np.arange(self.SLOTS) - np.repeat(np.cumsum(slots) - slots, slots)
        order = np.lexsort((whose, (2 * own + 1) / (2 * slots[whose])))
        self._whose: Index = whose[order]
        self._own: Index = own[order]

    def of(self, samples: Index) -> Iterator[tuple[int, Index | slice, Index]]:
        """[K] -> each one that has some of them: its number, where they stand, and its own samples."""
        if len(self._slots) == 1:
            yield 0, slice(None), samples
            return
        slot = samples % self.SLOTS
        whose: Index = self._whose[slot]
        own: Index = self._own[slot] + samples // self.SLOTS * self._slots[whose]
        for number in np.unique(whose).tolist():
            here = np.flatnonzero(whose == number)
            yield number, here, own[here]

    def before(self, sample: int) -> list[int]:
        """How many of the samples 0..`sample`-1 each one has."""
        if len(self._slots) == 1:
            return [sample]
        rounds, slot = divmod(sample, self.SLOTS)
        here: list[int] = (
            rounds * self._slots + np.bincount(self._whose[:slot], minlength=len(self._slots))
        ).tolist()
        return here
