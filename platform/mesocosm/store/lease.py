"""Leases: one process at a time makes an artifact.

    ROOT/leases/<kind>.<id>.NNNNNNNN.json    who holds it, and a heartbeat; the highest number counts

A lease is claimed by creating the next number exclusively. Numbers are used again once their files
are removed, so two processes that listed the folder at different times may claim two numbers: a
claimant lists the folder again, and withdraws where it meets another claim. The holder counts up
its heartbeat every BEAT_S seconds and removes the file when it is done. A lease is stale, and the
next number may be claimed, where its process is gone (on the same host), or its heartbeat has
stopped (on another host).
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from mesocosm import faults
from mesocosm.errors import MesocosmError, StorageError
from mesocosm.store.artifacts import Storage
from mesocosm.store.owner import Owner, this_process

FOLDER = "leases"
BEAT_S = 10.0
"""Seconds between two heartbeats."""
STALE_S = 60.0
"""A holder on another host that was silent for so long is watched for SILENT_BEATS beats, whatever
its clock says, and has then lost its lease.
"""
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
    nonce: str = ""
    """Of this claim alone."""

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
        self.name, self._storage, self._job, self._say = name, storage, job, say
        self._prefix = f"{name.replace('/', '.')}."
        self._record: Record | None = None
        """The claim that holds the lease."""
        self._number = 0
        self._watched: set[str] = set()
        """Claims on other hosts that a line was written about."""
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)

    def _path(self, number: int) -> str:
        return f"{FOLDER}/{self._prefix}{number:08d}.json"

    def _numbers(self) -> list[int]:
        names = (name for name in self._storage.list(FOLDER) if name.startswith(self._prefix))
        return sorted(int(name.split(".")[2]) for name in names)

    def take(self, wait: bool) -> None:
        """Take the lease; with `wait`, after its holder is done. Raises Held."""
        reported = False
        while True:
            seen = {number: self._read(number) for number in self._numbers()}
            holder = self._holder(max(seen)) if seen else None
            if holder is None:
                if self._claim(seen):
                    self._heart.start()
                    return
                time.sleep(random.uniform(0, POLL_S))
                continue
            if not wait:
                raise Held(f"{self._sentence(holder)}; wait for it with --wait, or stop it")
            if not reported:
                self._say(f"{self._sentence(holder)}; waiting for it")
                reported = True
            time.sleep(POLL_S)

    def _claim(self, seen: Mapping[int, Record | None]) -> bool:
        """Claim the number after those seen, whose holders are gone; False where others claim at
        the same time.
        """
        now = time.time()
        number = max(seen) + 1 if seen else 0
        record = Record(this_process(), self._job, now, 0, now, uuid.uuid4().hex)
        if not self._storage.create(self._path(number), record.to_json()):
            # A remote store may answer "exists" to its own retry of this request: the nonce tells.
            there = self._read(number)
            if there is None or there.nonce != record.nonce:
                return False
        others = [other for other in self._numbers() if other != number]
        for other in others:
            there = self._read(other)
            alive = None if there is None else there.owner.alive()
            if alive or (alive is None and there != seen.get(other)):
                self._storage.remove(self._path(number))
                return False
        for other in others:
            self._storage.remove(self._path(other))
        self._record, self._number = record, number
        return True

    def _sentence(self, holder: Record) -> str:
        since = datetime.fromtimestamp(holder.since, UTC).isoformat(" ", "seconds")
        silent = max(0, round(time.time() - holder.time))
        return (
            f"{self.name} is being made by `mesocosm {holder.job}` ({holder.owner}, since {since},"
            f" last heartbeat {silent} s ago)"
        )

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
        if record.nonce not in self._watched:
            self._watched.add(record.nonce)
            self._say(
                f"{self._sentence(record)}; looking for {SILENT_BEATS * BEAT_S:.0f} s whether it"
                " still runs"
            )
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

    def _is_mine(self) -> bool:
        current = self._read(self._number)
        return (
            current is not None and self._record is not None and current.nonce == self._record.nonce
        )

    def _beat(self) -> None:
        """Count up the heartbeat until the lease is released. Where another process has taken it,
        end the job as Ctrl-C does: two makers of one artifact share its checkpoints.
        """
        assert self._record is not None
        beat = 0
        while not self._ended.wait(BEAT_S):
            beat += 1
            # Storage that is away is tried again at the next beat.
            with suppress(OSError, StorageError):
                if not self._is_mine():
                    self._say(
                        f"another process has taken over the making of {self.name}; this one stops"
                    )
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                now = replace(self._record, beat=beat, time=time.time())
                self._storage.write(self._path(self._number), now.to_json())

    def release(self) -> None:
        """Let others take the lease. Where storage is away it is left to be taken over once this
        process is gone: the job's own result or error counts.
        """
        self._ended.set()
        self._heart.join()  # a beat under way would write the file anew
        try:
            if self._is_mine():
                self._storage.remove(self._path(self._number))
        except (OSError, StorageError) as error:
            with suppress(OSError, StorageError):
                why = faults.first_line(error)
                self._say(f"warning: the lease of {self.name} stays until this process ends: {why}")


@contextmanager
def hold(
    storage: Storage, name: str, job: str, say: Callable[[str], None], *, wait: bool = False
) -> Iterator[None]:
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
