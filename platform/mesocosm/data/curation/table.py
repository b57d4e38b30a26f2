"""The episodes that are kept so far, and the account of every transition that was dropped.

For every operation: in + put back = dropped + kept, in episodes and in transitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.curation.scan import Measure, Scan
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import OUTCOMES, SPLITS
from mesocosm.datasets.permutation import key

Array = NDArray[Any]
TRAIN, VALID = SPLITS.index("train"), SPLITS.index("valid")
EXAMPLES = 3
"""Episodes that the report names for each reason."""


@dataclass
class Event:
    """Episodes that an operation dropped, cut short or put back, for one reason."""

    operation: int
    """Position in the list, from 1"""
    op: str
    kind: str
    """dropped | cut | put back"""
    reason: str
    episodes: Array
    transitions: Array
    """[n] dropped, or put back"""
    of: Array | None = None
    """[n] the episodes that these are copies of"""


class EpisodeTable:
    """All episodes of the inputs: E of them."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        table = dataset.table
        self.retained: Array = np.ones(len(table), bool)
        """[E] bool"""
        self.length: Array = table["length"].astype(np.int64)
        """[E] transitions of the episode that are kept."""
        self.split: Array = table["split"].astype(np.uint8)
        """[E] positions in SPLITS"""
        self.by: Array = np.zeros(len(table), np.int16)
        """[E] the operation that dropped the episode; 0 if it is kept."""
        self.events: list[Event] = []

    @property
    def cut(self) -> Array:
        """[E] bool: the end is dropped"""
        return np.asarray(self.length < self.dataset.table["length"])

    def outcome(self) -> Array:
        """[E] positions in OUTCOMES; an episode that was cut is unfinished."""
        return np.where(self.cut, OUTCOMES.index("unfinished"), self.dataset.table["outcome"])

    def success(self) -> Array:
        """[E] 1, 0, or -1 where it is unknown or the episode was cut."""
        return np.where(self.cut, -1, self.dataset.table["success"].astype(np.int64))

    def size(self, episodes: Array | None = None) -> dict[str, int]:
        chosen = np.flatnonzero(self.retained) if episodes is None else episodes
        return {"episodes": len(chosen), "transitions": int(self.length[chosen].sum())}

    def sizes(self, chosen: Array | None = None) -> dict[str, dict[str, int]]:
        """The sizes of the kept episodes, or of `chosen` [E] bool, by split."""
        chosen = self.retained if chosen is None else chosen
        splits = enumerate(SPLITS)
        return {name: self.size(np.flatnonzero(chosen & (self.split == i))) for i, name in splits}

    def name(self, episode: int) -> str:
        """A readable name, dataset and index: `ab12/37`."""
        index = int(self.dataset.table["index"][episode])
        return f"{self.dataset.ids[int(self.dataset.part[episode])]}/{index}"


class Operation:
    """An operation: a dataclass, whose fields are its parameters."""

    def check(self) -> None:
        """Raise UsageError where parameters do not agree."""

    def run(self, step: Step) -> None:
        """Drop, cut, put back or hold out. Raises UsageError where the data lack a value."""
        raise NotImplementedError


class Step:
    """One operation at work on the table."""

    def __init__(self, table: EpisodeTable, scan: Scan, number: int, op: str):
        self.table, self.dataset, self.number, self.op = table, table.dataset, number, op
        self._scan = scan
        self._events: list[Event] = []
        self._before, self._split = table.size(), table.split.copy()
        self.notes: list[str] = []

    def episodes(self, split: int | None = None) -> Array:
        """The kept episodes, ascending, [n]."""
        retained = self.table.retained
        return np.flatnonzero(retained if split is None else retained & (self.table.split == split))

    def measure(self, measure: Measure, episodes: Array) -> dict[str, Array]:
        return self._scan(measure, episodes, self.table.length[episodes])

    def drawn(self, episodes: Array, salt: int) -> Array:
        """`episodes` in an order drawn by the seed; the order of two does not depend on others."""
        keys = key(self.table.seed, salt, self.dataset.table["hash"][episodes])
        return episodes[np.argsort(keys, kind="stable")]

    def drop(self, episodes: Array, reason: str, of: Array | None = None) -> None:
        """Drop episodes; `of`: the episodes that these are copies of."""
        if len(episodes):
            self.table.retained[episodes] = False
            self.table.by[episodes] = self.number
            self._add("dropped", reason, episodes, self.table.length[episodes], of)

    def cut(self, episodes: Array, lengths: Array, reason: str) -> None:
        """Keep the first `lengths` transitions of each; an episode of 0 is dropped."""
        empty = lengths < 1
        self.drop(episodes[empty], reason)
        episodes, lengths = episodes[~empty], lengths[~empty]
        if len(episodes):
            self._add("cut", reason, episodes, self.table.length[episodes] - lengths)
            self.table.length[episodes] = lengths

    def put_back(self, episodes: Array, reason: str) -> None:
        if len(episodes):
            self.table.retained[episodes] = True
            self.table.by[episodes] = 0
            self._add("put back", reason, episodes, self.table.length[episodes])

    def hold_out(self, episodes: Array) -> None:
        """Hold these kept episodes out for validation, and train on all others."""
        self.table.split[self.table.retained] = TRAIN
        self.table.split[episodes] = VALID

    def _add(
        self, kind: str, reason: str, episodes: Array, transitions: Array, of: Array | None = None
    ) -> None:
        self._events.append(Event(self.number, self.op, kind, reason, episodes, transitions, of))

    def close(self, params: dict[str, Any]) -> dict[str, Any]:
        """Add the events to the table's account. Returns the operation's part of the report."""
        self.table.events += self._events
        return {
            "operation": self.number,
            "op": self.op,
            "params": params,
            "in": self._before,
            "put_back": self._total("put back"),
            "dropped": self._total("dropped", "cut"),
            "cut": sum(len(event.episodes) for event in self._events if event.kind == "cut"),
            "moved_to": self.table.sizes(self.table.retained & (self.table.split != self._split)),
            "kept": self.table.size(),
            "splits": self.table.sizes(),
            "reasons": [self._reason(event) for event in self._events],
            "notes": self.notes,
        }

    def _total(self, *kinds: str) -> dict[str, int]:
        """Episodes that are whole, and all transitions."""
        events = [event for event in self._events if event.kind in kinds]
        return {
            "episodes": sum(len(event.episodes) for event in events if event.kind != "cut"),
            "transitions": sum(int(event.transitions.sum()) for event in events),
        }

    def _reason(self, event: Event) -> dict[str, Any]:
        examples = [self.table.name(int(episode)) for episode in event.episodes[:EXAMPLES]]
        if event.of is not None:
            originals = [self.table.name(int(episode)) for episode in event.of[:EXAMPLES]]
            examples = [f"{a} of {b}" for a, b in zip(examples, originals, strict=True)]
        return {
            "what": event.kind,
            "reason": event.reason,
            "episodes": len(event.episodes),
            "transitions": int(event.transitions.sum()),
            "first": examples,
        }
