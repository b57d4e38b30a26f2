"""The loader is an index, not a stream: step -> windows is a pure function of (dataset, seed, step).

Its position is one integer, whatever the number of workers, so a resume continues the very same sequence. Global sample
number g = step * batch + i; epoch = g // windows; a keyed permutation of the epoch's windows says which one g is.

Tiling. An episode of T transitions is cut into n windows of W: window j covers the transitions [jW - s, (j+1)W - s) of [0, T),
the shift s drawn by (seed, epoch, episode). n is ceil(T/W) or that plus one, whichever leaves more shifts for which no window is
empty (at least W/2 of them, but T <= W is always one window): so n does not depend on the epoch, every transition is seen exactly
once an epoch, and after how much context it is seen varies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.codec import Codec
from mesocosm.data.dataset import Dataset, Split
from mesocosm.data.manifest import OUTCOMES
from mesocosm.data.permutation import key, permute
from mesocosm.errors import UsageError
from mesocosm.model.spec import Events, Windows

Index = NDArray[np.int64]
ORDER, SHIFT, TERMINAL, UNIFORM = 1, 2, 3, 4
"""Salts of the independent draws."""


@dataclass(frozen=True)
class _Place:
    """Where K windows lie."""

    episode: Index
    """[K] position in the split's list of episodes"""
    first: Index
    """[K] first transition within the episode"""
    length: Index
    """[K] transitions, 1..W (0: padding)"""


class Loader:
    """Windows of `window` transitions of a split, `batch` a step, and `events` single transitions beside them (0: none).

    Raises UsageError where the split is empty. Memory: a few integers an episode.
    """

    def __init__(self, dataset: Dataset, codec: Codec, split: Split, window: int, batch: int, seed: int, events: int = 0):
        if window < 1 or batch < 1:
            raise UsageError(f"a window of {window} transitions and a batch of {batch} windows cannot be loaded; use at least 1 of each")
        self.dataset, self.codec, self.split = dataset, codec, split
        self.window, self.batch_size, self.events, self.seed = window, batch, events, seed
        if 0 < events < 3:
            raise UsageError(f"{events} events a batch cannot be a third terminals; use 0 or at least 3")
        episodes = dataset.episodes(split)
        if not len(episodes):
            raise UsageError(f"the {split} split of {', '.join(dataset.ids)} is empty; collect more episodes")
        table = dataset.table[episodes]
        self._lengths: Index = table["length"].astype(np.int64)
        self._first_rows: Index = table["first_row"].astype(np.int64)
        self._shards: Index = table["shard"].astype(np.int64)
        self._hashes: Index = table["hash"].astype(np.int64)
        self._options = codec.option_rows(dataset.options, dataset.option_numbers, dataset.option_values)[episodes]
        least = -(-self._lengths // window)
        spare = least * window - self._lengths
        more = (least > 1) & (window - 1 - spare > spare + 1)
        self._counts: Index = least + more
        self._low: Index = np.where(more, spare + 1, 0)
        self._shifts: Index = np.where(more, window - 1 - spare, np.where(least > 1, spare + 1, 1))
        self._window_ends: Index = np.cumsum(self._counts)
        self._window_starts: Index = self._window_ends - self._counts
        self._transition_ends: Index = np.cumsum(self._lengths)
        self._transition_starts: Index = self._transition_ends - self._lengths
        self._terminals: Index = np.flatnonzero(table["outcome"] == OUTCOMES.index("terminated"))
        self._oversampled = (np.arange(events) % 3 == 0) & bool(len(self._terminals))
        self._event_order: Index = np.where(self._oversampled, np.cumsum(self._oversampled), np.cumsum(~self._oversampled)) - 1

    # -- counts --------------------------------------------------------------------------------------------------

    @property
    def windows_per_epoch(self) -> int:
        return int(self._window_ends[-1])

    @property
    def transitions_per_epoch(self) -> int:
        return int(self._transition_ends[-1])

    def transitions_seen(self, step: int) -> int:
        """Transitions in the batches 0..step-1, repetitions counted: exact. Whole epochs are free, the last one is looked up."""
        epochs, rest = divmod(step * self.batch_size, self.windows_per_epoch)
        seen = epochs * self.transitions_per_epoch
        for start in range(0, rest, 1 << 16):
            samples = np.arange(start, min(rest, start + (1 << 16))) + epochs * self.windows_per_epoch
            seen += int(self._places(samples).length.sum())
        return seen

    # -- training ------------------------------------------------------------------------------------------------

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Windows:
        """Batch `step`'s windows, or the slice of them that is `rank`'s: the ranks' slices, in order, are the batch.

        Raises UsageError where the batch or the events do not divide by `world_size`.
        """
        lo, hi = self._slice(self.batch_size, "batch of windows", rank, world_size)
        windows = self._windows(self._places(np.arange(lo, hi) + step * self.batch_size))
        if not self.events:
            return windows
        return Windows(**{**vars(windows), "events": self._events(step, rank, world_size)})

    def _slice(self, size: int, what: str, rank: int, world_size: int) -> tuple[int, int]:
        if size % world_size:
            raise UsageError(f"a {what} of {size} does not divide by {world_size} workers; use a multiple of {world_size}")
        each = size // world_size
        return rank * each, (rank + 1) * each

    def _places(self, samples: Index) -> _Place:
        epochs, positions = np.divmod(samples, self.windows_per_epoch)
        numbers = permute(positions, self.windows_per_epoch, key(self.seed, ORDER, epochs))
        episode = np.searchsorted(self._window_ends, numbers, "right")
        within = numbers - self._window_starts[episode]
        draws = key(self.seed, SHIFT, epochs, self._hashes[episode])
        shift = self._low[episode] + (draws % self._shifts[episode].astype(np.uint64)).astype(np.int64)
        return self._cut(episode, within * self.window - shift)

    def _cut(self, episode: Index, start: Index) -> _Place:
        first = np.maximum(start, 0)
        return _Place(episode, first, np.minimum(start + self.window, self._lengths[episode]) - first)

    def _windows(self, place: _Place) -> Windows:
        """Rows after a window's end repeat its last observation, and their actions its last action: nothing later leaks in."""
        gather, codec = self.dataset.gather, self.codec
        episode, shards = place.episode, self._shards[place.episode]
        steps = np.arange(self.window)
        base = (self._first_rows[episode] + place.first)[:, None]
        mask = steps < place.length[:, None]
        rows = base + np.minimum(np.arange(self.window + 1), place.length[:, None])
        transitions = base + np.minimum(steps, np.maximum(place.length - 1, 0)[:, None])
        numbers, categories = gather("obs_num", shards, rows), gather("obs_cat", shards, rows)
        there = torch.from_numpy(mask)
        zero = torch.zeros(())
        reward = codec.reward(gather("reward", shards, transitions))
        terminated = torch.from_numpy(gather("terminated", shards, transitions).astype(np.float32))
        seconds = gather("duration", shards, transitions) if codec.spec.durations else np.zeros(mask.shape)
        return Windows(
            observation=codec.observation_parts(numbers, categories),
            action=codec.action_parts(gather("act_num", shards, transitions), gather("act_cat", shards, transitions)),
            task=codec.task_parts(numbers[:, 0], categories[:, 0], self._options[episode]),
            reward=torch.where(there, reward, zero),
            terminated=torch.where(there, terminated, zero),
            duration=torch.where(there, codec.duration(seconds), zero),
            mask=there,
            start=torch.from_numpy((place.first == 0) & (place.length > 0)),
            episode=torch.from_numpy(self._hashes[episode]),
        )

    # -- rare events ---------------------------------------------------------------------------------------------

    def _events(self, step: int, rank: int, world_size: int) -> Events:
        """Every third is a terminal, the others are uniform over all transitions; both walk their own permutation, round and round.

        With q = the share of terminals so drawn and p their natural rate, a transition's probability is the mixture of both ways, so the weights
        are p / (q + (1 - q) p) for a terminal and 1 / (1 - q) for another: they average 1 and restore p.
        """
        lo, hi = self._slice(self.events, "side batch of events", rank, world_size)
        drawn = int(self._oversampled.sum())
        order = np.where(self._oversampled, self._event_order + step * drawn, self._event_order + step * (self.events - drawn))[lo:hi]
        chosen = self._oversampled[lo:hi]
        episode, at = np.empty(hi - lo, np.int64), np.empty(hi - lo, np.int64)
        if chosen.any():
            terminal = self._terminals[self._round(order[chosen], len(self._terminals), TERMINAL)]
            episode[chosen], at[chosen] = terminal, self._lengths[terminal] - 1
        if not chosen.all():
            numbers = self._round(order[~chosen], self.transitions_per_epoch, UNIFORM)
            uniform = np.searchsorted(self._transition_ends, numbers, "right")
            episode[~chosen], at[~chosen] = uniform, numbers - self._transition_starts[uniform]
        gather, codec, shards = self.dataset.gather, self.codec, self._shards[episode]
        rows = self._first_rows[episode] + at
        pairs = rows[:, None] + np.arange(2)
        numbers, categories = gather("obs_num", shards, pairs), gather("obs_cat", shards, pairs)
        observations = codec.observation_parts(numbers, categories)
        terminated = gather("terminated", shards, rows)
        q, p = drawn / self.events, len(self._terminals) / self.transitions_per_epoch
        weight = np.where(terminated, p / (q + (1 - q) * p), 1 / (1 - q)) if drawn else np.ones(hi - lo)
        return Events(
            observation=observations[:, 0],
            action=codec.action_parts(gather("act_num", shards, rows), gather("act_cat", shards, rows)),
            next_observation=observations[:, 1],
            task=codec.task_parts(numbers[:, 0], categories[:, 0], self._options[episode]),
            terminated=torch.from_numpy(terminated.astype(np.float32)),
            weight=torch.from_numpy(weight.astype(np.float32)),
            episode=torch.from_numpy(self._hashes[episode]),
        )

    def _round(self, order: Index, n: int, salt: int) -> Index:
        rounds, positions = np.divmod(order, n)
        return permute(positions, n, key(self.seed, salt, rounds))

    # -- evaluation ----------------------------------------------------------------------------------------------

    def eval_batches(self, batch: int | None = None, rank: int = 0, world_size: int = 1, most: int | None = None) -> Iterator[Windows]:
        """The split once, in order, cut from each episode's start; every rank gets as many batches of the same shape. Of more windows than
        `most` as many as that, evenly spread over the split: of several datasets each has its share.

        Windows that only fill up the last batch have an all-false mask and no start.
        """
        size = self.batch_size if batch is None else batch
        lo, hi = self._slice(size, "batch of windows", rank, world_size)
        counts = -(-self._lengths // self.window)
        ends = np.cumsum(counts)
        total = int(ends[-1])
        taken = total if most is None else min(most, total)
        for first in range(0, taken, size):
            places = np.arange(first + lo, first + hi)
            there = places < taken
            numbers = np.minimum(places, taken - 1) * total // taken
            episode = np.searchsorted(ends, numbers, "right")
            within = np.where(there, numbers - (ends - counts)[episode], 0)
            place = self._cut(episode, within * self.window)
            yield self._windows(_Place(episode, place.first, np.where(there, place.length, 0)))
