"""The loader is an index, not a stream: windows are a pure function of (dataset, seed, step).

Its position is one integer, whatever the number of workers, so a resume continues the same
sequence. Sample g = step * batch + i is of epoch g // windows, whose order is a keyed permutation
(`index`). With weights each dataset has its own epochs, and a fixed pattern gives the dataset of g.

Tiling. An episode of T transitions is cut into n windows of W: window j covers the transitions [jW
- s, (j+1)W - s) of [0, T), the shift s drawn by (seed, epoch, episode). n is ceil(T/W) or one more,
whichever leaves more shifts without an empty window (at least W/2 of them, but T <= W is always one
window). So n does not depend on the epoch, every transition is seen exactly once an epoch, and the
context before it varies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.index import (
    SAMPLE,
    TERMINAL,
    UNIFORM,
    Index,
    Order,
    Tables,
    Turns,
    cut,
    words,
)
from mesocosm.data.loading.windows import batches, windows
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.permutation import key, permute
from mesocosm.datasets.split import Split
from mesocosm.errors import UsageError
from mesocosm.model.tensors import Events, Windows

Array = NDArray[Any]
READ_AHEAD = 16 << 20
"""Bytes of raw rows read at once. Small batches read one by one cost more in calls than in bytes.
"""
AT_ONCE = 128
"""The most batches read at once."""


class Loader:
    """Windows of a split and, separately, single transitions ("events").

    Memory: a few integers a shard, at most `index.EPISODES` episodes, and READ_AHEAD.

    Args:
        window: transitions of a window.
        batch: windows of a step, over all workers.
        events: single transitions of a step, over all workers; 0: none.
        block: shards that must be on this machine at once (None: all); the next block is fetched
            meanwhile. Events then come from the block of their step's first window, and evaluation
            releases each shard after it.
        weights: the share of each of the dataset's `paths` in every batch (None: its share of the
            transitions). Each then has its own epochs; `windows_per_epoch` counts those of all.

    Raises:
        UsageError: the split, or one that has a weight, is empty, or two blocks do not fit into the
            cache of shards.
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
        for name, value in (("window", window), ("batch", batch)):
            if value < 1:
                raise UsageError(f"{name} must be >= 1, got {value}")
        if 0 < events < 3:
            raise UsageError(f"events must be 0 or >= 3 (a third are terminals), got {events}")
        self.dataset, self.codec = dataset, codec
        self.window, self.batch_size, self.events, self.seed = window, batch, events, seed
        self._block = block
        self._tables = Tables(dataset, codec, split, window)
        every = np.arange(len(dataset.shards))
        if weights is None:
            orders = {", ".join(dataset.ids): Order(self._tables, every, seed, block, ())}
        else:
            orders = {
                id: Order(self._tables, every[dataset.shard_part == i], seed, block, (i,))
                for i, id in enumerate(dataset.ids)
            }
        for ids, order in orders.items():
            if not order.windows:
                raise UsageError(f"the {split} split of {ids} is empty; collect more episodes")
        self._orders = list(orders.values())
        self._at_once = self._batches_at_once()
        self._read_ahead = -1, dict[tuple[int, int], list[Windows]]()
        self._turns = Turns([1.0] if weights is None else weights)
        with_terminals = [
            share * (order.terminals > 0)
            for share, order in zip(self._turns.shares, self._orders, strict=True)
        ]
        self._oversampled = (np.arange(events) % 3 == 0) & (sum(with_terminals) > 0)
        """[events] bool: the event is drawn among terminals."""
        self._terminal_turns = Turns(with_terminals) if sum(with_terminals) else self._turns
        if block is not None and dataset.most is not None:
            needed = 2 * sum(order.largest() for order in self._orders)
            if needed > dataset.most:
                raise UsageError(
                    f"data.cache_gib must be >= {needed / 2**30:.3g}, the size of two blocks of"
                    f" data.block={block} shards, got {dataset.most / 2**30:.3g}; lower data.block,"
                    " or raise data.cache_gib"
                )

    def _batches_at_once(self) -> int:
        observation, action = self.dataset.observation_codec, self.dataset.action_codec
        numbers = observation.numbers + action.numbers + 2
        row_bytes = 8 * numbers + 4 * (observation.categories + action.categories)
        most = min(AT_ONCE, READ_AHEAD // (row_bytes * self.window * self.batch_size))
        if self._block is not None:  # the batches read at once lie in one block, or in two
            block = min(order.windows * self._block // len(order.shards) for order in self._orders)
            most = min(most, block // (4 * self.batch_size))
        return max(1, most)

    # -- counts

    @property
    def windows_per_epoch(self) -> int:
        return sum(order.windows for order in self._orders)

    @property
    def transitions_per_epoch(self) -> int:
        return sum(order.transitions for order in self._orders)

    def transitions_seen(self, step: int) -> int:
        """The exact number of transitions in the batches 0..step-1, repetitions counted."""
        seen = 0
        counts = self._turns.before(step * self.batch_size)
        for order, samples in zip(self._orders, counts, strict=True):
            epochs, rest = divmod(samples, order.windows)
            seen += epochs * order.transitions
            for start in range(0, rest, 1 << 16):
                numbers = np.arange(start, min(rest, start + (1 << 16))) + epochs * order.windows
                seen += int(order.find(numbers)["count"].sum())
        return seen

    # -- training

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Windows:
        """Batch `step`'s windows, or `rank`'s slice; the ranks' slices, in order, are the batch.

        Raises:
            UsageError: the batch or the events do not divide by `world_size`.
        """
        rank_slice = self._slice(self.batch_size, "batch of windows", rank, world_size)
        events_slice = self._slice(self.events, "side batch of events", rank, world_size)
        first = step - step % self._at_once
        if self._read_ahead[0] != first:
            self._read_ahead = first, {}
        read = self._read_ahead[1]
        if (rank, world_size) not in read:
            self._turn(first, *rank_slice)
            steps = np.arange(first, first + self._at_once)
            samples = steps[:, None] * self.batch_size + np.arange(*rank_slice)
            places = self._places(samples.reshape(-1))
            whole = windows(self.dataset, self.codec, places, self.window)
            parts = batches(whole, self._at_once)
            if self.events:
                events = batches(self._events(steps, *events_slice), self._at_once)
                parts = [replace(one, events=side) for one, side in zip(parts, events, strict=True)]
            read[rank, world_size] = parts
        return read[rank, world_size][step - first]

    def _slice(self, size: int, name: str, rank: int, world_size: int) -> tuple[int, int]:
        if size % world_size:
            raise UsageError(
                f"a {name} of {size} does not divide by {world_size} workers; use a multiple of"
                f" {world_size}"
            )
        return rank * size // world_size, (rank + 1) * size // world_size

    def _turn(self, step: int, lo: int, hi: int) -> None:
        """Hold the blocks of a slice of the batches read with `step`, and of their events."""
        if self._block is None:
            return
        now: set[int] = set()
        ahead: set[int] = set()
        first, last = step * self.batch_size, (step + self._at_once - 1) * self.batch_size
        starts = self._turns.before(first if self.events else first + lo)
        ends = self._turns.before(last + hi)
        for order, start, end in zip(self._orders, starts, ends, strict=True):
            here, after = order.near(start, max(start, end - 1))
            now.update(here)
            ahead.update(after)
        self.dataset.turn(sorted(now), sorted(ahead - now))

    def _places(self, samples: Index) -> Array:
        places = np.empty(len(samples), self._tables.type)
        for number, here, numbers in self._turns.of(samples):
            words(places)[here] = words(self._orders[number].find(numbers))
        return places

    # -- rare events

    def _events(self, steps: Index, lo: int, hi: int) -> Events:
        """A slice of the events of the batches read at once.

        Every third is a terminal, the others are uniform over all transitions; both walk their own
        permutation, round and round. With q = the share of terminals so drawn and p their natural
        rate, weights of p / (q + (1 - q) p) for a terminal and 1 / (1 - q) for another average 1
        and restore p. With weights of datasets, a terminal's share of q is that of its dataset
        among those that have any.
        """
        drawn = int(self._oversampled.sum())
        is_drawn = self._oversampled
        each = np.where(is_drawn, drawn, self.events - drawn)
        number = np.where(is_drawn, np.cumsum(is_drawn), np.cumsum(~is_drawn)) - 1
        walk = (number + steps[:, None] * each)[:, lo:hi].reshape(-1)
        is_drawn = np.tile(is_drawn[lo:hi], len(steps))
        before = np.array([self._turns.before(step * self.batch_size) for step in steps.tolist()])
        samples = np.repeat(before, hi - lo, 0)
        places = np.empty(len(walk), self._tables.type)
        weight, terminal_weight = np.ones(len(walk)), np.ones(len(walk))
        q = drawn / self.events
        for salt, turns, chosen in (
            (TERMINAL, self._terminal_turns, np.flatnonzero(is_drawn)),
            (UNIFORM, self._turns, np.flatnonzero(~is_drawn)),
        ):
            for part, which, numbers in turns.of(walk[chosen]):
                here = chosen[which]
                order = self._orders[part]
                draws, terminals, transitions = order.draw(salt, numbers, samples[here, part])
                words(places)[here] = words(draws)
                if not drawn:
                    continue
                share, more = self._turns.shares[part], q * self._terminal_turns.shares[part]
                p = np.where(terminals, terminals / transitions, 1.0)
                terminal_weight[here] = share * p / (more + (1 - q) * p * share)
                weight[here] = np.where(terminals, 1 / (1 - q), share / (more + (1 - q) * share))
        rows = places["first_row"] + places["rest"]
        pairs = rows[:, None] + np.arange(2)
        columns = {"obs_num": pairs, "obs_cat": pairs} | dict.fromkeys(
            ("act_num", "act_cat", "terminated"), rows
        )
        data = self.dataset.gathered(places["shard"], columns)
        numbers, categories, terminated = data["obs_num"], data["obs_cat"], data["terminated"]
        observations = self.codec.observation_parts(numbers, categories)
        weight = np.where(terminated, terminal_weight, weight)
        return Events(
            observation=observations[:, 0],
            action=self.codec.action_parts(data["act_num"], data["act_cat"]),
            next_observation=observations[:, 1],
            task=self.codec.task_parts(numbers[:, 0], categories[:, 0], places["options"]),
            terminated=torch.from_numpy(terminated.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            episode=torch.from_numpy(places["hash"].copy()),
        )

    # -- evaluation

    def eval_batches(
        self, batch: int | None = None, rank: int = 0, world_size: int = 1, most: int | None = None
    ) -> Iterator[Windows]:
        """Pass over the split once, in order, with windows cut from each episode's start.

        Every rank gets as many batches of the same shape. Windows that only fill up the last batch
        have an all-false mask and no start.

        Args:
            batch: windows of a batch, over all workers; None: as in training.
            most: take at most this many windows, evenly spread over the split. With blocks they lie
                in the same few shards every time, at least those of one block.
        """
        size = self.batch_size if batch is None else batch
        lo, hi = self._slice(size, "batch of windows", rank, world_size)
        shards = np.arange(len(self.dataset.shards))
        if self._block is not None and most is not None:
            shards = permute(shards, len(shards), key(self.seed, SAMPLE))
            ends = np.cumsum(self._tables.counts["cuts"][shards])
            shards = np.sort(shards[: max(int(np.searchsorted(ends, most)) + 1, self._block)])
        total = self._tables.total("cuts", shards)
        taken = total if most is None else min(most, total)
        if self._block is not None:
            self.dataset.turn(())
        for first in range(0, taken, size):
            numbers = np.arange(first + lo, first + hi)
            inside = numbers < taken
            numbers = np.minimum(numbers, taken - 1) * total // taken
            places = self._tables.find("cuts", shards, numbers)
            cut(places, np.where(inside, places["rest"], 0) * self.window, self.window)
            places["count"] *= inside
            yield windows(self.dataset, self.codec, places, self.window)
        if self._block is not None:
            self.dataset.turn(())
