"""Episodes that a collection or an evaluation has finished, in storage before the job ends.

A lane writes its episodes as it goes, a segment at a time, and confirms their steps in the ledger
afterwards:

    ROOT/runs/episodes/<dataset id>/<lane>-<number of its first episode in the lane>.npz

A segment is created exclusively and whole. It names the ledger's reservation that paid for it, so
that a process that finds a segment whose confirmation was never written can write it. A collection
that was killed goes on after the last segment of each lane; the folder is removed when the dataset
is committed.
"""

from __future__ import annotations

import heapq
import io
import json
import re
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.format.episode import Episode, Outcome
from mesocosm.data.format.manifest import ARRAYS
from mesocosm.envs.ledger import Ledger, Reservation, Usage
from mesocosm.errors import ArtifactError
from mesocosm.store.artifacts import Storage

Rows = dict[str, NDArray[Any]]
"""The arrays of `manifest.ARRAYS` of one episode, as `encode_episode` gives them."""
FOLDER = "runs/episodes"
NAME = re.compile(r"(\d+)-(\d+)\.npz")


@dataclass(frozen=True)
class Attempt:
    """One episode that was tried. `steps` were taken in reality."""

    index: int
    behaviour: str
    steps: int
    reason: str | None = None
    """Why it was dropped; None where it was not."""
    spent: str | None = None
    """The ledger's refusal that ended it, and its lane."""
    length: int | None = None
    """Transitions; None where there is no episode. The next six describe the episode, as in
    `Episode`.
    """
    seed: int = 0
    outcome: Outcome = "unfinished"
    total_reward: float = 0.0
    success: bool | None = None
    durations: bool = False
    task: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(episode: Episode, steps: int, spent: str | None) -> Attempt:
        return Attempt(
            index=episode.index,
            behaviour=episode.behaviour,
            steps=steps,
            spent=spent,
            length=len(episode),
            seed=episode.seed,
            outcome=episode.outcome,
            total_reward=episode.total_reward,
            success=episode.success,
            durations=episode.durations is not None,
            task=episode.task,
        )

    def episode(self, rows: Rows) -> Episode:
        """The episode, with its observations and actions in `rows` alone."""
        assert self.length is not None
        return Episode(
            index=self.index,
            seed=self.seed,
            behaviour=self.behaviour,
            observations=[],
            actions=[],
            rewards=rows["reward"][:-1],
            outcome=self.outcome,
            durations=rows["duration"][:-1] if self.durations else None,
            task=self.task,
            success=self.success,
        )


class Segments:
    """The segments of one collection, or of one judged policy, as one writer or reader sees them.

    `name` is their folder's under `FOLDER`.
    """

    def __init__(self, storage: Storage, name: str):
        self._storage, self.folder = storage, f"{FOLDER}/{name}"
        self._nonce = uuid.uuid4().hex

    def _path(self, lane: int, first: int) -> str:
        return f"{self.folder}/{lane:04d}-{first:08d}.npz"

    def write(
        self,
        lane: int,
        first: int,
        attempts: Sequence[Attempt],
        rows: Sequence[Rows],
        ledger: str,
        usage: Usage | None,
        beyond: tuple[int, int] = (0, 0),
    ) -> bool:
        """Store attempts of a lane, its `first`-th one and those after it; False where another
        writer's are there.

        Args:
            rows: of each attempt that has an episode, in order.
            ledger: the id of the ledger that `usage` is of.
            usage: what the attempts used of their reservation.
            beyond: (steps, resets) used of it besides, which stay reserved.
        """
        about = {
            "nonce": self._nonce,
            "attempts": [asdict(attempt) for attempt in attempts],
            "ledger": ledger,
            "usage": None if usage is None else asdict(usage),
            "beyond": beyond,
        }
        arrays: Rows = {}
        if rows:
            arrays = {name: np.concatenate([row[name] for row in rows]) for name in ARRAYS}
        buffer = io.BytesIO()
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(buffer, allow_pickle=False, **arrays)
        path = self._path(lane, first)
        if self._storage.create(path, buffer.getvalue()):
            return True
        # A remote store may answer "exists" to its own retry of this request, or an earlier try
        # stored
        # them and raised: the nonce tells.
        there, _ = self._read(path)
        return bool(there["nonce"] == self._nonce and there["attempts"] == list(attempts))

    def _read(self, path: str) -> tuple[dict[str, Any], Rows]:
        raw = self._storage.read(path)
        try:
            with np.load(io.BytesIO(raw or b""), allow_pickle=False) as file:
                about: dict[str, Any] = json.loads(file["about"].tobytes())
                arrays = {name: file[name] for name in ARRAYS if name in file}
                about["attempts"] = [Attempt(**attempt) for attempt in about["attempts"]]
                return about, arrays
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                f"{self._storage.url(path)} is damaged; remove it and those after it of the same"
                " lane, and run the job again: it runs their episodes again"
            ) from error

    def _firsts(self, lane: int) -> list[int]:
        matches = (NAME.fullmatch(name) for name in self._storage.list(self.folder))
        return sorted(int(match[2]) for match in matches if match and int(match[1]) == lane)

    def attempts(self, lane: int, start: int, ledger: Ledger) -> list[Attempt]:
        """The attempts of a lane from its `start`-th on, whose steps are confirmed where they were
        not yet.
        """
        return [
            attempt
            for about, _ in self._confirmed(lane, start, ledger)
            for attempt in about["attempts"]
        ]

    def recorded(self, lane: int, start: int, ledger: Ledger) -> list[tuple[Attempt, Rows | None]]:
        """As `attempts`, with the rows of each attempt that has an episode."""
        return [
            pair for segment in self._confirmed(lane, start, ledger) for pair in _pairs(*segment)
        ]

    def _confirmed(
        self, lane: int, start: int, ledger: Ledger
    ) -> Iterator[tuple[dict[str, Any], Rows]]:
        """What `_read` gives of each segment. Confirms its steps first."""
        tried = start
        waiting = {reservation.number for reservation in ledger.totals().unconfirmed}
        payers = {ledger.id: ledger}
        for first in self._firsts(lane):
            if first != tried:
                continue
            about, arrays = self._read(self._path(lane, first))
            tried += len(about["attempts"])
            usage = about["usage"]
            if usage is not None:
                number = usage["reservation"]["number"]
                payer = payers.setdefault(about["ledger"], Ledger(self._storage, about["ledger"]))
                if payer is not ledger or number in waiting:
                    payer.confirm(
                        Reservation(**usage["reservation"]),
                        usage["steps"],
                        usage["resets"],
                        usage["seconds"],
                        keep=tuple(about["beyond"]),
                    )
            yield about, arrays

    def episodes(self, lanes: int) -> Iterator[tuple[Episode, Rows]]:
        """All episodes in the order of their indices, one segment of each lane in memory at a time."""
        yield from heapq.merge(*map(self._lane, range(lanes)), key=lambda pair: pair[0].index)

    def _lane(self, lane: int) -> Iterator[tuple[Episode, Rows]]:
        tried = 0
        for first in self._firsts(lane):
            if first != tried:
                continue
            about, arrays = self._read(self._path(lane, first))
            tried += len(about["attempts"])
            for attempt, rows in _pairs(about, arrays):
                if rows is not None:
                    yield attempt.episode(rows), rows

    def forget(self, lane: int, firsts: Iterable[int]) -> None:
        """Remove segments of a lane."""
        for first in firsts:
            self._storage.remove(self._path(lane, first))

    def remove(self) -> None:
        """Remove all segments: what they are of is committed."""
        self._storage.remove(self.folder)


def _pairs(about: dict[str, Any], arrays: Rows) -> Iterator[tuple[Attempt, Rows | None]]:
    """The attempts of a segment, each with its rows where it has an episode."""
    start = 0
    for attempt in about["attempts"]:
        if attempt.length is None:
            yield attempt, None
            continue
        stop = start + attempt.length + 1
        yield attempt, {name: array[start:stop] for name, array in arrays.items()}
        start = stop
