"""An artifact of which this machine fetches and verifies what is asked for: datasets larger than
its disk, and opening in a time that does not depend on their size.

A unit, a file or a folder of files, is verified once on a machine, whatever the number of its
processes. Where the root is a folder, or `Storage.artifact` keeps a whole copy here, a stamp in the
temporary folder says which files (size, inode, time of change) were found to be right. What is
fetched from a remote root lies in

    CACHE/parts/<kind>/<id>/<maker's folder>/<unit>

and came there by one rename, after its checksums were right and its bytes were on disk: what is
there is whole.

Locks, which the kernel frees with their holder:

- A unit's lock is exclusive while the unit is fetched or removed, and shared while it is read. So a
  unit is fetched once on a machine, different units are fetched at the same time, and what is read
  is never removed.
- The lock `room` is held for moments: to remove the shards that were used least recently, and to
  reserve the room of a fetch in CACHE/arriving/<unit's lock>/reserved.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
import uuid
import weakref
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from mesocosm.errors import ArtifactError
from mesocosm.store.commit import Commit
from mesocosm.store.files import make_folder, replace, sha256, sync_tree

if TYPE_CHECKING:
    from mesocosm.store.artifacts import Storage

AT_ONCE = 4
"""Units that are verified, and files of a unit that are fetched, at once."""
PATIENCE_S = 60.0
"""How long to wait for others to let go of what the cache has no room beside."""


class Files(Protocol):
    """A folder of which units are held while they are read."""

    @property
    def path(self) -> Path: ...

    @property
    def most(self) -> int | None:
        """Bytes of shards that may lie here; None: any."""

    def hold(self, unit: str) -> Path:
        """Where the unit lies, until it is released as often as it was held."""

    def ahead(self, units: Iterable[str]) -> None:
        """Begin, in threads, to hold what will be asked for."""

    def release(self, units: Iterable[str]) -> None:
        """Give back one hold of each unit; a unit that was only begun by `ahead` is let go."""

    def bytes(self, unit: str) -> int:
        """Of all its files."""


class Whole:
    """A folder that is all here and that nobody need verify."""

    most = None

    def __init__(self, path: Path):
        self.path = path

    def hold(self, unit: str) -> Path:
        return self.path / unit

    def ahead(self, units: Iterable[str]) -> None:
        pass

    def release(self, units: Iterable[str]) -> None:
        pass

    def bytes(self, unit: str) -> int:
        return sum(file.stat().st_size for file in (self.path / unit).iterdir())


class _NoRoom(ArtifactError):
    """All that could be removed is in use."""


@dataclass(frozen=True)
class _Held:
    path: Path
    lock: IO[str] | None


@dataclass
class _Unit:
    """A unit that is here, or on its way."""

    coming: Future[_Held | None]
    holds: int = 0

    def failed(self) -> bool:
        return self.coming.done() and self.coming.exception() is not None

    def lacked_room(self) -> bool:
        return self.coming.done() and not self.failed() and self.coming.result() is None


class Partial:
    """Made by `Storage.partial`. Nothing is handed out before it is verified.

    For one process. Threads may share it, each releasing what it held itself; forks may not.

    `hold` raises ArtifactError, naming the file and how to repair it, where one is damaged or
    missing, or the cache has no room for it.
    """

    def __init__(
        self, storage: Storage, kind: str, id: str, whole: Path, commit: Commit, most: int | None
    ):
        self.name, self.most = f"{kind}/{id}", most if storage.remote else None
        self._storage, self._kind, self._id, self._commit, self._whole = (
            storage,
            kind,
            id,
            commit,
            whole,
        )
        self._cache = storage.local_path("cache")
        self._arriving = self._cache / "arriving"
        self.path = (
            self._cache / "parts" / kind / id / commit["folder"] if storage.remote else whole
        )
        self._folders: dict[str, list[str]] = defaultdict(list)
        for name in commit["files"]:
            self._folders[os.path.dirname(name)].append(name)
        self._units: dict[str, _Unit] = {}
        self._mutex = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="partial")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def hold(self, unit: str) -> Path:
        if not self._names(unit):
            return self.path / unit  # its reader says what is wrong
        until = time.monotonic() + PATIENCE_S
        with self._mutex:
            held_unit = self._begun(unit)
            held_unit.holds += 1
            coming = held_unit.coming
        try:
            while (held := coming.result()) is None:
                if time.monotonic() > until:
                    full = (
                        f"other shards in use fill the cache of {self.most} bytes in {self._cache}"
                    )
                    fix = "give a larger data.cache_gib or a smaller data.block, or stop other jobs"
                    raise _NoRoom(f"{self.name}: {unit!r} cannot be fetched: {full}; {fix}")
                time.sleep(0.1)
                with self._mutex:
                    if held_unit.lacked_room():
                        held_unit.coming = self._submit(unit)
                    coming = held_unit.coming
        except BaseException:
            with self._mutex:
                self._drop(unit, held_unit)
            raise
        return held.path

    def ahead(self, units: Iterable[str]) -> None:
        with self._mutex:
            for unit in units:
                self._begun(unit)

    def release(self, units: Iterable[str]) -> None:
        with self._mutex:
            for unit in units:
                if (released := self._units.get(unit)) is not None:
                    self._drop(unit, released)

    def _begun(self, unit: str) -> _Unit:
        """The unit, whose fetch is begun unless it is here or on its way."""
        begun = self._units.get(unit)
        if begun is None or begun.failed():
            begun = self._units[unit] = _Unit(self._submit(unit))
        elif begun.lacked_room():
            begun.coming = self._submit(unit)
        return begun

    def _submit(self, unit: str) -> Future[_Held | None]:
        return self._pool.submit(_bring, weakref.proxy(self), unit)

    def _drop(self, unit: str, dropped: _Unit) -> None:
        """Give back one hold, and after the last one the unit's lock."""
        dropped.holds -= 1
        if dropped.holds > 0:
            return
        if self._units.get(unit) is dropped:
            del self._units[unit]
        if not dropped.coming.cancel():
            dropped.coming.add_done_callback(_let_go)

    def bytes(self, unit: str) -> int:
        return sum(self._commit["files"][name]["bytes"] for name in self._names(unit))

    def _names(self, unit: str) -> list[str]:
        return [unit] if unit in self._commit["files"] else self._folders.get(unit, [])

    # -- in the threads
    # ------------------------------------------------------------------------------------------

    def bring(self, unit: str) -> _Held | None:
        """Hold a unit; None where there is no room for it at present."""
        with self._storage.naming(self.name):
            return self._brought(unit)

    def _brought(self, unit: str) -> _Held | None:
        names = self._names(unit)
        if not self._storage.remote or all((self._whole / name).is_file() for name in names):
            bad = self._wrong(unit, names)
            if bad is None:
                return _Held(self._whole / unit, None)
            if not self._storage.remote:
                raise self._storage.damaged(
                    self._kind, self._id, self._commit, bad, there=(self._whole / bad).is_file()
                )
        key = self._key(unit)
        while True:
            lock = self._lock(key, fcntl.LOCK_SH)
            if (self.path / unit).exists():
                _used(self.path / unit)
                return _Held(self.path / unit, lock)
            lock.close()
            with self._lock(key, fcntl.LOCK_EX):
                if (self.path / unit).exists():
                    continue
                try:
                    self._fetch(unit, names)
                except _NoRoom:
                    return None

    def _wrong(self, unit: str, names: list[str]) -> str | None:
        """The first of a whole copy's files that is not as COMMIT.json says. What was right once
        and has not changed since is not read again.
        """
        files, found = self._commit["files"], {}
        for name in names:
            try:
                stat = (self._whole / name).stat()
            except OSError:
                return name
            found[name] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, files[name]["sha256"]]
        stamp = (
            self._storage.machine_path("verified") / self._kind / self._id / f"{_flat(unit)}.json"
        )
        with suppress(OSError, ValueError):
            if json.loads(stamp.read_bytes()) == found:
                return None
        for name in names:
            if sha256(self._whole / name) != files[name]["sha256"]:
                return name
        with suppress(OSError):  # without room for a stamp every process verifies
            stamp.parent.mkdir(parents=True, exist_ok=True)
            temporary = stamp.with_name(f"{stamp.name}.{uuid.uuid4().hex}.part")
            temporary.write_text(json.dumps(found))
            replace(temporary, stamp)
        return None

    def _fetch(self, unit: str, names: list[str]) -> None:
        """Bring a unit into the cache. The caller holds the unit's lock exclusively.

        Raises:
            _NoRoom: All that could be removed is in use.
            ArtifactError: The root has another file than COMMIT.json says, or none.
        """
        to, size = self.path / unit, self.bytes(unit)
        arriving = self._arriving / self._key(unit)
        try:
            with self._lock("room", fcntl.LOCK_EX):
                shutil.rmtree(arriving, ignore_errors=True)  # of a fetch that was killed
                make_folder(arriving)
                if unit.startswith("shards/"):
                    if self.most is not None:
                        self._make_room(size, arriving)
                    (arriving / "reserved").write_text(str(size))
            files = arriving / "files"
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda name: self._fetch_file(name, files / name), names))
            sync_tree(arriving)
            make_folder(to.parent)
            with self._lock("room", fcntl.LOCK_EX):  # so that a shard is counted once
                replace(files / unit, to)
                shutil.rmtree(arriving, ignore_errors=True)
        except BaseException:
            shutil.rmtree(arriving, ignore_errors=True)
            raise

    def _fetch_file(self, name: str, to: Path) -> None:
        told = (self._kind, self._id, self._commit, name)
        if (
            not self._storage.fetch(*told, to)
            or sha256(to) != self._commit["files"][name]["sha256"]
        ):
            raise self._storage.damaged(*told, there=to.exists())

    def _make_room(self, bytes: int, bin: Path) -> None:
        """Remove shards until there is room for so many bytes. The caller holds the lock `room`."""
        assert self.most is not None
        shards = [
            (_when(folder), folder, _size(folder))
            for folder in (self._cache / "parts").glob("*/*/*/shards/*")
        ]
        over = sum(size for _, _, size in shards) + self._reserved() + bytes - self.most
        for _, folder, size in sorted(shards):
            if over <= 0:
                return
            key = _flat(str(folder.relative_to(self._cache / "parts")))
            with suppress(BlockingIOError), self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.rename(
                    folder, bin / "gone"
                )  # whole until then, even where this process is killed now
                shutil.rmtree(bin / "gone")
                over -= size
        if over > 0:
            raise _NoRoom

    def _reserved(self) -> int:
        """Bytes of the shards that are being fetched. What killed fetches left is removed."""
        total = 0
        for folder in list(self._arriving.iterdir()):
            try:
                with self._lock(folder.name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:  # its fetch goes on
                with suppress(FileNotFoundError):
                    total += int((folder / "reserved").read_text())
        return total

    def _key(self, unit: str) -> str:
        return _flat(str((self.path / unit).relative_to(self._cache / "parts")))

    def _lock(self, name: str, how: int) -> IO[str]:
        """A lock among all processes of this machine; closing it frees it. Raises BlockingIOError
        with LOCK_NB.
        """
        folder = self._cache / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "a")  # noqa: SIM115, it is open as long as the lock is held
        try:
            fcntl.flock(file, how)
        except BaseException:
            file.close()
            raise
        return file


def _bring(partial: Partial, unit: str) -> _Held | None:
    return partial.bring(unit)


def _let_go(done: Future[_Held | None]) -> None:
    if (
        not done.cancelled()
        and done.exception() is None
        and (held := done.result()) is not None
        and held.lock is not None
    ):
        _used(held.path)
        held.lock.close()


def _flat(name: str) -> str:
    return name.replace("/", "-")


def _used(path: Path) -> None:
    """A unit carries the time of its last use; finer than the kernel's own clock for it, whose
    ticks are milliseconds.
    """
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), time.time_ns()))


def _when(folder: Path) -> int:
    with suppress(OSError):
        return folder.stat().st_mtime_ns
    return 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
