"""Storage is the truth: artifacts that appear whole or not at all, and small durable records.

    ROOT/<kind>/<id>/...            an artifact; COMMIT.json (checksums, lineage) is written last. On a remote root, where folders
                                    cannot be renamed, its files lie in a folder of their maker's
                                    own, which COMMIT.json names
    ROOT/runs/<job>/<id>/...        a run's config.yaml, status.json, metrics.jsonl, log.txt, checkpoints
    ROOT/ledgers/<id>/NNNNNNNN.json an append-only journal: record n is created exclusively

root.py reads and writes; this module makes artifacts of it. A root is a folder or
`s3://bucket/prefix`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from mesocosm import __version__
from mesocosm.errors import ArtifactError, UsageError, nearest
from mesocosm.store.cache import Partial
from mesocosm.store.commit import COMMIT, SCHEMA, Commit, parse
from mesocosm.store.files import entry, files_of, make_folder, replace, sha256, sync, sync_tree
from mesocosm.store.root import KINDS, Root

__all__ = ["COMMIT", "KINDS", "SCHEMA", "Artifact", "Storage"]

AT_ONCE = 4
"""Files of an artifact that are transferred, or checked, at once."""
T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. `path` is a local, checksum-verified folder (a cache, where the root is
    remote).
    """

    kind: str
    id: str
    path: Path
    uri: str
    meta: dict[str, Any] = field(default_factory=dict)
    """What its maker recorded: lineage (`inputs`), config, counts."""

    @property
    def name(self) -> str:
        """`kind/id`, which `Storage.artifact` accepts."""
        return f"{self.kind}/{self.id}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Storage(Root):
    """One root. Safe to open in any process; holds no state but the filesystem. What a person
    should know of it goes to `say`.
    """

    def __init__(self, root: str, say: Callable[[str], None] = _tell):
        super().__init__(root)
        self._say = say

    def _at(self, kind: str, id: str) -> Path:
        """This machine's files of an artifact."""
        return self.local_path("cache", kind, id) if self.remote else Path(self._path(kind, id))

    def folder_of(self, kind: str, id: str) -> str | None:
        """On a remote root: the folder in `kind/id` that the finished artifact's files lie in."""
        commit = self.commit_of(kind, id)
        return None if commit is None else commit["folder"]

    def discard(self, path: str) -> bool:
        """Remove an artifact `kind/id` that is unfinished or damaged, or on a remote root a folder
        `kind/id/folder` that its COMMIT.json does not name.

        Returns False, and removes nothing, where the artifact is whole, or the folder named, by
        now.
        """
        kind, id, *folder = path.split("/")
        if not self.remote:
            return self._discard_folder(kind, id)
        if self.folder_of(kind, id) == folder[0] if folder else not self.is_damaged(kind, id):
            return False
        with self.naming(path), suppress(FileNotFoundError):
            self.fs.rm(self._path(path), recursive=True)
        return True

    def _discard_folder(self, kind: str, id: str) -> bool:
        """Of a local root. The folder is moved away first: no other process can complete it."""
        folder = self._path(kind, id)
        with self.naming(f"{kind}/{id}"), self.scratch() as away, suppress(FileNotFoundError):
            os.rename(folder, away / id)
            if (away / id / COMMIT).exists():
                try:
                    parse(kind, id, (away / id / COMMIT).read_bytes(), folder, remote=False)
                except ArtifactError:
                    return True
                replace(away / id, folder)
                return False
        return True

    # -- artifacts
    # -----------------------------------------------------------------------------------------------

    def find(self, kind: str, id: str) -> Artifact | None:
        """The finished artifact, verified against its checksums; None where none was committed."""
        commit = self.commit_of(kind, id)
        if commit is None:
            return None
        with self.naming(f"{kind}/{id}"):
            path = self._verified(kind, id, commit)
        return Artifact(kind, id, path, self.url(kind, id), commit["meta"])

    def commit_of(self, kind: str, id: str) -> Commit | None:
        """The artifact's COMMIT.json; None where there is none.

        Raises:
            ArtifactError: COMMIT.json is damaged.
        """
        raw = self.read(f"{kind}/{id}/{COMMIT}")
        if raw is None:
            return None
        return parse(kind, id, raw, self.url(kind, id), remote=self.remote)

    def is_damaged(self, kind: str, id: str) -> bool:
        """Whether there is a COMMIT.json that cannot be used."""
        try:
            self.commit_of(kind, id)
        except ArtifactError:
            return True
        return False

    def artifact(self, kind: str, ref: str) -> Artifact:
        """The artifact that `ref` names: an id, `kind/id`, or a unique prefix of an id. Raises
        UsageError if there is none.
        """
        return self._named(kind, ref, self.find)

    def partial(self, kind: str, ref: str, most: int | None = None) -> Partial:
        """As `artifact`, but what is asked for is fetched and verified then. Of a remote root's
        shards this machine then keeps at most so many bytes (None: all).
        """

        def find(kind: str, id: str) -> Partial | None:
            commit = self.commit_of(kind, id)
            return (
                None
                if commit is None
                else Partial(self, kind, id, self._at(kind, id), commit, most)
            )

        return self._named(kind, ref, find)

    def _named(self, kind: str, ref: str, find: Callable[[str, str], T | None]) -> T:
        id = ref.removeprefix(f"{kind}/")
        if id and "/" not in id and (exact := find(kind, id)) is not None:
            return exact
        ids = [name for name in self.list(kind) if self.read(f"{kind}/{name}/{COMMIT}") is not None]
        matches = [name for name in ids if id and name.startswith(id)]
        if len(matches) > 1:
            raise UsageError(
                f"{kind} id {ref!r} is ambiguous in {self.root!r}: {', '.join(matches[:5])}"
            )
        if not matches:
            fix = nearest(id, ids) or f"; give an id: {self.url(kind)} holds {_some(ids)}"
            if id and id in self.list(kind):
                fix = "; it was begun and never finished: run its job again"
            raise UsageError(
                f"no artifact {kind}/{id or repr(id)} in storage.root {self.root!r}{fix}"
            )
        found = find(kind, matches[0])
        assert found is not None
        return found

    def make(
        self,
        kind: str,
        id: str,
        meta: Mapping[str, Any],
        fill: Callable[[Path], None],
        *,
        force: bool = False,
    ) -> Artifact:
        """Find the artifact, or fill a scratch folder with `fill` and commit it whole.

        Two makers at once: the commit marker is created exclusively, the first wins, and the other
        says so and gets the winner's. With `force` the finished artifact stays until the new one is
        whole, and is replaced by it.
        """
        assert kind in KINDS, kind
        if not force:
            done = self.find(kind, id)
            if done is not None:
                return done
        with self.naming(f"{kind}/{id}"), self.scratch() as folder:
            fill(folder)
            won = self._commit(kind, id, folder, dict(meta), force)
            path = self._at(kind, id)
            if won and (not self.remote or self._keep(folder, path)):
                return Artifact(kind, id, path, self.url(kind, id), json.loads(json.dumps(meta)))
        if not won:
            self._say(
                f"{kind}/{id} was finished by another process meanwhile: its files are kept and"
                " used, those made here are dropped"
            )
        found = self.find(kind, id)
        assert found is not None
        return found

    def _keep(self, folder: Path, cached: Path) -> bool:
        """Make what was uploaded this machine's copy, for it is at hand and was hashed; False where
        something is in the way.
        """
        make_folder(cached.parent)
        with self.scratch() as away, suppress(FileNotFoundError):
            os.rename(cached, away / "old")
        try:
            replace(folder, cached)
        except OSError:
            return False
        return True

    def _commit(self, kind: str, id: str, folder: Path, meta: dict[str, Any], force: bool) -> bool:
        """False where another maker's is there, which stays."""
        commit: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "id": id,
            "code": __version__,
            "created": datetime.now(UTC).isoformat(),
            "meta": meta,
        }
        target = self._path(kind, id)
        if self.remote:
            return self._upload(kind, id, folder, commit, force)
        commit["files"] = {name: entry(folder / name) for name in files_of(folder)}
        (folder / COMMIT).write_bytes(json.dumps(commit, indent=1, sort_keys=True).encode())
        sync_tree(folder)
        make_folder(os.path.dirname(target))
        if os.path.isdir(target) and not os.path.exists(os.path.join(target, COMMIT)):
            shutil.rmtree(target, ignore_errors=True)
        with self.scratch() as away:
            if force:
                with suppress(FileNotFoundError):
                    replace(target, away / id)
            try:
                replace(folder, target)
            except OSError:
                if not os.path.exists(os.path.join(target, COMMIT)):
                    with suppress(OSError):
                        replace(away / id, target)
                    raise
                return False
        return True

    def _upload(
        self, kind: str, id: str, folder: Path, commit: dict[str, Any], force: bool
    ) -> bool:
        """Into a folder of this maker's own, so that a slower one overwrites nothing that the
        winner's marker names.
        """
        marker = f"{kind}/{id}/{COMMIT}"
        own = uuid.uuid4().hex[:12]
        names = files_of(folder)
        with _at_once(
            lambda name: self.fs.put_file(str(folder / name), self._path(kind, id, own, name)),
            names,
        ):
            commit |= {"folder": own, "files": {name: entry(folder / name) for name in names}}
        data = json.dumps(commit, indent=1, sort_keys=True).encode()
        if self.create(marker, data):
            return True
        named = None if self.is_damaged(kind, id) else self.folder_of(kind, id)
        if named == own:  # the endpoint met its own earlier reply, which was lost on the way
            return True
        if force:
            self.write(marker, data)
        if replaced := named if force else own:
            with suppress(FileNotFoundError):
                self.fs.rm(self._path(kind, id, replaced), recursive=True)
        return force

    def _verified(self, kind: str, id: str, commit: Commit) -> Path:
        local = self._at(kind, id)

        def check(name: str) -> None:
            path, expected = local / name, commit["files"][name]["sha256"]
            if path.exists() and sha256(path) == expected:
                return
            if (
                self.remote
                and self.fetch(kind, id, commit, name, path)
                and sha256(path) == expected
            ):
                return
            raise self.damaged(kind, id, commit, name, there=path.exists())

        with _at_once(check, commit["files"]):
            pass
        return local

    def damaged(
        self, kind: str, id: str, commit: Commit, name: str, *, there: bool
    ) -> ArtifactError:
        """What to say of a file at the root that is not as COMMIT.json says, or is not there."""
        where = (
            self.url(kind, id, commit["folder"], name)
            if self.remote
            else self._path(kind, id, name)
        )
        maker = (
            f"`mesocosm {commit['meta']['job']}` with --force"
            if "job" in commit["meta"]
            else "its job with --force"
        )
        how = f"is damaged (its sha256 is not that of {COMMIT})" if there else "is missing"
        return ArtifactError(
            f"{kind}/{id}: file {name!r} {how}; make the artifact again by {maker}, or restore"
            f" {where} from a copy"
        )

    def fetch(self, kind: str, id: str, commit: Commit, name: str, path: Path) -> bool:
        """An artifact's file from a remote root into `path`, whole or not at all; False where there
        is no such file.
        """
        source = self._path(kind, id, commit["folder"], name)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with self.naming(f"{kind}/{id}"):
                make_folder(path.parent)
                self.fs.get_file(source, str(temporary))
                sync(temporary)
                replace(temporary, path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (" and others" if len(ids) > 5 else "") if ids else "none yet"


@contextmanager
def _at_once(work: Callable[[str], None], names: Iterable[str]) -> Iterator[None]:
    """Do `work` on several of `names` at a time while the block runs; afterwards all is done, or
    the first error in their order raised.
    """
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="storage")
    try:
        under_way: list[Future[None]] = [pool.submit(work, name) for name in names]
        yield
        for one in under_way:
            one.result()
    finally:
        pool.shutdown(cancel_futures=True)
