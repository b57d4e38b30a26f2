"""What may go from a root: what interrupted and slower makers left, and what this machine keeps of
artifacts that are gone.

Nothing that a job may still be writing: only what has not changed for a stated time, of a folder
its newest file. Never a finished artifact that can be opened, a run, a ledger, a cell, or the
checkpoint of an unfinished artifact: of what lies in their folders only the temporary files of
writes that were cut short.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mesocosm import faults
from mesocosm.cluster import ray_session
from mesocosm.errors import StorageError
from mesocosm.store import lease
from mesocosm.store.artifacts import COMMIT, KINDS, Storage

TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$|^runs/[0-9a-f]{32}\.tmp$")
"""Names that `Storage.write` and its like give to what is not whole yet."""
RECORDS = ("runs", "ledgers", "cells", lease.FOLDER)
MAKING = {"runs/checkpoints": ("worlds", "agents"), "runs/episodes": ("datasets", "evaluations")}
"""Folders that hold the state of a making, by the id of the artifact that is made, and its kinds.
"""
CHECKPOINTS = ("mesocosm-checkpoint-*", "mesocosm-universal-*")
"""In this machine's temporary folder: a rank's part of a checkpoint, until it is uploaded, and a
checkpoint that is converted for another number of workers, until it is loaded."""
SESSION = "Ray session"


DAMAGED = "damaged artifact"


@dataclass(frozen=True)
class Remain:
    """Something that may go."""

    what: str
    path: str
    bytes: int
    age_s: int
    why: str
    remove: Callable[[], bool] = field(repr=False, compare=False)
    """False, and nothing is done, where it is needed by now."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("what", "path", "bytes", "age_s", "why")}


def find(storage: Storage, older_than_s: float, remark: Callable[[str], None]) -> list[Remain]:
    """All that may go and has not changed for so long, in the order of their kinds. What could not
    be looked at is remarked.
    """
    found = list(_of_remote(storage, remark) if storage.remote else _of_local(storage))
    found += _scratch(storage, remark)
    found += _local_temporaries(storage)
    found += [*_finished(storage), *_leases(storage)]
    found += _checkpoints()
    found += _sessions()
    return [remain for remain in found if remain.age_s >= older_than_s]


def _of_local(storage: Storage) -> Iterator[Remain]:
    for kind in KINDS:
        for id in storage.list(kind):
            folder = storage.local_path(kind, id)
            if storage.is_damaged(kind, id):
                remove = partial(storage.discard_damaged, kind, id)
                yield _on_disk(DAMAGED, folder, f"its {COMMIT} cannot be used", remove)
            elif folder.is_dir() and not (folder / COMMIT).exists():
                yield _on_disk(
                    "unfinished artifact",
                    folder,
                    f"it has no {COMMIT}",
                    partial(storage.discard, f"{kind}/{id}"),
                )


def _of_remote(storage: Storage, remark: Callable[[str], None]) -> Iterator[Remain]:
    uploads: dict[str, tuple[int, float]] = {}
    try:
        uploads = storage.uploads()
    except (StorageError, OSError, NotImplementedError) as error:
        text = faults.first_line(error.__cause__ or error)
        remark(
            f"uploads that were begun and not finished are not listed by {storage.root!r} ({text});"
            " see the bucket's lifecycle rules"
        )
    finished: dict[str, set[str]] = {}
    damaged: dict[str, set[str]] = {}
    for kind in KINDS:
        files = storage.files(kind)
        finished[kind] = {
            path.split("/")[1]
            for path in files
            if path.endswith(f"/{COMMIT}") and path.count("/") == 2
        }
        damaged[kind] = {id for id in finished[kind] if storage.is_damaged(kind, id)}
        for id in sorted(damaged[kind]):
            yield _damaged(storage, kind, id, files)
        files = {p: facts for p, facts in files.items() if p.split("/")[1] not in damaged[kind]}
        finished[kind] -= damaged[kind]
        yield from _folders(storage, kind, finished[kind], files, uploads)
    for top in (*RECORDS, "scratch"):
        for path, (bytes, modified) in storage.files(top).items():
            if TEMPORARY.search(path) or top == "scratch":
                yield Remain(
                    "temporary file",
                    storage.url(path),
                    bytes,
                    _age(modified),
                    "its writer was killed",
                    partial(_removed, storage, path),
                )
    for name, (bytes, modified) in uploads.items():
        yield Remain(
            "upload",
            storage.url(name),
            bytes,
            _age(modified),
            "begun, not finished: its parts take room",
            partial(_given_up, storage, name),
        )
    yield from _gone(storage, finished, damaged)


def _damaged(storage: Storage, kind: str, id: str, files: dict[str, tuple[int, float]]) -> Remain:
    """An artifact of a remote root whose COMMIT.json cannot be used."""
    facts = [entry for path, entry in files.items() if path.startswith(f"{kind}/{id}/")]
    size = sum(bytes for bytes, _ in facts)
    age = _age(max(modified for _, modified in facts))
    remove = partial(storage.discard_damaged, kind, id)
    return Remain(DAMAGED, storage.url(kind, id), size, age, f"its {COMMIT} cannot be used", remove)


def _folders(
    storage: Storage,
    kind: str,
    finished: set[str],
    files: dict[str, tuple[int, float]],
    uploads: dict[str, tuple[int, float]],
) -> Iterator[Remain]:
    """Makers' folders that no COMMIT.json names."""
    makers: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for path, entry in files.items():
        _, id, *rest = path.split("/")
        if len(rest) > 1:
            makers[id][rest[0]].append(entry)
    for path, entry in uploads.items():
        top, id, maker, *rest = [*path.split("/"), "", "", ""]
        if top == kind and rest[0] and maker in makers[id]:
            makers[id][maker].append(
                (0, entry[1])
            )  # its parts are listed apart, but somebody is at work here
    for id, folders in makers.items():
        if id in finished and (len(folders) == 1 or storage.folder_of(kind, id) not in folders):
            continue  # whole; or damaged, which is the business of whoever opens it
        named = storage.folder_of(kind, id)
        why = (
            f"{COMMIT} does not name it: its maker was slower, or killed"
            if id in finished
            else f"there is no {COMMIT}: its maker was killed"
        )
        for folder, entries in folders.items():
            if folder != named:
                path = f"{kind}/{id}/{folder}"
                newest = max(modified for _, modified in entries)
                size = sum(bytes for bytes, _ in entries)
                what = "superseded files" if id in finished else "unfinished artifact"
                yield Remain(
                    what, storage.url(path), size, _age(newest), why, partial(storage.discard, path)
                )


def _gone(
    storage: Storage, finished: dict[str, set[str]], damaged: dict[str, set[str]]
) -> Iterator[Remain]:
    """This machine's copies of artifacts that the root has no more. Those of damaged ones stay."""
    for kind in KINDS:
        for folder in _entries(storage.local_path("cache", kind)):
            if folder.name not in finished[kind] | damaged[kind]:
                yield _on_disk(
                    "cache",
                    folder,
                    f"{kind}/{folder.name} is gone from {storage.root}",
                    partial(_rmtree, folder),
                )
        for part in _entries(storage.local_path("cache", "parts", kind)):
            if part.name in damaged[kind]:
                continue
            named = storage.folder_of(kind, part.name) if part.name in finished[kind] else None
            for folder in _entries(part):
                if folder.name != named:
                    yield _on_disk(
                        "cache",
                        folder,
                        f"{storage.root} has no such {kind}/{part.name} any more",
                        partial(_rmtree, folder),
                    )


def _scratch(storage: Storage, remark: Callable[[str], None]) -> Iterator[Remain]:
    for path in _entries(storage.local_path("scratch")):
        if (only := _only_copy(storage, path)) is None:
            yield _on_disk("scratch", path, "its process was killed", partial(_rmtree, path))
        else:
            remark(
                f"{only[0]} is the only copy of {only[1]}, kept while it was to be replaced: run"
                f" its job again, or move the folder to {only[1]}"
            )


def _only_copy(storage: Storage, scratch: Path) -> tuple[Path, str] | None:
    """The old artifact, where a maker with --force was killed between putting it away and putting
    the new one there.
    """
    for marker in scratch.glob(f"*/{COMMIT}"):
        try:
            commit = json.loads(marker.read_bytes())
            name = f"{commit['kind']}/{commit['id']}"
        except (ValueError, KeyError, TypeError):
            continue
        if storage.read(f"{name}/{COMMIT}") is None:
            return marker.parent, storage.url(name)
    return None


def _local_temporaries(storage: Storage) -> Iterator[Remain]:
    for top in ("cache",) if storage.remote else RECORDS:
        for path in storage.local_path(top).rglob("*.tmp"):
            if path.is_file() and TEMPORARY.search(
                path.relative_to(storage.local_path()).as_posix()
            ):
                yield _on_disk(
                    "temporary file", path, "its writer was killed", partial(_rmtree, path)
                )


def _finished(storage: Storage) -> Iterator[Remain]:
    """State of artifacts that are finished: their maker was killed before it removed it."""
    for top, kinds in MAKING.items():
        files: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for path, entry in storage.files(top).items():
            files[path.split("/")[2]].append(entry)
        for id, entries in files.items():
            made = [kind for kind in kinds if _is_whole(storage, kind, id)]
            if made:
                path = f"{top}/{id}"
                size = sum(bytes for bytes, _ in entries)
                age = _age(max(modified for _, modified in entries))
                why = f"{made[0]}/{id} is finished"
                remove = partial(_removed, storage, path)
                yield Remain("checkpoint", storage.url(path), size, age, why, remove)


def _leases(storage: Storage) -> Iterator[Remain]:
    """Leases of processes that are gone, or run on another host. A live one there renews its file's
    age every BEAT_S seconds.
    """
    for path, (bytes, modified) in storage.files(lease.FOLDER).items():
        record = lease.Record.parse(storage.read(path) or b"")
        alive = False if record is None else record.owner.alive()
        if not alive:
            why = "its process is gone"
            if record is not None and alive is None:
                why = f"its process is on host {record.owner.host}"
            remove = partial(_removed, storage, path)
            yield Remain("lease", storage.url(path), bytes, _age(modified), why, remove)


def _is_whole(storage: Storage, kind: str, id: str) -> bool:
    there = storage.read(f"{kind}/{id}/{COMMIT}") is not None
    return there and not storage.is_damaged(kind, id)


def _checkpoints() -> Iterator[Remain]:
    folder = Path(tempfile.gettempdir())
    for path in sorted(path for pattern in CHECKPOINTS for path in folder.glob(pattern)):
        if path.stat().st_uid == os.getuid():
            why = "a worker was killed while it saved or loaded a checkpoint"
            yield _on_disk("scratch", path, why, partial(_rmtree, path))


def _sessions() -> Iterator[Remain]:
    """Folders of private Rays whose processes were killed. TMPDIR holds a link where the folder
    lies elsewhere.
    """
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{ray_session.SESSION}*")):
        folder = path.resolve()
        if not folder.is_dir():
            yield _on_disk(SESSION, path, "its folder is gone", partial(_rmtree, path))
        elif folder.stat().st_uid == os.getuid() and ray_session.session_ended(folder):
            remove = partial(_remove_session, path, folder)
            yield _on_disk(SESSION, folder, "its process was killed", remove)


def _remove_session(path: Path, folder: Path) -> bool:
    if not ray_session.session_ended(folder):
        return False
    shutil.rmtree(folder)
    if path.is_symlink():
        path.unlink()
    return True


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _on_disk(what: str, path: Path, why: str, remove: Callable[[], bool]) -> Remain:
    size, newest = 0, path.lstat().st_mtime
    for folder, _, names in os.walk(path):
        newest = max(newest, os.lstat(folder).st_mtime)
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(folder, name))
                size, newest = size + found.st_size, max(newest, found.st_mtime)
    return Remain(
        what, str(path), size or path.lstat().st_size * path.is_file(), _age(newest), why, remove
    )


def _age(modified: float) -> int:
    return int(time.time() - modified)


def _rmtree(path: Path) -> bool:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return True


def _removed(storage: Storage, path: str) -> bool:
    storage.remove(path)
    return True


def _given_up(storage: Storage, upload: str) -> bool:
    storage.give_up(upload)
    return True
