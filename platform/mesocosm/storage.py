"""Storage is the truth: artifacts that appear whole or not at all, and small durable records.

    ROOT/<kind>/<id>/...            an artifact; COMMIT.json (checksums, lineage) is written last. On a remote root, where folders
                                    cannot be renamed, its files lie in a folder of their maker's own, which COMMIT.json names
    ROOT/runs/<job>/<id>/...        a run's config.yaml, status.json, metrics.jsonl, log.txt, checkpoints
    ROOT/ledgers/<id>/NNNNNNNN.json an append-only journal: record n is created exclusively

The only module that knows fsspec and pyarrow.fs, and with s3.py beneath it S3. A root is a folder or `s3://bucket/prefix`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow.fs as pafs

from mesocosm import __version__
from mesocosm.durable import entry, files_of, sha256, sync, sync_tree, write_synced
from mesocosm.errors import ArtifactError, UsageError, nearest
from mesocosm.partial import Partial

KINDS = ("datasets", "worlds", "laws", "plans", "agents", "evaluations")
COMMIT = "COMMIT.json"
SCHEMA = 1
AT_ONCE = 4
"""Files of an artifact that are transferred, or checked, at once."""
T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. `path` is a local, checksum-verified folder (a cache, where the root is remote)."""

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


class Storage:
    """One root. Safe to open in any process; holds no state but the filesystem. What a person should know of it goes to `say`."""

    def __init__(self, root: str, say: Callable[[str], None] = _tell):
        self.root = root if "://" in root else str(Path(root).absolute())
        self.remote = "://" in root
        self._say = say
        try:
            self.fs, self._base = _filesystem(self.root)
        except (ImportError, ValueError) as error:
            raise UsageError(f"storage.root {root!r} cannot be opened: {error}; use a folder or s3://bucket/prefix") from error

    # -- names ---------------------------------------------------------------------------------------------------

    def url(self, *parts: str) -> str:
        return "/".join([self.root.rstrip("/"), *parts])

    def _path(self, *parts: str) -> str:
        return "/".join([self._base.rstrip("/"), *parts])

    def local_path(self, *parts: str) -> Path:
        """A local folder for scratch and caches of this root: inside the root when it is local."""
        return self.machine_path(*parts) if self.remote else Path(self.root).joinpath(*parts)

    def machine_path(self, *parts: str) -> Path:
        """In this machine's temporary folder, of this root alone."""
        return Path(tempfile.gettempdir()).joinpath("mesocosm-" + hashlib.sha256(self.root.encode()).hexdigest()[:12], *parts)

    def _at(self, kind: str, id: str) -> Path:
        """This machine's files of an artifact."""
        return self.local_path("cache", kind, id) if self.remote else Path(self._path(kind, id))

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem and base path to give to Ray (`storage_filesystem`, `storage_path`)."""
        if not self.remote:
            return pafs.LocalFileSystem(), self._base
        return pafs.PyFileSystem(pafs.FSSpecHandler(_filesystem(self.root, proven=True)[0])), self._base

    # -- small durable files -------------------------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> None:
        """Write a small file whole: a reader sees the old content or the new, and it outlives a crash."""
        full = self._path(path)
        if self.remote:
            self.fs.pipe_file(full, data)
            return
        os.makedirs(os.path.dirname(full), exist_ok=True)
        temporary = f"{full}.{uuid.uuid4().hex}.tmp"
        write_synced(temporary, data)
        os.replace(temporary, full)
        sync(os.path.dirname(full))

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file whole only if it is not there yet; False if it is. Exclusive among all processes."""
        full = self._path(path)
        if self.remote:
            try:
                self.fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                return False
            return True
        os.makedirs(os.path.dirname(full), exist_ok=True)
        temporary = f"{full}.{uuid.uuid4().hex}.tmp"
        write_synced(temporary, data)
        try:
            os.link(temporary, full)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        sync(os.path.dirname(full))
        return True

    def read(self, path: str) -> bytes | None:
        """The file's bytes, or None where there is none."""
        try:
            return bytes(self.fs.cat_file(self._path(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, path: str) -> list[str]:
        """Sorted base names in a folder of the root; empty where there is none. Unfinished temporary files are left out."""
        try:
            entries = self.fs.ls(self._path(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in (str(e).rstrip("/").rsplit("/", 1)[-1] for e in entries) if not name.endswith(".tmp"))

    def writable(self) -> None:
        """Raises UsageError where nothing can be written under the root."""
        path = f"runs/{uuid.uuid4().hex}.tmp"
        try:
            self.write(path, b"")
            self.remove(path)
        except Exception as error:  # a remote filesystem's errors are its own
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"storage.root {self.root!r} cannot be written ({why}); name a folder or bucket in which you may write") from error

    def readable(self) -> None:
        """Raises UsageError where there is no such folder, or bucket."""
        try:
            self.fs.info(self._base.split("/")[0] if self.remote else self._base)
        except FileNotFoundError as error:
            raise UsageError(f"storage.root {self.root!r} is not there; name the folder or s3://bucket/prefix that jobs were given") from error
        except Exception as error:  # a remote filesystem's errors are its own
            raise UsageError(f"storage.root {self.root!r} cannot be read ({error}); check the address and the credentials") from error

    def remove(self, path: str) -> None:
        """Remove a file or a folder under the root, where there is one. For what runs leave behind; artifacts are never removed so."""
        assert path.split("/")[0] not in KINDS, path
        with suppress(FileNotFoundError):
            self.fs.rm(self._path(path), recursive=True)

    def files(self, path: str) -> dict[str, tuple[int, float]]:
        """Every file in a folder of the root, and deeper, by its path under the root: bytes, and seconds since the epoch when it was written."""
        found = self.fs.find(self._path(path), detail=True)
        skip = len(self._path(""))
        return {name[skip:]: (entry["size"], entry["mtime"] if "mtime" in entry else entry["LastModified"].timestamp()) for name, entry in found.items()}

    def uploads(self) -> dict[str, tuple[int, float]]:
        """Multipart uploads to this root that were not finished, as `files` has files; the key is what `give_up` takes. Raises OSError where the
        endpoint does not list them."""
        if not self.root.startswith("s3://"):
            return {}
        from mesocosm import s3

        skip = len(self._path(""))
        return {f"{upload.path[skip:]}?uploadId={upload.id}": (upload.bytes, upload.modified) for upload in s3.uploads(self.fs, self._base)}

    def give_up(self, upload: str) -> None:
        """End an upload of `uploads`; its parts are freed."""
        from mesocosm import s3

        path, _, id = upload.partition("?uploadId=")
        s3.give_up(self.fs, self._path(path), id)

    def folder_of(self, kind: str, id: str) -> str | None:
        """On a remote root: the folder in `kind/id` that the finished artifact's files lie in."""
        raw = self.read(f"{kind}/{id}/{COMMIT}")
        return None if raw is None else str(json.loads(raw)["folder"])

    def discard(self, path: str) -> bool:
        """Remove `kind/id`, or on a remote root `kind/id/folder`, which is of no finished artifact; False, and nothing is done, where by now it is."""
        kind, id, *rest = path.split("/")
        assert kind in KINDS and id and len(rest) == int(self.remote), path
        if self.remote:
            if self.folder_of(kind, id) == rest[0]:
                return False
            with suppress(FileNotFoundError):
                self.fs.rm(self._path(path), recursive=True)
            return True
        with self.scratch() as away, suppress(FileNotFoundError):
            os.rename(self._path(path), away / id)
            if (away / id / COMMIT).exists():
                os.rename(away / id, self._path(path))
                return False
        return True

    # -- artifacts -----------------------------------------------------------------------------------------------

    def find(self, kind: str, id: str) -> Artifact | None:
        """The finished artifact, verified against its checksums; None where none was committed."""
        commit = self._commit_of(kind, id)
        return None if commit is None else Artifact(kind, id, self._verified(kind, id, commit), self.url(kind, id), commit["meta"])

    def _commit_of(self, kind: str, id: str) -> dict[str, Any] | None:
        raw = self.read(f"{kind}/{id}/{COMMIT}")
        if raw is None:
            return None
        commit: dict[str, Any] = json.loads(raw)
        _check_names(f"{kind}/{id}", [*commit["files"], commit.get("folder", "")])
        return commit

    def artifact(self, kind: str, ref: str) -> Artifact:
        """The artifact that `ref` names: an id, `kind/id`, or a unique prefix of an id. Raises UsageError if there is none."""
        return self._named(kind, ref, self.find)

    def partial(self, kind: str, ref: str, most: int | None = None) -> Partial:
        """As `artifact`, but what is asked for is fetched and verified then. Of a remote root's shards this machine then keeps at most so many
        bytes (None: all)."""

        def find(kind: str, id: str) -> Partial | None:
            commit = self._commit_of(kind, id)
            return None if commit is None else Partial(self, kind, id, self._at(kind, id), commit, most)

        return self._named(kind, ref, find)

    def _named(self, kind: str, ref: str, find: Callable[[str, str], T | None]) -> T:
        id = ref.removeprefix(f"{kind}/")
        if id and "/" not in id and (exact := find(kind, id)) is not None:
            return exact
        ids = [name for name in self.list(kind) if self.read(f"{kind}/{name}/{COMMIT}") is not None]
        matches = [name for name in ids if id and name.startswith(id)]
        if len(matches) > 1:
            raise UsageError(f"{kind} id {ref!r} is ambiguous in {self.root!r}: {', '.join(matches[:5])}")
        if not matches:
            fix = nearest(id, ids) or f"; give an id: {self.url(kind)} holds {_some(ids)}"
            if id and id in self.list(kind):
                fix = "; it was begun and never finished: run its job again"
            raise UsageError(f"no artifact {kind}/{id or repr(id)} in storage.root {self.root!r}{fix}")
        found = find(kind, matches[0])
        assert found is not None
        return found

    def make(self, kind: str, id: str, meta: Mapping[str, Any], fill: Callable[[Path], None], *, force: bool = False) -> Artifact:
        """Find the artifact, or fill a scratch folder with `fill` and commit it whole.

        Two makers at once: the commit marker is created exclusively, the first wins, and the other says so and gets the winner's. With `force` the
        finished artifact stays until the new one is whole, and is replaced by it.
        """
        assert kind in KINDS, kind
        if not force:
            done = self.find(kind, id)
            if done is not None:
                return done
        with self.scratch() as folder:
            fill(folder)
            won = self._commit(kind, id, folder, dict(meta), force)
            path = self._at(kind, id)
            if won and (not self.remote or self._keep(folder, path)):
                return Artifact(kind, id, path, self.url(kind, id), json.loads(json.dumps(meta)))
        if not won:
            self._say(f"{kind}/{id} was finished by another process meanwhile: its files are kept and used, those made here are dropped")
        found = self.find(kind, id)
        assert found is not None
        return found

    def _keep(self, folder: Path, cached: Path) -> bool:
        """Make what was uploaded this machine's copy, for it is at hand and was hashed; False where something is in the way."""
        cached.parent.mkdir(parents=True, exist_ok=True)
        with self.scratch() as away, suppress(FileNotFoundError):
            os.rename(cached, away / "old")
        try:
            os.rename(folder, cached)
        except OSError:
            return False
        return True

    def _commit(self, kind: str, id: str, folder: Path, meta: dict[str, Any], force: bool) -> bool:
        """False where another maker's is there, which stays."""
        commit = {"schema": SCHEMA, "kind": kind, "id": id, "code": __version__, "created": datetime.now(UTC).isoformat(), "meta": meta}
        target = self._path(kind, id)
        if self.remote:
            return self._upload(kind, id, folder, commit, force)
        commit["files"] = {name: entry(folder / name) for name in files_of(folder)}
        (folder / COMMIT).write_bytes(json.dumps(commit, indent=1, sort_keys=True).encode())
        sync_tree(folder)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(target) and not os.path.exists(os.path.join(target, COMMIT)):
            shutil.rmtree(target, ignore_errors=True)
        with self.scratch() as away:
            if force:
                with suppress(FileNotFoundError):
                    os.rename(target, away / id)
            try:
                os.rename(folder, target)
            except OSError:
                if not os.path.exists(os.path.join(target, COMMIT)):
                    with suppress(OSError):
                        os.rename(away / id, target)
                    raise
                return False
        return True

    def _upload(self, kind: str, id: str, folder: Path, commit: dict[str, Any], force: bool) -> bool:
        """Into a folder of this maker's own, so that a slower one overwrites nothing that the winner's marker names."""
        marker = f"{kind}/{id}/{COMMIT}"
        own = uuid.uuid4().hex[:12]
        names = files_of(folder)
        with _at_once(lambda name: self.fs.put_file(str(folder / name), self._path(kind, id, own, name)), names):
            commit |= {"folder": own, "files": {name: entry(folder / name) for name in names}}
        data = json.dumps(commit, indent=1, sort_keys=True).encode()
        if self.create(marker, data):
            return True
        named = self.folder_of(kind, id)
        if named == own:  # the endpoint met its own earlier reply, which was lost on the way
            return True
        if force:
            self.write(marker, data)
        if replaced := named if force else own:
            with suppress(FileNotFoundError):
                self.fs.rm(self._path(kind, id, replaced), recursive=True)
        return force

    def _verified(self, kind: str, id: str, commit: Mapping[str, Any]) -> Path:
        local = self._at(kind, id)

        def check(name: str) -> None:
            path, expected = local / name, commit["files"][name]["sha256"]
            if path.exists() and sha256(path) == expected:
                return
            if self.remote and self.fetch(kind, id, commit, name, path) and sha256(path) == expected:
                return
            raise self.damaged(kind, id, commit, name, there=path.exists())

        with _at_once(check, commit["files"]):
            pass
        return local

    def damaged(self, kind: str, id: str, commit: Mapping[str, Any], name: str, *, there: bool) -> ArtifactError:
        """What to say of a file at the root that is not as COMMIT.json says, or is not there."""
        where = self.url(kind, id, commit["folder"], name) if self.remote else self._path(kind, id, name)
        maker = f"`mesocosm {commit['meta']['job']}` with --force" if "job" in commit["meta"] else "its job with --force"
        how = f"is damaged (its sha256 is not that of {COMMIT})" if there else "is missing"
        return ArtifactError(f"{kind}/{id}: file {name!r} {how}; make the artifact again by {maker}, or restore {where} from a copy")

    def fetch(self, kind: str, id: str, commit: Mapping[str, Any], name: str, path: Path) -> bool:
        """An artifact's file from a remote root into `path`, whole or not at all; False where there is no such file."""
        source = self._path(kind, id, commit["folder"], name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.fs.get_file(source, str(temporary))
            os.replace(temporary, path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder on the root's filesystem (where local), removed afterwards."""
        base = self.local_path("scratch")
        base.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_names(artifact: str, names: Sequence[str]) -> None:
    """Raise ArtifactError where one leads out of the artifact: what a stranger wrote there would land in this machine's own files."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise ArtifactError(f"{artifact}: {COMMIT} names {name!r}, which lies outside of it; it was not made by this project, do not use it")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (" and others" if len(ids) > 5 else "") if ids else "none yet"


def _filesystem(root: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    if not root.startswith("s3://"):
        return fsspec.core.url_to_fs(root)
    from mesocosm import s3

    return s3.Client(**s3.options(), **options), s3.Client._strip_protocol(root)


@contextmanager
def _at_once(work: Callable[[str], None], names: Iterable[str]) -> Iterator[None]:
    """Do `work` on several of `names` at a time while the block runs; afterwards all is done, or the first error in their order raised."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="storage")
    try:
        under_way: list[Future[None]] = [pool.submit(work, name) for name in names]
        yield
        for one in under_way:
            one.result()
    finally:
        pool.shutdown(cancel_futures=True)
