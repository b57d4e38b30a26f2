"""Leases: one process at a time makes an artifact.

    ROOT/leases/<kind>.<id>.NNNNNNNN.json    who holds it, and a heartbeat; the highest number counts

A lease is taken by creating the next number exclusively. Its holder counts up its heartbeat every BEAT_S seconds and
removes the file when it is done. A lease is stale, and the next number may be taken, where its process is gone (on the
same host), or its heartbeat has stopped (on another host).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from mesocosm.errors import MesocosmError, StorageError
from mesocosm.owner import Owner, this_process
from mesocosm.storage import Storage

FOLDER = "leases"
BEAT_S = 10.0
"""Seconds between two heartbeats."""
STALE_S = 60.0
"""A holder on another host that was silent for so long is watched for SILENT_BEATS beats, whatever its clock says, and has then lost its lease."""
SILENT_BEATS = 3
POLL_S = 1.0


class Held(MesocosmError):
    """Another process makes the artifact."""


@dataclass(frozen=True)
class Record:
    """One lease's file."""

    owner: Owner
    job: str
    since: float
    """Seconds since the epoch, as is `time`."""
    beat: int = 0
    time: float = 0.0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def parse(raw: bytes) -> Record | None:
        """None where the file is not a lease's: its writer wrote none of it, and nobody holds it."""
        try:
            values = json.loads(raw)
            return Record(**{**values, "owner": Owner(**values["owner"])})
        except (ValueError, TypeError, KeyError):
            return None


class Lease:
    """One artifact's lease."""

    def __init__(self, storage: Storage, name: str, job: str, say: Callable[[str], None]):
        self.name, self._storage, self._say = name, storage, say
        self._prefix = f"{name.replace('/', '.')}."
        now = time.time()
        self._record = Record(this_process(), job, now, 0, now)
        self._number: int | None = None
        self._ended = threading.Event()

    def _path(self, number: int) -> str:
        return f"{FOLDER}/{self._prefix}{number:08d}.json"

    def _numbers(self) -> list[int]:
        names = (name for name in self._storage.list(FOLDER) if name.startswith(self._prefix))
        return sorted(int(name.split(".")[2]) for name in names)

    def take(self, wait: bool) -> None:
        """Take the lease; with `wait`, after its holder is done. Raises Held."""
        told = False
        while True:
            numbers = self._numbers()
            holder = self._holder(numbers[-1]) if numbers else None
            if holder is None:
                number = numbers[-1] + 1 if numbers else 0
                if self._storage.create(self._path(number), self._record.to_json()):
                    self._number = number
                    for old in numbers:
                        self._storage.remove(self._path(old))
                    threading.Thread(target=self._beat, name="lease", daemon=True).start()
                    return
                continue
            if not wait:
                raise Held(f"{self._sentence(holder)}; wait for it with --wait, or stop it")
            if not told:
                self._say(f"{self._sentence(holder)}; waiting for it")
                told = True
            time.sleep(POLL_S)

    def _sentence(self, holder: Record) -> str:
        since = datetime.fromtimestamp(holder.since, UTC).isoformat(" ", "seconds")
        silent = max(0, round(time.time() - holder.time))
        return f"{self.name} is being made by `mesocosm {holder.job}` ({holder.owner}, since {since}, last heartbeat {silent} s ago)"

    def _holder(self, number: int) -> Record | None:
        """Who holds the lease; None where its holder is gone."""
        record = self._read(number)
        if record is None:
            return None
        alive = record.owner.alive()
        if alive is not None:
            return record if alive else None
        if time.time() - record.time < STALE_S:
            return record
        # The clocks of two hosts may differ: the heartbeats, not their times, decide.
        self._say(f"{self._sentence(record)}; looking for {SILENT_BEATS * BEAT_S:.0f} s whether it still runs")
        end = time.monotonic() + SILENT_BEATS * BEAT_S
        while time.monotonic() < end:
            time.sleep(POLL_S)
            now = self._read(number)
            if now is None or now.beat != record.beat:
                return now
        return None

    def _read(self, number: int) -> Record | None:
        raw = self._storage.read(self._path(number))
        return None if raw is None else Record.parse(raw)

    def _beat(self) -> None:
        """Count up the heartbeat until the lease is released, or another process has taken it."""
        assert self._number is not None
        beat = 0
        while not self._ended.wait(BEAT_S):
            beat += 1
            now = asdict(self._record) | {"beat": beat, "time": time.time()}
            # Storage that is away is tried again at the next beat.
            with suppress(OSError, StorageError):
                current = self._read(self._number)
                if current is None or current.owner != self._record.owner:
                    self._say(f"{self.name}: another process has taken over the making of it")
                    return
                self._storage.write(self._path(self._number), json.dumps(now).encode())

    def release(self) -> None:
        self._ended.set()
        if self._number is not None:
            self._storage.remove(self._path(self._number))


@contextmanager
def hold(storage: Storage, name: str, job: str, say: Callable[[str], None], *, wait: bool = False) -> Iterator[None]:
    """Hold the lease of `name` (kind/id) while the block runs.

    Look for the artifact again inside the block: the holder that was waited for may have made it.

    Raises:
        Held: another process holds it, and `wait` is False.
    """
    lease = Lease(storage, name, job, say)
    lease.take(wait)
    try:
        yield
    finally:
        lease.release()
