"""Garbage collection of a root: files left behind by interrupted or superseded writers, and this
machine's copies of artifacts that the root no longer has. Finished artifacts, runs, ledgers, cells
and the checkpoints of unfinished artifacts are never listed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mesocosm import faults
from mesocosm.errors import ArtifactError, StorageError
from mesocosm.store import lease
from mesocosm.store.artifacts import COMMIT, KINDS, Storage

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$|^runs/[0-9a-f]{32}\.tmp$")
"""Names of the temporary files of `Storage.write`, `create` and `check_writable`."""
RECORDS = ("runs", "ledgers", "cells", lease.FOLDER)
STATE = {
    "runs/checkpoints": ("worlds", "agents"),
    "runs/episodes": ("datasets", "evaluations"),
    "runs/tokens": ("tokenizers",),
}
"""Folders that hold the state of unfinished artifacts by artifact id, and the artifacts' kinds."""
CHECKPOINTS = ("mesocosm-checkpoint-*", "mesocosm-universal-*")
"""Folders in the temporary folder: a rank's part of a checkpoint before its upload, and a
checkpoint that is being converted for another number of workers."""

Remove = Callable[[], bool | None]
Entry = tuple[int, float]
"""A file's size in bytes, and its time of change in seconds since the epoch."""
Entries = dict[str, Entry]


@dataclass(frozen=True)
class Garbage:
    """Files that may be removed together."""

    category: str
    path: str
    bytes: int
    age_s: int
    """Seconds since the newest of the files changed."""
    why: str
    remove: Remove = field(repr=False, compare=False)
    """Remove the files. Returns False and removes nothing if they have come into use since."""

    @staticmethod
    def of(
        category: str, path: str | Path, entries: Iterable[Entry], why: str, remove: Remove
    ) -> Garbage:
        sizes, times = zip(*entries, strict=True)
        return Garbage(category, str(path), sum(sizes), int(time.time() - max(times)), why, remove)

    @staticmethod
    def on_disk(category: str, path: Path, why: str, remove: Remove | None = None) -> Garbage:
        """A file or folder of this machine. It is removed whole unless `remove` is given."""
        stat = path.lstat()
        entries = [(0 if path.is_dir() else stat.st_size, stat.st_mtime)]
        for folder, _, names in os.walk(path):
            entries.append((0, os.lstat(folder).st_mtime))
            for name in names:
                with suppress(FileNotFoundError):
                    stat = os.lstat(os.path.join(folder, name))
                    entries.append((stat.st_size, stat.st_mtime))
        return Garbage.of(category, path, entries, why, remove or partial(_remove_path, path))

    def to_json(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in ("path", "bytes", "age_s", "why")}
        return {"what": self.category, **row}


def find(storage: Storage, remark: Callable[[str], None]) -> list[Garbage]:
    """All garbage of a root, whatever its age. `remark` receives what could not be examined."""
    return [
        *(_remote_artifacts(storage, remark) if storage.remote else _local_artifacts(storage)),
        *_scratch(storage, remark),
        *_local_temporaries(storage),
        *_state_of_finished(storage),
        *_leases(storage),
        *_checkpoint_folders(),
    ]


def _local_artifacts(storage: Storage) -> Iterator[Garbage]:
    for kind in KINDS:
        for id in storage.list(kind):
            folder, remove = storage.local_path(kind, id), partial(storage.discard, f"{kind}/{id}")
            if storage.is_damaged(kind, id):
                yield Garbage.on_disk("damaged artifact", folder, f"{COMMIT} is damaged", remove)
            elif folder.is_dir() and not (folder / COMMIT).exists():
                yield Garbage.on_disk("unfinished artifact", folder, f"it has no {COMMIT}", remove)


def _remote_artifacts(storage: Storage, remark: Callable[[str], None]) -> Iterator[Garbage]:
    uploads: Entries = {}
    try:
        uploads = storage.uploads()
    except (StorageError, OSError, NotImplementedError) as error:
        text = faults.first_line(error.__cause__ or error)
        fix = "see the bucket's lifecycle rules"
        remark(f"unfinished uploads are not listed by {storage.root!r} ({text}); {fix}")
    for kind in KINDS:
        artifacts: dict[str, Entries] = defaultdict(dict)
        for path, entry in storage.files(kind).items():
            artifacts[path.split("/")[1]][path] = entry
        finished: dict[str, str] = {}
        damaged: set[str] = set()
        for id, files in artifacts.items():
            try:
                folder = storage.folder_of(kind, id)
            except ArtifactError:
                damaged.add(id)
                url, remove = storage.url(kind, id), partial(storage.discard, f"{kind}/{id}")
                why = f"{COMMIT} is damaged"
                yield Garbage.of("damaged artifact", url, files.values(), why, remove)
                continue
            if folder is not None:
                finished[id] = folder
            yield from _unnamed_folders(storage, f"{kind}/{id}", folder, files, uploads)
        yield from _stale_copies(storage, kind, finished, damaged)
    for top in (*RECORDS, "scratch"):
        for path, entry in storage.files(top).items():
            if TEMPORARY.search(path) or top == "scratch":
                url, remove_file = storage.url(path), partial(storage.remove, path)
                why = "its writer was killed"
                yield Garbage.of("temporary file", url, [entry], why, remove_file)
    for name, entry in uploads.items():
        why, abort = "unfinished: its parts take room", partial(storage.abort_upload, name)
        yield Garbage.of("upload", storage.url(name), [entry], why, abort)


def _unnamed_folders(
    storage: Storage, artifact: str, named: str | None, files: Entries, uploads: Entries
) -> Iterator[Garbage]:
    """Folders in `kind/id` that COMMIT.json does not name. `named` is the folder that it names."""
    folders: dict[str, list[Entry]] = defaultdict(list)
    for path, entry in files.items():
        folder, _, name = path.removeprefix(f"{artifact}/").partition("/")
        if name:
            folders[folder].append(entry)
    if named is not None and named not in folders:
        return  # the finished artifact has lost its files: opening it reports that
    for path, (_, modified) in uploads.items():
        folder = path.removeprefix(f"{artifact}/").partition("/")[0]
        if path.startswith(f"{artifact}/") and folder in folders:
            folders[folder].append((0, modified))  # its parts are listed apart, but show its age
    category = "unfinished artifact" if named is None else "superseded files"
    why = f"there is no {COMMIT}: its maker was killed"
    if named is not None:
        why = f"{COMMIT} does not name it: its maker was slower, or killed"
    for folder, entries in folders.items():
        if folder != named:
            remove = partial(storage.discard, f"{artifact}/{folder}")
            yield Garbage.of(category, storage.url(artifact, folder), entries, why, remove)


def _stale_copies(
    storage: Storage, kind: str, finished: dict[str, str], damaged: set[str]
) -> Iterator[Garbage]:
    """This machine's copies of files that a remote root no longer has.

    Copies of damaged artifacts stay. `finished` maps each finished artifact to its folder.
    """
    for folder in _entries(storage.local_path("cache", kind)):
        if folder.name not in finished and folder.name not in damaged:
            why = f"{kind}/{folder.name} is gone from {storage.root}"
            yield Garbage.on_disk("cache", folder, why)
    for artifact in _entries(storage.local_path("cache", "parts", kind)):
        for folder in _entries(artifact):
            if artifact.name not in damaged and folder.name != finished.get(artifact.name):
                why = f"{storage.root} has no such {kind}/{artifact.name} any more"
                yield Garbage.on_disk("cache", folder, why)


def _scratch(storage: Storage, remark: Callable[[str], None]) -> Iterator[Garbage]:
    for path in _entries(storage.local_path("scratch")):
        if (only := _only_copy(storage, path)) is None:
            yield Garbage.on_disk("scratch", path, "its process was killed")
        else:
            fix = f"run its job again, or move the folder to {only[1]}"
            remark(f"{only[0]} is the only copy of {only[1]}, which was to be replaced: {fix}")


def _only_copy(storage: Storage, scratch: Path) -> tuple[Path, str] | None:
    """The old artifact, where a process with --force was killed between moving it to scratch and
    putting the new one in its place.
    """
    for marker in scratch.glob(f"*/{COMMIT}"):
        with suppress(ValueError, KeyError, TypeError):
            commit = json.loads(marker.read_bytes())
            name = f"{commit['kind']}/{commit['id']}"
            if storage.read(f"{name}/{COMMIT}") is None:
                return marker.parent, storage.url(name)
    return None


def _local_temporaries(storage: Storage) -> Iterator[Garbage]:
    base = storage.local_path()
    for top in ("cache",) if storage.remote else RECORDS:
        for path in (base / top).rglob("*.tmp"):
            if path.is_file() and TEMPORARY.search(path.relative_to(base).as_posix()):
                yield Garbage.on_disk("temporary file", path, "its writer was killed")


def _state_of_finished(storage: Storage) -> Iterator[Garbage]:
    """State of artifacts that are finished: their job was killed before it removed it."""
    for top, kinds in STATE.items():
        entries: dict[str, list[Entry]] = defaultdict(list)
        for path, entry in storage.files(top).items():
            entries[path.split("/")[2]].append(entry)
        for id in entries:
            for kind in kinds:
                if not storage.is_damaged(kind, id) and storage.commit_of(kind, id) is not None:
                    path, why = f"{top}/{id}", f"{kind}/{id} is finished"
                    remove = partial(storage.remove, path)
                    yield Garbage.of("checkpoint", storage.url(path), entries[id], why, remove)
                    break


def _leases(storage: Storage) -> Iterator[Garbage]:
    """Leases of processes that are gone, or on another host, where a live one renews its file."""
    for path, entry in storage.files(lease.FOLDER).items():
        record = lease.Claim.parse(storage.read(path) or b"")
        alive = False if record is None else record.owner.alive()
        if not alive:
            why = "its process is gone"
            if record is not None and alive is None:
                why = f"its process is on host {record.owner.host}"
            remove = partial(storage.remove, path)
            yield Garbage.of("lease", storage.url(path), [entry], why, remove)


def _checkpoint_folders() -> Iterator[Garbage]:
    folder = Path(tempfile.gettempdir())
    for path in sorted(path for pattern in CHECKPOINTS for path in folder.glob(pattern)):
        if path.stat().st_uid == os.getuid():
            why = "a worker was killed while it saved or loaded a checkpoint"
            yield Garbage.on_disk("scratch", path, why)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
