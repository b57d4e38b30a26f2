"""Partial artifacts: a machine fetches and verifies only the units that are read, so a dataset may
be larger than its disk.

A unit is a file or a folder of files, verified once on a machine. Where a whole copy is on this
machine, a stamp in the cache folder records which files (size, inode, time of change) were
verified. What is fetched from a remote root enters CACHE/parts/KIND/ID/WRITER/UNIT by one
rename, after its checksums were verified and its bytes were on disk.

The kernel frees these locks with their holder. A unit's lock is exclusive while the unit is fetched
or removed, and shared while it is read: it is fetched once, and never removed while it is read. The
lock `room` is held for moments, to remove the least recently used shards and to reserve the room of
a fetch in CACHE/arriving/<unit's lock>/reserved.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mesocosm.errors import ArtifactError
from mesocosm.store.artifacts import TRANSFERS, Commit, Storage
from mesocosm.store.files import make_folder, replace, sha256, sync_tree, write_whole

PATIENCE_S = 60.0
"""Seconds to wait for other units to be released when the cache is full."""


class Files:
    """A complete local folder. Its units are held while they are read."""

    most: int | None = None
    """Bytes of shards that may be stored here; None for no bound."""

    def __init__(self, path: Path):
        self.path = path

    def hold(self, unit: str) -> Path:
        """The path of the unit, valid until it is released as often as it was held."""
        return self.path / unit

    def ahead(self, units: Iterable[str]) -> None:
        """Begin, in threads, to fetch and verify units that will be held."""

    def release(self, units: Iterable[str]) -> None:
        """Release one hold of each unit. A unit that was only begun by `ahead` is dropped."""

    def bytes(self, unit: str) -> int:
        """The size of all files of the unit."""
        return sum(file.stat().st_size for file in (self.path / unit).iterdir())


class _NoRoom(ArtifactError):
    """All shards that could be removed are in use."""


@dataclass(frozen=True)
class _Held:
    path: Path
    lock: IO[str] | None


@dataclass
class _Unit:
    """A unit that is fetched and verified, or on its way."""

    fetch: Future[_Held]
    holds: int = 0


def open_partial(storage: Storage, kind: str, ref: str, most: int | None = None) -> Partial:
    """The artifact that `ref` names (see `Storage.find_commit`), fetched and verified when read.
    `most` bounds the bytes of a remote root's shards on this machine.
    """
    return Partial(storage, storage.find_commit(kind, ref), most)


class Partial(Files):
    """The files of an artifact of a root, verified before use. Threads may share it, forks may not.

    `hold` raises ArtifactError where a file is damaged or missing, or the cache has no room for it.
    """

    def __init__(self, storage: Storage, commit: Commit, most: int | None):
        kind, id = commit["kind"], commit["id"]
        self.name, self.most = f"{kind}/{id}", most if storage.remote else None
        self._storage, self._commit = storage, commit
        self._whole = storage.artifact_path(kind, id)
        self._cache = storage.local_path("cache")
        self._parts, self._arriving = self._cache / "parts", self._cache / "arriving"
        part = self._parts / kind / id / commit.get("folder", "")
        super().__init__(part if storage.remote else self._whole)
        self._folders: dict[str, list[str]] = defaultdict(list)
        for name in commit["files"]:
            self._folders[os.path.dirname(name)].append(name)
        self._units: dict[str, _Unit] = {}
        self._mutex = threading.Lock()
        self._pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="partial")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def hold(self, unit: str) -> Path:
        if not self._names(unit):
            return self.path / unit  # its reader reports that it does not exist
        end = time.monotonic() + PATIENCE_S
        with self._mutex:
            held = self._begin(unit)
            held.holds += 1
            fetch = held.fetch
        try:
            while True:
                try:
                    return fetch.result().path
                except _NoRoom as error:
                    if time.monotonic() > end:
                        problem = (
                            f"{self.name}: {unit!r} cannot be fetched: other shards in use fill"
                        )
                        cache = f"the cache of {self.most} bytes in {self._cache}"
                        fix = "give a larger data.cache_gib or a smaller data.block"
                        raise _NoRoom(f"{problem} {cache}; {fix}, or stop other jobs") from error
                time.sleep(0.1)
                with self._mutex:
                    if held.fetch is fetch:
                        held.fetch = self._submit(unit)
                    fetch = held.fetch
        except BaseException:
            with self._mutex:
                self._drop(unit, held)
            raise

    def ahead(self, units: Iterable[str]) -> None:
        with self._mutex:
            for unit in units:
                self._begin(unit)

    def release(self, units: Iterable[str]) -> None:
        with self._mutex:
            for unit in units:
                if (released := self._units.get(unit)) is not None:
                    self._drop(unit, released)

    def bytes(self, unit: str) -> int:
        return sum(self._commit["files"][name]["bytes"] for name in self._names(unit))

    def _names(self, unit: str) -> list[str]:
        return [unit] if unit in self._commit["files"] else self._folders.get(unit, [])

    def _begin(self, unit: str) -> _Unit:
        """The unit, whose fetch is begun unless it is done or under way."""
        begun = self._units.get(unit)
        error = begun.fetch.exception() if begun is not None and begun.fetch.done() else None
        if begun is not None and isinstance(error, _NoRoom):
            begun.fetch = self._submit(unit)  # a thread may still wait for it
        elif begun is None or error is not None:
            begun = self._units[unit] = _Unit(self._submit(unit))
        return begun

    def _submit(self, unit: str) -> Future[_Held]:
        """A thread of the pool does not keep this object alive."""
        return self._pool.submit(Partial._hold_verified, weakref.proxy(self), unit)

    def _drop(self, unit: str, dropped: _Unit) -> None:
        """Release one hold, and after the last one the unit's lock."""
        dropped.holds -= 1
        if dropped.holds > 0:
            return
        if self._units.get(unit) is dropped:
            del self._units[unit]
        if not dropped.fetch.cancel():
            dropped.fetch.add_done_callback(_unlock)

    # -- in the threads ------------------------------------------------------------------------

    def _hold_verified(self, unit: str) -> _Held:
        """Verify a unit, fetching it where needed, and lock it in the cache. May raise _NoRoom."""
        names, remote = self._names(unit), self._storage.remote
        with self._storage.storage_errors(self.name):
            if not remote or all((self._whole / name).is_file() for name in names):
                wrong = self._first_wrong(unit, names)
                if wrong is None:
                    return _Held(self._whole / unit, None)
                if not remote:
                    missing = not (self._whole / wrong).is_file()
                    raise self._storage.damaged(self._commit, wrong, missing=missing)
            part = self.path / unit
            key = _flat(str(part.relative_to(self._parts)))
            while True:
                lock = self._lock(key, fcntl.LOCK_SH)
                if part.exists():
                    _touch(part)
                    return _Held(part, lock)
                lock.close()
                with self._lock(key, fcntl.LOCK_EX):
                    if not part.exists():
                        self._fetch(unit, names, self._arriving / key)

    def _first_wrong(self, unit: str, names: list[str]) -> str | None:
        """The first file of a whole copy that differs from COMMIT.json, by its stamp or content."""
        files, stats = self._commit["files"], {}
        for name in names:
            try:
                stat = (self._whole / name).stat()
            except OSError:
                return name
            stats[name] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, files[name]["sha256"]]
        stamp = self._storage.machine_path("verified", self.name, f"{_flat(unit)}.json")
        with suppress(OSError, ValueError):
            if json.loads(stamp.read_bytes()) == stats:
                return None
        for name in names:
            if sha256(self._whole / name) != files[name]["sha256"]:
                return name
        with suppress(OSError):  # without room for a stamp every process verifies
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_whole(stamp, json.dumps(stats).encode())
        return None

    def _fetch(self, unit: str, names: list[str], arriving: Path) -> None:
        """Fetch a unit into the cache. The caller holds the unit's lock exclusively."""
        part, size, files = self.path / unit, self.bytes(unit), arriving / "files"

        def fetch(name: str) -> None:
            fetched = self._storage.fetch(self._commit, name, files / name)
            if not fetched or sha256(files / name) != self._commit["files"][name]["sha256"]:
                raise self._storage.damaged(self._commit, name, missing=not (files / name).exists())

        try:
            with self._lock("room", fcntl.LOCK_EX):
                shutil.rmtree(arriving, ignore_errors=True)  # of a fetch that was killed
                make_folder(arriving)
                if unit.startswith("shards/"):
                    if self.most is not None:
                        self._make_room(size, self.most, arriving / "removed")
                    (arriving / "reserved").write_text(str(size))
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(fetch, names))
            sync_tree(arriving)
            make_folder(part.parent)
            with self._lock("room", fcntl.LOCK_EX):  # so that a shard is counted once
                replace(files / unit, part)
                shutil.rmtree(arriving, ignore_errors=True)
        except BaseException:
            shutil.rmtree(arriving, ignore_errors=True)
            raise

    def _make_room(self, size: int, most: int, removed: Path) -> None:
        """Remove shards until `size` bytes fit into `most`. The caller holds the lock `room`."""
        shards = [
            (_used_at(folder), folder, sum(path.stat().st_size for path in folder.iterdir()))
            for folder in self._parts.glob("*/*/*/shards/*")
        ]
        excess = sum(bytes for _, _, bytes in shards) + self._reserved() + size - most
        for _, folder, bytes in sorted(shards):
            if excess <= 0:
                return
            key = _flat(str(folder.relative_to(self._parts)))
            with suppress(BlockingIOError), self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.rename(folder, removed)  # at once, in case this process is killed now
                shutil.rmtree(removed)
                excess -= bytes
        if excess > 0:
            raise _NoRoom

    def _reserved(self) -> int:
        """Bytes of shards that are being fetched. Removes the files of fetches that were killed."""
        total = 0
        for folder in list(self._arriving.iterdir()):
            try:
                with self._lock(folder.name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:  # its fetch is under way
                with suppress(FileNotFoundError):
                    total += int((folder / "reserved").read_text())
        return total

    def _lock(self, name: str, how: int) -> IO[str]:
        """A lock among all processes of this machine; closing the file frees it."""
        folder = self._cache / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "a")  # noqa: SIM115, it is open as long as the lock is held
        try:
            fcntl.flock(file, how)
        except BaseException:
            file.close()
            raise
        return file


def _unlock(fetch: Future[_Held]) -> None:
    if fetch.cancelled() or fetch.exception() is not None:
        return
    held = fetch.result()
    if held.lock is not None:
        _touch(held.path)
        held.lock.close()


def _flat(name: str) -> str:
    return name.replace("/", "-")


def _touch(path: Path) -> None:
    """Set a unit's time of last use, finer than the kernel's clock, which ticks in milliseconds."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), time.time_ns()))


def _used_at(folder: Path) -> int:
    with suppress(OSError):
        return folder.stat().st_mtime_ns
    return 0
