"""Artifacts, which appear whole or not at all.

    ROOT/KIND/ID/...                an artifact. COMMIT.json (checksums, lineage) is written last.
                                    A remote root cannot rename folders: there the files are in a
                                    subfolder of their writer, which COMMIT.json names.
    ROOT/runs/JOB/ID/...            a run's config.yaml, status.json, metrics.jsonl, log.txt
    ROOT/ledgers/ID/NNNNNNNN.json   an append-only journal: record n is created exclusively

A root is a folder or `s3://bucket/prefix`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mesocosm import __version__
from mesocosm.errors import ArtifactError, UsageError, nearest
from mesocosm.store.files import entry, files_of, make_folder, replace, sha256, sync, sync_tree
from mesocosm.store.root import KINDS, Root

__all__ = ["COMMIT", "KINDS", "SCHEMA", "Artifact", "Commit", "Storage"]

COMMIT = "COMMIT.json"
SCHEMA = 1
TRANSFERS = 4
"""Files of an artifact that are transferred, or checked, concurrently."""


class FileEntry(TypedDict):
    sha256: str
    bytes: int


class Commit(TypedDict):
    """The content of COMMIT.json."""

    schema: int
    kind: str
    id: str
    code: NotRequired[str]
    created: str
    meta: dict[str, Any]
    files: dict[str, FileEntry]
    folder: NotRequired[str]
    """On a remote root: the folder in `kind/id` that holds the files."""


_COMMIT = TypeAdapter(Commit)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. `path` is a local folder with verified checksums."""

    kind: str
    id: str
    path: Path
    uri: str
    meta: dict[str, Any] = field(default_factory=dict)
    """Lineage (`inputs`), config and counts, as its job recorded them."""

    @property
    def name(self) -> str:
        """`kind/id`, which `Storage.artifact` accepts."""
        return f"{self.kind}/{self.id}"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Storage(Root):
    """The artifacts of one root, for any process. `say` receives messages for the user."""

    def __init__(self, root: str, say: Callable[[str], None] = _print):
        super().__init__(root)
        self._say = say

    # -- reading -------------------------------------------------------------------------------

    def find(self, kind: str, id: str) -> Artifact | None:
        """The finished artifact with verified checksums; None where none is committed."""
        commit = self.commit_of(kind, id)
        return None if commit is None else self._open(commit)

    def artifact(self, kind: str, ref: str) -> Artifact:
        """The artifact that `ref` names, verified. See `find_commit`."""
        return self._open(self.find_commit(kind, ref))

    def find_commit(self, kind: str, ref: str) -> Commit:
        """The COMMIT.json that `ref` names: an id, `kind/id`, or a unique prefix of an id.

        Raises:
            UsageError: There is no such artifact, or the prefix is ambiguous.
            ArtifactError: COMMIT.json is damaged.
        """
        id = ref.removeprefix(f"{kind}/")
        if id and "/" not in id and (exact := self.commit_of(kind, id)) is not None:
            return exact
        folders = self.list(kind)
        ids = [name for name in folders if self.read(f"{kind}/{name}/{COMMIT}") is not None]
        matches = [name for name in ids if id and name.startswith(id)]
        if len(matches) > 1:
            names = ", ".join(matches[:5])
            raise UsageError(f"{kind} id {ref!r} is ambiguous in {self.root!r}: {names}")
        commit = self.commit_of(kind, matches[0]) if matches else None
        if commit is not None:
            return commit
        names = (", ".join(ids[:5]) or "none yet") + (" and others" if len(ids) > 5 else "")
        fix = nearest(id, ids) or f"; give an id: {self.url(kind)} holds {names}"
        if id and id in folders:
            fix = "; its job was interrupted: run it again"
        raise UsageError(f"no artifact {kind}/{id or repr(id)} in storage.root {self.root!r}{fix}")

    def commit_of(self, kind: str, id: str) -> Commit | None:
        """The artifact's COMMIT.json, or None. Raises ArtifactError where it is damaged."""
        raw = self.read(f"{kind}/{id}/{COMMIT}")
        return None if raw is None else self._parse(kind, id, raw)

    def _parse(self, kind: str, id: str, raw: bytes) -> Commit:
        """Raises ArtifactError where COMMIT.json is empty, torn, or of something else."""
        problem = None
        try:
            commit = _COMMIT.validate_json(raw, strict=True)
            if (commit["kind"], commit["id"]) != (kind, id):
                problem = f"it is of {commit['kind']}/{commit['id']}"
            elif self.remote and "folder" not in commit:
                problem = "it names no folder"
        except ValidationError as error:
            torn = error.errors()[0]["type"] == "json_invalid"
            problem = "it is cut short" if torn else "it does not describe an artifact"
            if not raw.strip():
                problem = "it is empty"
        if problem is not None:
            raise ArtifactError(
                f"{kind}/{id}: {COMMIT} is damaged ({problem}); restore"
                f" {self.url(kind, id)}/{COMMIT} from a copy, make the artifact again by its job"
                " with --force, or remove it by `mesocosm storage gc`"
            )
        # A name that leads out of the artifact would overwrite other files of this machine.
        for name in (*commit["files"], commit.get("folder", "")):
            if name.startswith("/") or ".." in name.split("/"):
                problem = f"{COMMIT} names {name!r}, which is outside of the artifact"
                fix = "it was not made by this project, do not use it"
                raise ArtifactError(f"{kind}/{id}: {problem}; {fix}")
        return commit

    def is_damaged(self, kind: str, id: str) -> bool:
        """True if there is a COMMIT.json that cannot be used."""
        try:
            self.commit_of(kind, id)
        except ArtifactError:
            return True
        return False

    def folder_of(self, kind: str, id: str) -> str | None:
        """On a remote root: the folder in `kind/id` that holds the finished artifact's files."""
        commit = self.commit_of(kind, id)
        return None if commit is None else commit["folder"]

    def artifact_path(self, kind: str, id: str) -> Path:
        """The local folder of an artifact: its copy in the cache where the root is remote."""
        return self.local_path("cache", kind, id) if self.remote else Path(self._path(kind, id))

    def _open(self, commit: Commit) -> Artifact:
        """Verify the files, fetching those of a remote root that are missing or wrong here."""
        kind, id = commit["kind"], commit["id"]
        local = self.artifact_path(kind, id)

        def check(name: str) -> None:
            path, expected = local / name, commit["files"][name]["sha256"]
            if path.exists() and sha256(path) == expected:
                return
            if self.remote and self.fetch(commit, name, path) and sha256(path) == expected:
                return
            raise self.damaged(commit, name, missing=not path.exists())

        with self.storage_errors(f"{kind}/{id}"), _concurrently(check, commit["files"]):
            pass
        return Artifact(kind, id, local, self.url(kind, id), commit["meta"])

    def fetch(self, commit: Commit, name: str, path: Path) -> bool:
        """Fetch a remote artifact's file into `path`, whole. False where there is no such file."""
        kind, id = commit["kind"], commit["id"]
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with self.storage_errors(f"{kind}/{id}"):
                make_folder(path.parent)
                self.fs.get_file(self._path(kind, id, commit["folder"], name), str(temporary))
                sync(temporary)
                replace(temporary, path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def damaged(self, commit: Commit, name: str, *, missing: bool) -> ArtifactError:
        """The error for a file of the root that is missing or differs from COMMIT.json."""
        kind, id = commit["kind"], commit["id"]
        folder = [commit["folder"]] if self.remote else []
        job = f"`mesocosm {commit['meta']['job']}`" if "job" in commit["meta"] else "its job"
        problem = "is missing" if missing else f"is damaged (its sha256 is not that of {COMMIT})"
        return ArtifactError(
            f"{kind}/{id}: file {name!r} {problem}; make the artifact again by {job} with --force,"
            f" or restore {self.url(kind, id, *folder, name)} from a copy"
        )

    # -- writing -------------------------------------------------------------------------------

    def make(
        self,
        kind: str,
        id: str,
        meta: Mapping[str, Any],
        fill: Callable[[Path], object],
        *,
        force: bool = False,
    ) -> Artifact:
        """Find the artifact, or fill a scratch folder with `fill` and commit it whole.

        Of two writers at once the first to commit wins: the commit marker is created exclusively.
        The other reports it and returns the winner's artifact. With `force` the finished artifact
        stays until the new one is whole and replaces it.
        """
        assert kind in KINDS, kind
        if not force and (artifact := self.find(kind, id)) is not None:
            return artifact
        with self.storage_errors(f"{kind}/{id}"), self.scratch() as folder:
            fill(folder)
            created = datetime.now(UTC).isoformat()
            commit = {"schema": SCHEMA, "kind": kind, "id": id, "code": __version__}
            commit |= {"created": created, "meta": dict(meta)}
            commit_files = self._upload if self.remote else self._move
            won = commit_files(folder, commit, force)
            path = self.artifact_path(kind, id)
            if won and (not self.remote or self._keep(folder, path)):
                return Artifact(kind, id, path, self.url(kind, id), json.loads(json.dumps(meta)))
        if not won:
            result = "its files are used, those made here are dropped"
            self._say(f"{kind}/{id} was finished by another process meanwhile: {result}")
        artifact = self.find(kind, id)
        assert artifact is not None
        return artifact

    def _move(self, folder: Path, commit: dict[str, Any], force: bool) -> bool:
        """Commit on a local root by a rename. Returns False where another writer's stays."""
        target = self._path(commit["kind"], commit["id"])
        commit["files"] = {name: entry(folder / name) for name in files_of(folder)}
        (folder / COMMIT).write_bytes(_to_json(commit))
        sync_tree(folder)
        make_folder(os.path.dirname(target))
        if os.path.isdir(target) and not os.path.exists(os.path.join(target, COMMIT)):
            shutil.rmtree(target, ignore_errors=True)
        with self.scratch() as scratch:
            old = scratch / commit["id"]
            if force:
                with suppress(FileNotFoundError):
                    replace(target, old)
            try:
                replace(folder, target)
            except OSError:
                if not os.path.exists(os.path.join(target, COMMIT)):
                    with suppress(OSError):
                        replace(old, target)
                    raise
                return False
        return True

    def _upload(self, folder: Path, commit: dict[str, Any], force: bool) -> bool:
        """Commit on a remote root. Returns False where another writer's artifact stays. Each writer
        has its own folder, so that a slower one overwrites nothing of the winner's.
        """
        kind, id, mine = commit["kind"], commit["id"], uuid.uuid4().hex[:12]
        marker = f"{kind}/{id}/{COMMIT}"
        names = files_of(folder)

        def put(name: str) -> None:
            self.fs.put_file(str(folder / name), self._path(kind, id, mine, name))

        with _concurrently(put, names):
            commit |= {"folder": mine, "files": {name: entry(folder / name) for name in names}}
        if self.create(marker, _to_json(commit)):
            return True
        current = None if self.is_damaged(kind, id) else self.folder_of(kind, id)
        if current == mine:  # the endpoint refused its client's repetition of this request
            return True
        if force:
            self.write(marker, _to_json(commit))
        if superseded := current if force else mine:
            with suppress(FileNotFoundError):
                self.fs.rm(self._path(kind, id, superseded), recursive=True)
        return force

    def _keep(self, folder: Path, cached: Path) -> bool:
        """Move the files that were uploaded into this machine's cache. Returns False on failure."""
        make_folder(cached.parent)
        with self.scratch() as scratch, suppress(FileNotFoundError):
            os.rename(cached, scratch / "old")
        try:
            replace(folder, cached)
        except OSError:
            return False
        return True

    def discard(self, path: str) -> bool:
        """Remove an artifact `kind/id` that is unfinished or damaged, or on a remote root a folder
        `kind/id/folder` that its COMMIT.json does not name. Returns False and removes nothing if
        the artifact has become whole, or the folder named, since.
        """
        kind, id, *folder = path.split("/")
        if not self.remote:
            return self._discard_local(kind, id)
        if self.folder_of(kind, id) == folder[0] if folder else not self.is_damaged(kind, id):
            return False
        self._remove(path)
        return True

    def _discard_local(self, kind: str, id: str) -> bool:
        target = self._path(kind, id)
        # In scratch no other process can complete the folder.
        with self.storage_errors(f"{kind}/{id}"), self.scratch() as scratch:
            folder = scratch / id
            try:
                os.rename(target, folder)
                self._parse(kind, id, (folder / COMMIT).read_bytes())
            except (FileNotFoundError, ArtifactError):
                return True
            replace(folder, target)
        return False


def _to_json(commit: dict[str, Any]) -> bytes:
    return json.dumps(commit, indent=1, sort_keys=True).encode()


@contextmanager
def _concurrently(work: Callable[[str], None], names: Iterable[str]) -> Iterator[None]:
    """Do `work` on several names at a time while the block runs. At its end all is done, or the
    first error in the order of the names is raised.
    """
    pool = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="storage")
    try:
        futures = [pool.submit(work, name) for name in names]
        yield
        for future in futures:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
