"""An artifact of which this machine fetches and verifies what is asked for: datasets larger than its disk, and opening in a time that does not
depend on their size.

A remote root's files come into the same cache that `Storage.artifact` uses, one file one checksum, shared by the processes of a node: a lock lets one
fetch while the others wait, and a file appears whole. Over its budget the cache gives up the shards (folders of shards/) that were used least
recently, of all datasets of the root; a process that has one mapped keeps reading it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesocosm.durable import sha256
from mesocosm.errors import ArtifactError

if TYPE_CHECKING:
    from mesocosm.storage import Storage

AT_ONCE = 4
"""Files that are fetched, or verified, at once."""


class Partial:
    """Made by `Storage.partial`. What is on this machine already is handed out at once and verified in a thread: what that finds is raised by the
    next call, or by `confirm`, which waits for it. What is fetched is verified before it is handed out.

    Every method raises ArtifactError, naming the file and how to repair it, for what was found to be damaged or missing.
    """

    def __init__(self, storage: Storage, kind: str, id: str, path: Path, commit: Mapping[str, Any], most: int | None):
        self.name, self.id, self.path = f"{kind}/{id}", id, path
        self._storage, self._kind, self._commit = storage, kind, commit
        self._most = most if storage.remote else None
        self._under_way: dict[str, Future[None]] = {}
        self._trouble: Exception | None = None
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="partial")

    def bytes(self, folder: str) -> dict[str, int]:
        """Of each folder within a folder, as COMMIT.json says."""
        found: dict[str, int] = {}
        for name, entry in self._commit["files"].items():
            if name.startswith(f"{folder}/") and name.count("/") > folder.count("/") + 1:
                inner = name.split("/")[folder.count("/") + 1]
                found[inner] = found.get(inner, 0) + int(entry["bytes"])
        return found

    def file(self, name: str) -> Path:
        """Where the file lies on this machine."""
        self.check()
        path = self.path / name
        if name not in self._commit["files"]:
            return path  # its reader says what is wrong
        self.ahead([name])
        under_way = self._under_way[name]
        here = self._is_here(name)
        if not here and under_way.done() and under_way.exception() is None:  # evicted since
            del self._under_way[name]
            self.ahead([name])
            under_way = self._under_way[name]
        if not here:
            under_way.result()
        self._used(path)
        return path

    def ahead(self, names: Iterable[str]) -> None:
        """Begin to fetch or verify files that will be asked for."""
        for name in names:
            if name in self._commit["files"] and name not in self._under_way:
                self._under_way[name] = self._pool.submit(self._make_sure, name)

    def forget(self, names: Iterable[str]) -> None:
        """Files that will not be asked for soon: when they are, they are fetched or verified anew."""
        for name in names:
            if (under_way := self._under_way.get(name)) is not None and under_way.done() and under_way.exception() is None:
                del self._under_way[name]

    def confirm(self) -> None:
        """Wait until all that was asked for is verified."""
        for under_way in list(self._under_way.values()):
            under_way.result()

    def check(self) -> None:
        """Raise what was found by now."""
        if self._trouble is not None:
            raise self._trouble

    # -- in the threads ------------------------------------------------------------------------------------------

    def _is_here(self, name: str) -> bool:
        with suppress(OSError):
            return (self.path / name).stat().st_size == self._commit["files"][name]["bytes"]
        return False

    def _make_sure(self, name: str) -> None:
        try:
            self._fetch_or_verify(name)
        except Exception as error:
            self._trouble = error
            raise

    def _fetch_or_verify(self, name: str) -> None:
        path, storage = self.path / name, self._storage
        told = (self._kind, self.id, self._commit, name)
        if not storage.remote:
            if not self._is_here(name) or sha256(path) != self._commit["files"][name]["sha256"]:
                raise storage.damaged(*told, there=path.exists())
            return
        with self._lock(name.replace("/", "-")):
            if self._is_here(name):
                self._check_cached(name)
                return
            self._make_room(self._commit["files"][name]["bytes"])
            arriving = path.with_name(f"{path.name}.arriving")
            try:
                if not storage.fetch(*told, arriving) or sha256(arriving) != self._commit["files"][name]["sha256"]:
                    raise storage.damaged(*told, there=arriving.exists())
                self._used(path)
                os.replace(arriving, path)
            finally:
                arriving.unlink(missing_ok=True)

    def _check_cached(self, name: str) -> None:
        path = self.path / name
        with suppress(FileNotFoundError):  # given up by another process meanwhile: fetched when asked for
            if sha256(path) != self._commit["files"][name]["sha256"]:
                path.unlink()
                here = f"file {name!r} is damaged in this machine's cache (its sha256 is not that of COMMIT.json)"
                raise ArtifactError(f"{self.name}: {here} and was removed from it; run the same command again, which fetches {path} anew")

    # -- the cache -----------------------------------------------------------------------------------------------

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Of all processes of this machine."""
        folder = self._storage.local_path("cache", "locks")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{self.id}-{name}", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _used(self, path: Path) -> None:
        """A shard's folder carries the time of its last use."""
        if self._most is not None:
            with suppress(FileNotFoundError):
                os.utime(path.parent)

    def _make_room(self, bytes: int) -> None:
        if self._most is None:
            return
        with self._lock("room"):
            shards = [(folder, _size(folder)) for folder in self._storage.local_path("cache", self._kind).glob("*/shards/*")]
            over = sum(size for _, size in shards) + bytes - self._most
            for folder, size in sorted(shards, key=lambda shard: _when(shard[0])):
                if over <= 0:
                    return
                shutil.rmtree(folder, ignore_errors=True)
                over -= size


def _when(folder: Path) -> int:
    with suppress(FileNotFoundError):
        return folder.stat().st_mtime_ns
    return 0


def _size(folder: Path) -> int:
    found = 0
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            found += path.stat().st_size
    return found
