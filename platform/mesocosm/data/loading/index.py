"""Locations of samples: sample number -> shard, episode, first transition.

Without blocks an epoch is one keyed permutation of all windows. With blocks of B shards it is a
keyed permutation of the shards, cut into blocks of B, and one of the windows within each block: a
sample needs only its block on this machine. The shards of a block differ in every epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import OUTCOMES, SPLITS
from mesocosm.datasets.permutation import key, permute
from mesocosm.datasets.places import grouped
from mesocosm.datasets.split import Split
from mesocosm.errors import UsageError

Array = NDArray[Any]
Index = NDArray[np.int64]
By = Literal["windows", "transitions", "terminals", "cuts"]
"""The unit of an index: training's windows, single transitions, terminals, and the windows that
evaluation cuts from each episode's start.
"""
ORDER, SHIFT, TERMINAL, UNIFORM, BLOCK, SAMPLE = 1, 2, 3, 4, 5, 6
"""Salts of the independent draws."""
SLOTS = 10_000
EPISODES = 1 << 20
"""Episodes kept in memory, some 100 bytes each; at least those of one shard."""


def place_type(options: int) -> np.dtype[Any]:
    """The dtype of a place: a window, or a transition, and its episode."""
    fields = ["shard", "first_row", "length", "hash"]  # of the episode
    fields += ["low", "shifts"]  # the least shift of its windows, and how many shifts there are
    fields += ["rest"]  # windows or transitions before this one in the episode
    fields += ["start", "count"]  # the window's first transition, and how many it has
    # The options are a row of `Codec.option_rows`.
    return np.dtype([(name, np.int64) for name in fields] + [("options", np.float64, (options,))])


def tiles(length: Index, window: int) -> tuple[Index, Index, Index]:
    """Cut episodes of `length` [n] into windows: how many, the least shift, and from how many
    shifts one is drawn.
    """
    least = -(-length // window)
    spare = least * window - length
    more = (least > 1) & (window - 1 - spare > spare + 1)
    low = np.where(more, spare + 1, 0)
    shifts = np.where(more, window - 1 - spare, np.where(least > 1, spare + 1, 1))
    return least + more, low, shifts


def words(places: Array) -> Index:
    """The records as [K, n] integers, which numpy copies several times as fast."""
    return places.view(np.int64).reshape(len(places), places.itemsize // 8)


def cut(places: Array, start: Index, window: int) -> Array:
    """Set `start` and `count` of windows that begin at `start`; it may be negative."""
    places["start"] = np.maximum(start, 0)
    places["count"] = np.minimum(start + window, places["length"]) - places["start"]
    return places


def _counts(length: Index, terminated: Array, window: int) -> dict[By, Index]:
    return {
        "windows": tiles(length, window)[0],
        "transitions": length,
        "terminals": terminated.astype(np.int64),
        "cuts": -(-length // window),
    }


class _Episodes:
    """A split's episodes in a shard."""

    def __init__(self, dataset: Dataset, codec: Codec, split: Split, window: int, shard: int):
        records = dataset.records(shard)
        chosen = np.flatnonzero(records["split"] == SPLITS.index(split))
        records = records[chosen]
        self.places = np.zeros(len(chosen), place_type(len(dataset.options)))
        self.places["shard"] = shard
        for name in ("first_row", "length", "hash"):
            self.places[name] = records[name]
        length = self.places["length"]
        _, self.places["low"], self.places["shifts"] = tiles(length, window)
        options = codec.option_rows(dataset.options, *dataset.shard_options(shard))
        self.places["options"] = options[chosen]
        terminated = records["outcome"] == OUTCOMES.index("terminated")
        self._ends = {by: np.cumsum(n) for by, n in _counts(length, terminated, window).items()}

    def at(self, by: By, numbers: Index) -> Array:
        """The place of each number."""
        ends = self._ends[by]
        episode = np.searchsorted(ends, numbers, "right")
        places = self.places.take(episode)  # faster than places[episode]
        if by == "terminals":
            places["rest"] = places["length"] - 1
        else:
            places["rest"] = numbers - np.where(episode, ends[episode - 1], 0)
        return places


class Tables:
    """The episodes of a split, shard by shard, and the counts of every shard."""

    def __init__(self, dataset: Dataset, codec: Codec, split: Split, window: int):
        self.dataset, self.window = dataset, window
        self.type = place_type(len(dataset.options))
        none = np.zeros((0, len(dataset.options)))
        codec.option_rows(dataset.options, none, none.astype(np.int64))  # raises for a new choice
        self._source = dataset, codec, split, window
        self._loaded: OrderedDict[int, _Episodes] = OrderedDict()
        self._episodes = 0
        lengths = dataset.lengths[dataset.lengths["split"] == SPLITS.index(split)]
        self.counts: dict[By, Index] = {}
        """[S] of every shard"""
        for by, each in _counts(lengths["length"], lengths["terminated"], window).items():
            self.counts[by] = np.zeros(len(dataset.shards), np.int64)
            np.add.at(self.counts[by], lengths["shard"], each * lengths["episodes"])

    def total(self, by: By, shards: Index) -> int:
        return int(self.counts[by][shards].sum())

    def find(self, by: By, shards: Index, numbers: Index) -> Array:
        """The places of `numbers` [K], which count through `shards` [s] in that order."""
        ends = np.cumsum(self.counts[by][shards])
        position = np.searchsorted(ends, numbers, "right")
        within = numbers - (ends - self.counts[by][shards])[position]
        places = np.empty(len(numbers), self.type)
        for shard, here in grouped(shards[position]):
            words(places)[here] = words(self._of(shard).at(by, within[here]))
        return places

    def _of(self, shard: int) -> _Episodes:
        episodes = self._loaded.pop(shard, None)
        if episodes is None:
            episodes = _Episodes(*self._source, shard)
            self._episodes += len(episodes.places)
            while self._loaded and self._episodes > EPISODES:
                self._episodes -= len(self._loaded.popitem(last=False)[1].places)
        self._loaded[shard] = episodes
        return episodes


class Order:
    """The windows of some shards in the order in which training sees them, epoch after epoch."""

    def __init__(
        self, tables: Tables, shards: Index, seed: int, block: int | None, salt: tuple[int, ...]
    ):
        self.tables, self.shards = tables, shards
        self._seed, self._block, self._salt = seed, block, salt
        self.windows, self.transitions, self.terminals = (
            tables.total(by, shards) for by in ("windows", "transitions", "terminals")
        )
        self._epoch = lru_cache(4)(self._shuffled)

    def _key(self, salt: int, *parts: Index | int) -> NDArray[np.uint64]:
        return key(self._seed, salt, *parts, *self._salt)

    def find(self, samples: Index) -> Array:
        """The windows of `samples` [K], counted from 0 over all epochs."""
        epochs, positions = np.divmod(samples, self.windows)
        places = np.empty(len(samples), self.tables.type)
        for epoch, block, here in self._blocks(epochs, positions):
            shards = self._shards(epoch, block)
            before = int(self._epoch(epoch)[1][block[0]]) if block else 0
            total, order = self.tables.total("windows", shards), self._key(ORDER, epoch, *block)
            numbers = permute(positions[here] - before, total, order)
            words(places)[here] = words(self.tables.find("windows", shards, numbers))
        draws = key(self._seed, SHIFT, epochs, places["hash"]) % places["shifts"].astype(np.uint64)
        shift = places["low"] + draws.astype(np.int64)
        return cut(places, places["rest"] * self.tables.window - shift, self.tables.window)

    # -- blocks: () is all shards, (b,) the block b of an epoch

    def _blocks(
        self, epochs: Index, positions: Index
    ) -> Iterator[tuple[int, tuple[int, ...], Array | slice]]:
        """The epochs and blocks of [K] samples, and the positions of the samples in each."""
        for epoch, inside in grouped(epochs):
            if self._block is None:
                yield epoch, (), inside
                continue
            here = np.arange(len(epochs))[inside]
            blocks = np.searchsorted(self._epoch(epoch)[1], positions[here], "right") - 1
            for block, some in grouped(blocks):
                yield epoch, (block,), here[some]

    def _shuffled(self, epoch: int) -> tuple[Index, Index]:
        """The shards in an epoch's order, and the first window of each block."""
        assert self._block is not None
        size = len(self.shards)
        order = self.shards[permute(np.arange(size), size, self._key(BLOCK, epoch))]
        counts = self.tables.counts["windows"][order]
        return order, (np.cumsum(counts) - counts)[:: self._block]

    def _shards(self, epoch: int, block: tuple[int, ...]) -> Index:
        if not block or self._block is None:
            return self.shards
        return self._epoch(epoch)[0][block[0] * self._block : (block[0] + 1) * self._block]

    def near(self, first: int, last: int) -> tuple[list[int], list[int]]:
        """The shards of samples `first`..`last`, and where one block holds them, those of the next
        block.
        """
        at, end = self._at(first), self._at(last)
        one = at == end
        now: list[int] = []
        while at <= end:
            epoch, block = at
            now += self._shards(epoch, (block,)).tolist()
            last_of_epoch = block + 1 == len(self._epoch(epoch)[1])
            at = (epoch + 1, 0) if last_of_epoch else (epoch, block + 1)
        return now, self._shards(at[0], (at[1],)).tolist() if one else []

    def _at(self, sample: int) -> tuple[int, int]:
        epoch, position = divmod(sample, self.windows)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], position, "right")) - 1

    def largest(self) -> int:
        """Bytes that the largest block may have, whatever shards come together."""
        sizes = sorted(map(self.tables.dataset.shard_bytes, self.shards.tolist()))
        return sum(sizes[-(self._block or len(sizes)) :])

    # -- rare events

    def draw(self, salt: int, order: Index, samples: Index) -> tuple[Array, Index, Index]:
        """Single transitions, the `order`-th [K] of a walk round and round over terminals
        (TERMINAL) or all transitions (UNIFORM), of all shards or of the block of `samples` [K].
        A block without a terminal gives its transitions. Also the numbers of both, [K].
        """
        places = np.empty(len(order), self.tables.type)
        terminals, transitions = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
        blocks: Iterable[tuple[int, tuple[int, ...], Array | slice]] = [(0, (), slice(None))]
        if self._block is not None:
            blocks = self._blocks(*np.divmod(samples, self.windows))
        for epoch, block, here in blocks:
            shards = self._shards(epoch, block)
            terminals[here] = terminal = self.tables.total("terminals", shards)
            transitions[here] = total = self.tables.total("transitions", shards)
            by: By = "transitions"
            if salt == TERMINAL and terminal:
                by, total = "terminals", terminal
            rounds, positions = np.divmod(order[here], total)
            walk = self._key(salt, rounds, *((epoch, *block) if block else ()))
            numbers = permute(positions, total, walk)
            words(places)[here] = words(self.tables.find(by, shards, numbers))
        return places, terminals, transitions


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
        numbers = np.arange(SLOTS) - np.repeat(np.cumsum(slots) - slots, slots)
        order = np.lexsort((source, (2 * numbers + 1) / (2 * slots[source])))
        self._source: Index = source[order]
        self._numbers: Index = numbers[order]

    def of(self, samples: Index) -> Iterator[tuple[int, Index | slice, Index]]:
        """Each source of [K] samples: its number, their positions, and their numbers in it."""
        if len(self._slots) == 1:
            yield 0, slice(None), samples
            return
        slot = samples % SLOTS
        source: Index = self._source[slot]
        numbers: Index = self._numbers[slot] + samples // SLOTS * self._slots[source]
        for number in np.unique(source).tolist():
            here = np.flatnonzero(source == number)
            yield number, here, numbers[here]

    def before(self, sample: int) -> list[int]:
        """How many of the samples 0..`sample`-1 each source has."""
        if len(self._slots) == 1:
            return [sample]
        rounds, slot = divmod(sample, SLOTS)
        partial = np.bincount(self._source[:slot], minlength=len(self._slots))
        counts: list[int] = (rounds * self._slots + partial).tolist()
        return counts
