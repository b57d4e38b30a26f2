"""Segments: finished episodes of a collection or an evaluation, stored before the job ends.

A lane writes its episodes a segment at a time and confirms their steps in the ledger afterwards:

    ROOT/runs/episodes/<dataset id>/<lane>-<number of its first episode in the lane>.npz

A segment is created exclusively and whole. It names the reservation that paid for it, so that its
reader can write a missing confirmation. A killed collection continues after the last segment of
each lane. The folder is removed when the dataset is committed.
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

from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.datasets.images import images_of, pack_frames, unpack_frames
from mesocosm.datasets.manifest import ARRAYS
from mesocosm.datasets.texts import TEXTS, pack, unpack
from mesocosm.envs.amounts import NOTHING, Amount, Reservation, Usage
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import ArtifactError
from mesocosm.store.artifacts import Storage

Rows = dict[str, NDArray[Any]]
"""The arrays of `manifest.ARRAYS` and `texts.TEXTS` and the frames of one episode, as
`encode_episode` returns them.
"""
FOLDER = "runs/episodes"
NAME = re.compile(r"(\d+)-(\d+)\.npz")
SHARED = ("index", "behaviour", "seed", "outcome", "success", "task")
"""Fields that an attempt has in common with its episode"""


@dataclass(frozen=True)
class Attempt:
    """One attempted episode, which took `steps` real steps."""

    index: int
    behaviour: str
    steps: int
    reason: str | None = None
    """The reason why the episode was dropped, or None."""
    spent: str | None = None
    """The ledger's refusal that ended it, and its lane."""
    length: int | None = None
    """Transitions; None where there is no episode. This and the rest are fields of `Episode`."""
    seed: int = 0
    outcome: Outcome = "unfinished"
    total_reward: float = 0.0
    success: bool | None = None
    durations: bool = False
    task: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(episode: Episode, steps: int, spent: str | None) -> Attempt:
        """An attempt that gave an episode."""
        return Attempt(
            steps=steps,
            spent=spent,
            length=len(episode),
            total_reward=episode.total_reward,
            durations=episode.durations is not None,
            **{name: getattr(episode, name) for name in SHARED},
        )

    def episode(self, rows: Rows) -> Episode:
        """The episode without observations and actions, which only `rows` holds."""
        return Episode(
            observations=[],
            actions=[],
            rewards=rows["reward"][:-1],
            durations=rows["duration"][:-1] if self.durations else None,
            **{name: getattr(self, name) for name in SHARED},
        )


@dataclass(frozen=True)
class _Segment:
    """The content of one file."""

    nonce: str
    """Random name of the writer."""
    attempts: list[Attempt]
    ledger: str
    usage: Usage | None
    beyond: Amount
    arrays: Rows
    """The rows of all episodes, concatenated."""

    def pairs(self) -> Iterator[tuple[Attempt, Rows | None]]:
        """The attempts, each with its rows where it has an episode."""
        start = 0
        for attempt in self.attempts:
            rows = None
            if attempt.length is not None:
                stop = start + attempt.length + 1
                rows = {name: array[start:stop] for name, array in self.arrays.items()}
                start = stop
            yield attempt, rows


class Segments:
    """The segments in `FOLDER/name`: of one collection, or of one judged policy."""

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
        beyond: Amount = NOTHING,
    ) -> bool:
        """Store the attempts of a lane from its `first`-th on.

        Args:
            rows: The rows of each attempt that has an episode, in order.
            ledger: The id of the ledger of `usage`, the attempts' part of their reservation.
            beyond: Further use of the same reservation, which stays reserved.

        Returns:
            False where another writer has stored them.
        """
        about = {
            "nonce": self._nonce,
            "attempts": [asdict(attempt) for attempt in attempts],
            "ledger": ledger,
            "usage": None if usage is None else asdict(usage),
            "beyond": asdict(beyond),
        }
        arrays: Rows = {}
        if rows:
            arrays = {name: np.concatenate([row[name] for row in rows]) for name in ARRAYS}
            for name in TEXTS:
                texts = pack(np.concatenate([row[name] for row in rows]))
                arrays[name], arrays[f"{name}_ends"] = texts
            for name in images_of(rows[0]):
                arrays |= pack_frames(name, [row[name] for row in rows])
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        path = self._path(lane, first)
        if self._storage.create(path, buffer.getvalue()):
            return True
        # A remote store may refuse its client's own repetition of this request, or an earlier
        # attempt stored them and raised: the nonce tells.
        stored = self._read(path)
        return stored.nonce == self._nonce and stored.attempts == list(attempts)

    def _read(self, path: str) -> _Segment:
        raw = self._storage.read(path)
        try:
            with np.load(io.BytesIO(raw or b""), allow_pickle=False) as file:
                about: dict[str, Any] = json.loads(file["about"].tobytes())
                about["attempts"] = [Attempt(**attempt) for attempt in about["attempts"]]
                if (usage := about["usage"]) is not None:
                    reservation = Reservation(**usage["reservation"])
                    about["usage"] = Usage(**{**usage, "reservation": reservation})
                about["beyond"] = Amount(**about["beyond"])
                arrays = {name: file[name] for name in ARRAYS if name in file}
                for name in TEXTS:
                    if name in file:
                        arrays[name] = unpack(file[name], file[f"{name}_ends"])
                arrays |= unpack_frames(file)
                return _Segment(**about, arrays=arrays)
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                f"{self._storage.url(path)} is damaged; remove it and those after it of the same"
                " lane, and run the job again: it runs their episodes again"
            ) from error

    def _lane(self, lane: int, start: int = 0) -> Iterator[_Segment]:
        """The contiguous segments of a lane from its `start`-th attempt on."""
        matches = (NAME.fullmatch(name) for name in self._storage.list(self.folder))
        for first in sorted(int(match[2]) for match in matches if match and int(match[1]) == lane):
            if first == start:
                segment = self._read(self._path(lane, first))
                start += len(segment.attempts)
                yield segment

    def attempts(self, lane: int, start: int, ledger: Ledger) -> list[Attempt]:
        """The attempts of a lane from its `start`-th on. Confirms their steps where that was not
        done.
        """
        return [attempt for attempt, _ in self.recorded(lane, start, ledger)]

    def recorded(
        self, lane: int, start: int, ledger: Ledger
    ) -> Iterator[tuple[Attempt, Rows | None]]:
        """Like `attempts`, with the rows of each attempt that has an episode."""
        unconfirmed = {reservation.number for reservation in ledger.totals().unconfirmed}
        ledgers = {ledger.id: ledger}
        for segment in self._lane(lane, start):
            if (usage := segment.usage) is not None:
                if segment.ledger not in ledgers:
                    ledgers[segment.ledger] = Ledger(self._storage, segment.ledger)
                if segment.ledger != ledger.id or usage.reservation.number in unconfirmed:
                    ledgers[segment.ledger].confirm(usage, keep=segment.beyond)
            yield from segment.pairs()

    def episodes(self, lanes: int) -> Iterator[tuple[Episode, Rows]]:
        """All episodes in the order of their indices, with one segment of each lane in memory."""

        def of_lane(lane: int) -> Iterator[tuple[Episode, Rows]]:
            for segment in self._lane(lane):
                for attempt, rows in segment.pairs():
                    if rows is not None:
                        yield attempt.episode(rows), rows

        yield from heapq.merge(*map(of_lane, range(lanes)), key=lambda pair: pair[0].index)

    def forget(self, lane: int, firsts: Iterable[int]) -> None:
        """Remove segments of a lane."""
        for first in firsts:
            self._storage.remove(self._path(lane, first))

    def remove(self) -> None:
        """Remove all segments, once their artifact is committed."""
        self._storage.remove(self.folder)
