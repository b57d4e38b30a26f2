"""What is kept of the episodes so far, and the account of every transition that went: by which
operation, for what reason.

Memory is a few numbers an episode. For every operation: in + put back = dropped + kept, in episodes
and in transitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.curation.scan import Measure, Scan
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.manifest import OUTCOMES, SPLITS
from mesocosm.data.format.permutation import key

Array = NDArray[Any]
TRAIN, VALID = SPLITS.index("train"), SPLITS.index("valid")
FIRST = 3
"""Examples of each reason in the report."""


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
    """[n] that went; of what was put back, that came"""
    of: Array | None = None
    """[n] the episodes that these are copies of"""


@dataclass
class Table:
    """All episodes of the inputs: E of them."""

    dataset: Dataset
    seed: int
    kept: Array = field(init=False)
    """[E] bool"""
    length: Array = field(init=False)
    """[E] transitions that are left of it"""
    split: Array = field(init=False)
    """[E] positions in SPLITS"""
    by: Array = field(init=False)
    """[E] the operation that dropped it, 0 for none"""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        table = self.dataset.table
        self.kept = np.ones(len(table), bool)
        self.length = table["length"].astype(np.int64)
        self.split = table["split"].astype(np.uint8)
        self.by = np.zeros(len(table), np.int16)

    @property
    def cut(self) -> Array:
        """[E] bool: not all of it is left"""
        return np.asarray(self.length < self.dataset.table["length"])

    def outcome(self) -> Array:
        """[E] positions in OUTCOMES; what was cut is unfinished."""
        return np.where(self.cut, OUTCOMES.index("unfinished"), self.dataset.table["outcome"])

    def success(self) -> Array:
        """[E] 1, 0, or -1 where it is not said or the episode was cut."""
        return np.where(self.cut, -1, self.dataset.table["success"].astype(np.int64))

    def size(self, episodes: Array | None = None) -> dict[str, int]:
        chosen = np.flatnonzero(self.kept) if episodes is None else episodes
        return {"episodes": len(chosen), "transitions": int(self.length[chosen].sum())}

    def sizes(self) -> dict[str, dict[str, int]]:
        """By split."""
        return {
            name: self.size(np.flatnonzero(self.kept & (self.split == i)))
            for i, name in enumerate(SPLITS)
        }

    def name(self, episode: int) -> str:
        """For people: `ab12/37`, dataset and index."""
        return f"{self.dataset.ids[int(self.dataset.part[episode])]}/{int(self.dataset.table['index'][episode])}"


class Step:
    """One operation at work on the table."""

    def __init__(self, table: Table, scan: Scan, number: int, op: str):
        self.table, self.number, self.op = table, number, op
        self._scan = scan
        self._events: list[Event] = []
        self._before, self._split = table.size(), table.split.copy()
        self.notes: list[str] = []

    # -- what there is
    # -------------------------------------------------------------------------------------------

    @property
    def dataset(self) -> Dataset:
        return self.table.dataset

    def episodes(self, split: int | None = None) -> Array:
        """Those that are kept, ascending, [n]."""
        return np.flatnonzero(
            self.table.kept if split is None else self.table.kept & (self.table.split == split)
        )

    def measure(self, measure: Measure, episodes: Array) -> dict[str, Array]:
        return self._scan(measure, episodes, self.table.length[episodes])

    def drawn(self, episodes: Array, salt: int) -> Array:
        """`episodes` in an order that the seed draws: of each pair the order does not depend on
        what else there is.
        """
        return episodes[
            np.argsort(
                key(self.table.seed, salt, self.dataset.table["hash"][episodes]), kind="stable"
            )
        ]

    # -- what is done
    # --------------------------------------------------------------------------------------------

    def drop(self, episodes: Array, reason: str, of: Array | None = None) -> None:
        """`of`: the episodes that these are copies of."""
        if len(episodes):
            assert self.table.kept[episodes].all()
            self.table.kept[episodes] = False
            self.table.by[episodes] = self.number
            self._add("dropped", reason, episodes, self.table.length[episodes].copy(), of)

    def cut(self, episodes: Array, lengths: Array, reason: str) -> None:
        """Keep the first `lengths` transitions of each; of none left, it is dropped."""
        empty = lengths < 1
        self.drop(episodes[empty], reason)
        episodes, lengths = episodes[~empty], lengths[~empty]
        if len(episodes):
            self._add("cut", reason, episodes, self.table.length[episodes] - lengths)
            self.table.length[episodes] = lengths

    def put_back(self, episodes: Array, reason: str) -> None:
        if len(episodes):
            assert not self.table.kept[episodes].any()
            self.table.kept[episodes] = True
            self.table.by[episodes] = 0
            self._add("put back", reason, episodes, self.table.length[episodes].copy())

    def hold_out(self, episodes: Array) -> None:
        """These of those kept are for validation, all others to train on."""
        self.table.split[self.table.kept] = TRAIN
        self.table.split[episodes] = VALID

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _add(
        self, kind: str, reason: str, episodes: Array, transitions: Array, of: Array | None = None
    ) -> None:
        self._events.append(Event(self.number, self.op, kind, reason, episodes, transitions, of))

    # -- what was done
    # -------------------------------------------------------------------------------------------

    def close(self, params: dict[str, Any]) -> dict[str, Any]:
        """Into the table's account; the operation's part of the report."""
        self.table.events += self._events
        moved = np.flatnonzero(self.table.kept & (self.table.split != self._split))
        return {
            "operation": self.number,
            "op": self.op,
            "params": params,
            "in": self._before,
            "put_back": _total(self._events, "put back"),
            "dropped": _total(self._events, "dropped", "cut"),
            "cut": sum(len(event.episodes) for event in self._events if event.kind == "cut"),
            "moved_to": {
                name: self.table.size(moved[self.table.split[moved] == i])
                for i, name in enumerate(SPLITS)
            },
            "kept": self.table.size(),
            "splits": self.table.sizes(),
            "reasons": [self._reason(event) for event in self._events],
            "notes": self.notes,
        }

    def _reason(self, event: Event) -> dict[str, Any]:
        first = [self.table.name(int(episode)) for episode in event.episodes[:FIRST]]
        if event.of is not None:
            first = [
                f"{name} of {self.table.name(int(of))}"
                for name, of in zip(first, event.of, strict=False)
            ]
        found = {
            "what": event.kind,
            "reason": event.reason,
            "episodes": len(event.episodes),
            "transitions": int(event.transitions.sum()),
            "first": first,
        }
        return found


def _total(events: Sequence[Event], *kinds: str) -> dict[str, int]:
    """What went whole is counted in episodes; transitions are those of cut ones, too."""
    return {
        "episodes": sum(
            len(event.episodes) for event in events if event.kind in kinds and event.kind != "cut"
        ),
        "transitions": sum(int(event.transitions.sum()) for event in events if event.kind in kinds),
    }
