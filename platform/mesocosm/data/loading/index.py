"""Where samples lie: sample number -> shard, episode, first transition. What is kept of a dataset
are a few integers a shard, and the episodes of the shards that were looked at last.

Order. Without blocks an epoch is one keyed permutation of all windows. With blocks of B shards it
is a keyed permutation of the shards, cut into blocks of B, and a keyed permutation of the windows
within each block: at a sample only its block must be on this machine, and the next is known. The
shards of a block are others in every epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.format.dataset import Dataset, Split, grouped
from mesocosm.data.format.manifest import OUTCOMES, SPLITS
from mesocosm.data.format.permutation import key, permute
from mesocosm.data.loading.codec import Codec

Index = NDArray[np.int64]
By = Literal["windows", "transitions", "terminals", "cuts"]
"""What may be counted: training's windows, single transitions, terminals, and the windows that
evaluation cuts from each episode's start.
"""
ORDER, SHIFT, TERMINAL, UNIFORM, BLOCK, SAMPLE = 1, 2, 3, 4, 5, 6
"""Salts of the independent draws."""
EPISODES = 1 << 20
"""That are kept in memory, some 100 bytes each; of one shard all are."""
LENGTH, FIRST_ROW, HASH, LOW, SHIFTS = range(5)


@dataclass(frozen=True)
class Found:
    """K episodes, and where within them."""

    shards: Index
    """[K]"""
    facts: Index
    """[K, 5]: LENGTH in transitions, FIRST_ROW within the shard, HASH, and the windows' least shift
    (LOW) and number of SHIFTS
    """
    options: NDArray[np.float64]
    """[K, k] of `Codec.option_rows`"""
    rest: Index
    """[K] windows, or transitions, before it in the episode; of a terminal its own transition"""


def merged(size: int, parts: Sequence[tuple[Index | slice, Found]]) -> Found:
    """Parts of a whole of `size`, each with where it goes."""
    if len(parts) == 1:
        return parts[0][1]
    first = parts[0][1]
    whole = Found(
        *(np.empty((size, *value.shape[1:]), value.dtype) for value in vars(first).values())
    )
    for here, part in parts:
        for into, value in zip(vars(whole).values(), vars(part).values(), strict=True):
            into[here] = value
    return whole


class _Episodes:
    """A split's episodes in a shard."""

    def __init__(self, dataset: Dataset, codec: Codec, split: Split, window: int, shard: int):
        records = dataset.records(shard)
        chosen = np.flatnonzero(records["split"] == SPLITS.index(split))
        table = records[chosen]
        length: Index = table["length"].astype(np.int64)
        counts, low, shifts = tiles(length, window)
        self.facts: Index = np.stack(
            [
                length,
                table["first_row"].astype(np.int64),
                table["hash"].astype(np.int64),
                low,
                shifts,
            ],
            1,
        )
        self.options = codec.option_rows(dataset.options, *dataset.shard_options(shard))[chosen]
        self._terminals = np.flatnonzero(table["outcome"] == OUTCOMES.index("terminated"))
        self._counts = {"windows": counts, "transitions": length, "cuts": -(-length // window)}
        self._ends = {by: np.cumsum(each) for by, each in self._counts.items()}

    def at(self, by: By, numbers: Index) -> tuple[Index, Index]:
        """The episode that each number falls into, and what is left of the number there."""
        if by == "terminals":
            episode = self._terminals[numbers]
            return episode, self.facts[episode, LENGTH] - 1
        episode = np.searchsorted(self._ends[by], numbers, "right")
        return episode, numbers - (self._ends[by] - self._counts[by])[episode]


class Tables:
    """The episodes of a split, shard by shard, and of every shard how many there are."""

    def __init__(self, dataset: Dataset, codec: Codec, split: Split, window: int):
        self.dataset, self.codec, self._split, self._window = dataset, codec, split, window
        none = np.zeros((0, len(dataset.options)))
        codec.option_rows(
            dataset.options, none, none.astype(np.int64)
        )  # raises for a choice that the codec does not know
        self._kept: OrderedDict[int, _Episodes] = OrderedDict()
        self._episodes = 0
        some = dataset.lengths[dataset.lengths["split"] == SPLITS.index(split)]
        length, episodes = some["length"], some["episodes"]
        each: dict[By, Index] = {
            "windows": tiles(length, window)[0] * episodes,
            "transitions": length * episodes,
            "terminals": some["terminated"] * episodes,
            "cuts": -(-length // window) * episodes,
        }
        self.counts: dict[By, Index] = {by: np.zeros(len(dataset.shards), np.int64) for by in each}
        """[S] of every shard"""
        for by, numbers in each.items():
            np.add.at(self.counts[by], some["shard"], numbers)

    def find(self, by: By, shards: Index, ends: Index, numbers: Index) -> Found:
        """`numbers` [K] count what there is in `shards` [s] in that order, of which `ends` [s] are
        the cumulated counts.
        """
        position = np.searchsorted(ends, numbers, "right")
        chosen = shards[position]
        within = numbers - (ends - self.counts[by][shards])[position]
        facts, rest = np.empty((len(numbers), 5), np.int64), np.empty(len(numbers), np.int64)
        options = np.empty((len(numbers), len(self.dataset.options)))
        for shard, here in grouped(chosen):
            of = self._of(shard)
            episode, rest[here] = of.at(by, within[here])
            facts[here], options[here] = of.facts[episode], of.options[episode]
        return Found(chosen, facts, options, rest)

    def _of(self, shard: int) -> _Episodes:
        found = self._kept.pop(shard, None)
        if found is None:
            found = _Episodes(self.dataset, self.codec, self._split, self._window, shard)
            self._episodes += len(found.facts)
            while self._kept and self._episodes > EPISODES:
                self._episodes -= len(self._kept.popitem(last=False)[1].facts)
        self._kept[shard] = found
        return found


class Order:
    """The windows of some shards in the order in which training sees them, epoch after epoch."""

    def __init__(
        self,
        tables: Tables,
        shards: Index,
        seed: int,
        block: int | None,
        salt: tuple[int, ...] = (),
    ):
        self.tables, self._seed, self._block, self._salt = tables, seed, block, salt
        self.shards = shards
        self.windows, self.transitions, self.terminals = (
            int(tables.counts[by][shards].sum()) for by in ("windows", "transitions", "terminals")
        )
        self._epochs: OrderedDict[int, tuple[Index, Index]] = OrderedDict()

    def find(self, samples: Index) -> tuple[Found, Index]:
        """`samples` [K], counted from 0 over all epochs -> their episodes, and the shift [K] that
        their windows have there.
        """
        epochs, positions = np.divmod(samples, self.windows)
        if self._block is None:
            numbers = permute(positions, self.windows, self._key(ORDER, epochs))
            found = self.tables.find(
                "windows",
                self.shards,
                np.cumsum(self.tables.counts["windows"][self.shards]),
                numbers,
            )
        else:
            found = self._find_in_blocks(epochs, positions)
        draws = key(self._seed, SHIFT, epochs, found.facts[:, HASH])
        shift = found.facts[:, LOW] + (draws % found.facts[:, SHIFTS].astype(np.uint64)).astype(
            np.int64
        )
        return found, shift

    def _find_in_blocks(self, epochs: Index, positions: Index) -> Found:
        parts: list[tuple[Index | slice, Found]] = []
        for epoch, block, here in self._blocks(epochs, positions):
            ends = self._epoch(epoch)[1]
            before = int(ends[block - 1]) if block else 0
            total = int(ends[block]) - before
            numbers = permute(positions[here] - before, total, self._key(ORDER, epoch, block))
            parts.append(
                (here, self.tables.find("windows", *self._within(epoch, block, "windows"), numbers))
            )
        return merged(len(positions), parts)

    def _blocks(self, epochs: Index, positions: Index) -> Iterator[tuple[int, int, Index]]:
        """[K] samples -> each epoch and block that some of them lie in, and where these stand."""
        for epoch in np.unique(epochs).tolist():
            inside = np.flatnonzero(epochs == epoch)
            for block, which in grouped(
                np.searchsorted(self._epoch(epoch)[1], positions[inside], "right")
            ):
                yield epoch, block, inside[which]

    def _key(self, salt: int, *parts: Index | int) -> NDArray[np.uint64]:
        return key(self._seed, salt, *parts, *self._salt)

    # -- blocks
    # --------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> tuple[Index, Index]:
        """The shards in an epoch's order, and the last window of each block, plus one."""
        if (found := self._epochs.get(epoch)) is None:
            assert self._block is not None
            order = self.shards[
                permute(np.arange(len(self.shards)), len(self.shards), self._key(BLOCK, epoch))
            ]
            last = (
                np.minimum(
                    np.arange(self._block, len(order) + self._block, self._block), len(order)
                )
                - 1
            )
            found = self._epochs[epoch] = (
                order,
                np.cumsum(self.tables.counts["windows"][order])[last],
            )
            if len(self._epochs) > 4:
                self._epochs.popitem(last=False)
        return found

    def _shards(self, epoch: int, block: int) -> Index:
        assert self._block is not None
        return self._epoch(epoch)[0][block * self._block : (block + 1) * self._block]

    def _within(self, epoch: int, block: int, by: By) -> tuple[Index, Index]:
        shards = self._shards(epoch, block)
        return shards, np.cumsum(self.tables.counts[by][shards])

    def _at(self, sample: int) -> tuple[int, int]:
        """The epoch and block of a sample."""
        epoch, position = divmod(sample, self.windows)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], position, "right"))

    def near(self, first: int, last: int) -> tuple[list[int], list[int]]:
        """The shards that samples `first`..`last` lie in, and those of the block after, where they
        lie in one block.
        """
        at, end = self._at(first), self._at(last)
        now: list[int] = []
        one = at == end
        while at <= end:
            now += self._shards(*at).tolist()
            at = (at[0], at[1] + 1) if at[1] + 1 < len(self._epoch(at[0])[1]) else (at[0] + 1, 0)
        return now, self._shards(*at).tolist() if one else []

    def largest(self) -> int:
        """Bytes that the largest block may have, whatever shards come together."""
        sizes = sorted(map(self.tables.dataset.shard_bytes, self.shards.tolist()))
        return sum(sizes[-(self._block or len(sizes)) :])

    # -- rare events
    # ---------------------------------------------------------------------------------------------

    def draw(self, salt: int, order: Index, samples: Index) -> tuple[Found, Index, Index]:
        """The `order`-th [K] of a walk round and round, over terminals (TERMINAL) or all
        transitions (UNIFORM), of all shards or of the block that each of `samples` [K] lies in.
        Without a terminal there, over its transitions. Also [K]: how many terminals and transitions
        there are.
        """
        counts, parts = self.tables.counts, list[tuple[Index | slice, Found]]()
        terminals, transitions = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
        blocks: Iterable[tuple[Any, ...]] = [(slice(None),)]
        if self._block is not None:
            blocks = self._blocks(*np.divmod(samples, self.windows))
        for *where, here in blocks:
            shards = self._shards(*where) if where else self.shards
            terminals[here], transitions[here] = (
                int(counts[by][shards].sum()) for by in ("terminals", "transitions")
            )
            by: By = (
                "terminals"
                if salt == TERMINAL and counts["terminals"][shards].any()
                else "transitions"
            )
            total = int(counts[by][shards].sum())
            rounds, positions = np.divmod(order[here], total)
            numbers = permute(positions, total, self._key(salt, rounds, *where))
            parts.append(
                (here, self.tables.find(by, shards, np.cumsum(counts[by][shards]), numbers))
            )
        return merged(len(order), parts), terminals, transitions


def tiles(length: NDArray[np.int64], window: int) -> tuple[Index, Index, Index]:
    """How episodes of `length` [n] transitions are cut: how many windows each, the least shift, and
    of how many shifts one is drawn.
    """
    least = -(-length // window)
    spare = least * window - length
    more = (least > 1) & (window - 1 - spare > spare + 1)
    low = np.where(more, spare + 1, 0)
    shifts = np.where(more, window - 1 - spare, np.where(least > 1, spare + 1, 1))
    return least + more, low, shifts
