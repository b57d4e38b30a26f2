"""An artifact of which this machine fetches and verifies what is asked for: datasets larger than its disk, and opening in a time that does not
depend on their size.

A unit, a file or a folder of files, is verified once on a machine, whatever the number of its processes. Where the root is a folder, or
`Storage.artifact` keeps a whole copy here, a stamp in the temporary folder says which files (size, inode, time of change) were found to be right. What is
fetched from a remote root lies in

    CACHE/parts/<kind>/<id>/<maker's folder>/<unit>

and came there by one rename, after its checksums were right and its bytes were on disk: what is there is whole. One process of the machine fetches at
a time (a lock that the kernel frees with its holder), over the budget it removes the shards that were used least recently; a reader holds a shared
lock on its shard, and what is held is never removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from mesocosm.durable import sha256, sync, sync_tree
from mesocosm.errors import ArtifactError

if TYPE_CHECKING:
    from mesocosm.storage import Storage

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
        """Where the unit lies, until it is released."""

    def ahead(self, units: Iterable[str]) -> None:
        """Begin, in threads, to hold what will be asked for."""

    def release(self, units: Iterable[str]) -> None:
        """Units that will not be read before they are held again."""

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


class Partial:
    """Made by `Storage.partial`. Nothing is handed out before it is verified. For one process: threads may share it, forks may not.

    `hold` raises ArtifactError, naming the file and how to repair it, where one is damaged or missing, or the cache has no room for it.
    """

    def __init__(self, storage: Storage, kind: str, id: str, whole: Path, commit: Mapping[str, Any], most: int | None):
        self.name, self.most = f"{kind}/{id}", most if storage.remote else None
        self._storage, self._kind, self._id, self._commit, self._whole = storage, kind, id, commit, whole
        self._cache = storage.local_path("cache")
        self.path = self._cache / "parts" / kind / id / commit["folder"] if storage.remote else whole
        self._folders: dict[str, list[str]] = defaultdict(list)
        for name in commit["files"]:
            self._folders[os.path.dirname(name)].append(name)
        self._coming: dict[str, Future[_Held | None]] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="partial")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def hold(self, unit: str) -> Path:
        if not self._names(unit):
            return self.path / unit  # its reader says what is wrong
        until = time.monotonic() + PATIENCE_S
        while True:
            self.ahead([unit])
            try:
                held = self._coming[unit].result()
            except ArtifactError:
                del self._coming[unit]
                raise
            if held is not None:
                return held.path
            if time.monotonic() > until:
                raise _NoRoom(
                    f"{self.name}: {unit!r} is not to be fetched, for other shards in use fill the cache of {self.most} bytes "
                    f"in {self._cache}; give a larger data.cache_gib or a smaller data.block, or stop other jobs on this machine"
                )
            time.sleep(0.1)

    def ahead(self, units: Iterable[str]) -> None:
        for unit in units:
            under_way = self._coming.get(unit)
            if under_way is None or (under_way.done() and under_way.exception() is None and under_way.result() is None):
                self._coming[unit] = self._pool.submit(_bring, weakref.proxy(self), unit)

    def release(self, units: Iterable[str]) -> None:
        for unit in units:
            under_way = self._coming.pop(unit, None)
            if under_way is not None and not under_way.cancel():
                under_way.add_done_callback(_let_go)

    def bytes(self, unit: str) -> int:
        return sum(self._commit["files"][name]["bytes"] for name in self._names(unit))

    def _names(self, unit: str) -> list[str]:
        return [unit] if unit in self._commit["files"] else self._folders.get(unit, [])

    # -- in the threads ------------------------------------------------------------------------------------------

    def bring(self, unit: str) -> _Held | None:
        """Hold a unit; None where there is no room for it at present."""
        names = self._names(unit)
        if not self._storage.remote or all((self._whole / name).is_file() for name in names):
            bad = self._wrong(unit, names)
            if bad is None:
                return _Held(self._whole / unit, None)
            if not self._storage.remote:
                raise self._storage.damaged(self._kind, self._id, self._commit, bad, there=(self._whole / bad).is_file())
        while True:
            lock = self._lock(self._key(unit), fcntl.LOCK_SH)
            if (self.path / unit).exists():
                _used(self.path / unit)
                return _Held(self.path / unit, lock)
            lock.close()
            try:
                self._fetch(unit, names)
            except _NoRoom:
                return None

    def _wrong(self, unit: str, names: list[str]) -> str | None:
        """The first of a whole copy's files that is not as COMMIT.json says. What was right once and has not changed since is not read again."""
        files, found = self._commit["files"], {}
        for name in names:
            try:
                stat = (self._whole / name).stat()
            except OSError:
                return name
            found[name] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, files[name]["sha256"]]
        stamp = self._storage.machine_path("verified") / self._kind / self._id / f"{_flat(unit)}.json"
        with suppress(OSError, ValueError):
            if json.loads(stamp.read_bytes()) == found:
                return None
        for name in names:
            if sha256(self._whole / name) != files[name]["sha256"]:
                return name
        with suppress(OSError):  # without room for a stamp every process verifies
            stamp.parent.mkdir(parents=True, exist_ok=True)
            temporary = stamp.with_name(f"{stamp.name}.{os.getpid()}.part")
            temporary.write_text(json.dumps(found))
            os.replace(temporary, stamp)
        return None

    def _fetch(self, unit: str, names: list[str]) -> None:
        """Into the cache. Raises _NoRoom, and ArtifactError where the root has another file than COMMIT.json says, or none."""
        to = self.path / unit
        with self._lock("room", fcntl.LOCK_EX):
            if to.exists():
                return
            arriving = self._cache / "arriving"  # of the lock's holder alone: what is in it was left by one that was killed
            shutil.rmtree(arriving, ignore_errors=True)
            if self.most is not None and unit.startswith("shards/"):
                self._make_room(self.bytes(unit), arriving)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda name: self._fetch_file(name, arriving / name), names))
            sync_tree(arriving)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.rename(arriving / unit, to)
            sync(to.parent)

    def _fetch_file(self, name: str, to: Path) -> None:
        told = (self._kind, self._id, self._commit, name)
        if not self._storage.fetch(*told, to) or sha256(to) != self._commit["files"][name]["sha256"]:
            raise self._storage.damaged(*told, there=to.exists())

    def _make_room(self, bytes: int, bin: Path) -> None:
        assert self.most is not None
        shards = [(_when(folder), folder, _size(folder)) for folder in (self._cache / "parts").glob("*/*/*/shards/*")]
        over = sum(size for _, _, size in shards) + bytes - self.most
        for _, folder, size in sorted(shards):
            if over <= 0:
                return
            with suppress(BlockingIOError), self._lock(_flat(str(folder.relative_to(self._cache / "parts"))), fcntl.LOCK_EX | fcntl.LOCK_NB):
                bin.mkdir(parents=True, exist_ok=True)
                os.rename(folder, bin / "gone")  # whole until then, even where this process is killed now
                shutil.rmtree(bin / "gone")
                over -= size
        if over > 0:
            raise _NoRoom

    def _key(self, unit: str) -> str:
        return _flat(str((self.path / unit).relative_to(self._cache / "parts")))

    def _lock(self, name: str, how: int) -> IO[str]:
        """A lock among all processes of this machine; closing it frees it. Raises BlockingIOError with LOCK_NB."""
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
    if not done.cancelled() and done.exception() is None and (held := done.result()) is not None and held.lock is not None:
        _used(held.path)
        held.lock.close()


def _flat(name: str) -> str:
    return name.replace("/", "-")


def _used(path: Path) -> None:
    """A unit carries the time of its last use; finer than the kernel's own clock for it, whose ticks are milliseconds."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), time.time_ns()))


def _when(folder: Path) -> int:
    with suppress(OSError):
        return folder.stat().st_mtime_ns
    return 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
