"""Leases: one process at a time makes an artifact.

    ROOT/leases/KIND.ID.NNNNNNNN.json        its holder and a heartbeat; the highest number counts

A lease is claimed by creating the next number exclusively. Numbers are used again once their files
are removed, so two processes that listed the folder at different times may claim two numbers: a
claimant lists the folder again, and withdraws if it meets another claim. A lease is stale, and the
next number may be claimed, when its process is gone (on the same host) or its heartbeat has stopped
(on another host).
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mesocosm import faults
from mesocosm.errors import MesocosmError, StorageError
from mesocosm.store.artifacts import Storage

FOLDER = "leases"
BEAT_S = 10.0
"""Seconds between two heartbeats."""
STALE_S = 60.0
"""A holder on another host whose last heartbeat is older is watched for SILENT_BEATS beats."""
SILENT_BEATS = 3
POLL_S = 1.0


@dataclass(frozen=True)
class Owner:
    """A process, with what another process needs to see whether it still runs."""

    host: str
    machine: str
    """The boot and the PID namespace of `pid`: the same PID elsewhere is another process."""
    pid: int
    started: int
    """The process's start in clock ticks since boot, 0 where unknown: PIDs are used again."""

    def alive(self) -> bool | None:
        """True if the process runs; None where this process cannot tell: it is on another host, or
        another user's and hidden (`hidepid`).
        """
        if self.machine != _machine():
            return None
        started = _start_of(self.pid)
        if started is None:
            return False
        if self.started and not started:
            return None
        return not self.started or started == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def this_process() -> Owner:
    return Owner(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()) or 0)


def _machine() -> str:
    """The machine's boot and this process's namespace of PIDs.

    They are not cached, because a forked child may be in another namespace.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: PIDs are the host's
        return socket.gethostname()


def _start_of(pid: int) -> int | None:
    """When a process of this machine started, 0 where unknown; None where it does not exist."""
    try:
        # The command, field 2, is in parentheses and may contain spaces. Field 3 is the state, 22
        # the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:  # no such process, or it ended just now; or it is hidden; or this is not Linux
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


class Held(MesocosmError):
    """Another process makes the artifact."""


@dataclass(frozen=True)
class Claim:
    """The content of one lease's file."""

    owner: Owner
    job: str
    since: float
    """Seconds since the epoch, as is `time`."""
    beat: int = 0
    time: float = 0.0
    nonce: str = ""
    """Unique to this claim."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def parse(raw: bytes) -> Claim | None:
        """The lease of a file. None if the file is torn: its writer did not finish, so no process
        holds the lease.
        """
        try:
            values = json.loads(raw)
            return Claim(**{**values, "owner": Owner(**values["owner"])})
        except (ValueError, TypeError, KeyError):
            return None


class Lease:
    """One artifact's lease."""

    def __init__(self, storage: Storage, name: str, job: str, say: Callable[[str], None]):
        self.name, self._storage, self._say = name, storage, say
        self._prefix = f"{name.replace('/', '.')}."
        now = time.time()
        self._record = Claim(this_process(), job, now, 0, now, uuid.uuid4().hex)
        """This process's claim."""
        self._number = 0
        self._watched: set[str] = set()
        """Nonces of claims on other hosts that were reported as watched."""
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)

    def _path(self, number: int) -> str:
        return f"{FOLDER}/{self._prefix}{number:08d}.json"

    def _numbers(self) -> list[int]:
        names = self._storage.list(FOLDER)
        return sorted(int(n.split(".")[2]) for n in names if n.startswith(self._prefix))

    def _read(self, number: int) -> Claim | None:
        raw = self._storage.read(self._path(number))
        return None if raw is None else Claim.parse(raw)

    def _holds(self, number: int) -> bool:
        record = self._read(number)
        return record is not None and record.nonce == self._record.nonce

    def take(self, wait: bool) -> None:
        """Take the lease; with `wait`, after its holder has released it. Raises Held."""
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
                raise Held(f"{self._describe(holder)}; wait for it with --wait, or stop it")
            if not reported:
                self._say(f"{self._describe(holder)}; waiting for it")
                reported = True
            time.sleep(POLL_S)

    def _claim(self, seen: Mapping[int, Claim | None]) -> bool:
        """Claim the number after those seen, whose holders are gone. Returns False where others
        claim at the same time.
        """
        now = time.time()
        number = max(seen) + 1 if seen else 0
        self._record = replace(self._record, since=now, time=now, nonce=uuid.uuid4().hex)
        # A remote store may refuse its client's own repetition of a request that succeeded.
        created = self._storage.create(self._path(number), self._record.to_json())
        if not created and not self._holds(number):
            return False
        others = [other for other in self._numbers() if other != number]
        for other in others:
            record = self._read(other)
            alive = None if record is None else record.owner.alive()
            if alive or (alive is None and record != seen.get(other)):
                self._storage.remove(self._path(number))
                return False
        for other in others:
            self._storage.remove(self._path(other))
        self._number = number
        return True

    def _describe(self, holder: Claim) -> str:
        since = datetime.fromtimestamp(holder.since, UTC).isoformat(" ", "seconds")
        silent = max(0, round(time.time() - holder.time))
        return (
            f"{self.name} is being made by `mesocosm {holder.job}` ({holder.owner}, since {since},"
            f" last heartbeat {silent} s ago)"
        )

    def _holder(self, number: int) -> Claim | None:
        """The holder of the lease; None where it is gone."""
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
            seconds = SILENT_BEATS * BEAT_S
            self._say(f"{self._describe(record)}; watching its heartbeat for {seconds:.0f} s")
        end = time.monotonic() + SILENT_BEATS * BEAT_S
        while time.monotonic() < end:
            time.sleep(POLL_S)
            now = self._read(number)
            if now is None or now.beat != record.beat:
                return now
        return None

    def _beat(self) -> None:
        """Count up the heartbeat until the release. If another process has taken the lease, end the
        job as Ctrl-C does: two makers of one artifact would share its checkpoints.
        """
        while not self._ended.wait(BEAT_S):
            # If storage is away, the next beat tries again.
            with suppress(OSError, StorageError):
                if not self._holds(self._number):
                    self._say(f"another process has taken over {self.name}; this one stops")
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                beat = self._record.beat + 1
                self._record = replace(self._record, beat=beat, time=time.time())
                self._storage.write(self._path(self._number), self._record.to_json())

    def release(self) -> None:
        """Let others take the lease. Where storage is away it stays until this process is gone."""
        self._ended.set()
        self._heart.join()  # a beat under way would write the file again
        try:
            if self._holds(self._number):
                self._storage.remove(self._path(self._number))
        except (OSError, StorageError) as error:
            problem = f"the lease of {self.name} stays until this process ends"
            with suppress(OSError, StorageError):
                self._say(f"warning: {problem}: {faults.first_line(error)}")


@contextmanager
def hold(
    storage: Storage, name: str, job: str, say: Callable[[str], None], *, wait: bool = False
) -> Iterator[None]:
    """Hold the lease of `name` (kind/id) while the block runs. Look for the artifact again inside:
    an earlier holder may have made it. Raises Held where another holds it and `wait` is False.
    """
    lease = Lease(storage, name, job, say)
    lease.take(wait)
    try:
        yield
    finally:
        lease.release()
