"""A storage root: addresses, small durable files and listings. `Storage` adds artifacts."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs as pafs

from mesocosm import faults
from mesocosm.errors import MesocosmError, StorageError, UsageError
from mesocosm.store.files import cache_folder, make_folder, sync, write_synced, write_whole

KINDS = ("datasets", "worlds", "laws", "plans", "agents", "evaluations", "tokenizers")


class Root:
    """A folder of this machine, or `s3://bucket/prefix`. Its only state is the filesystem.

    Methods raise StorageError, which names the path, when the disk is full or S3 does not answer.
    """

    def __init__(self, root: str):
        self.remote = "://" in root
        self.root = _s3_root(root) if self.remote else _local_root(root)
        try:
            self.fs, self._base = self._filesystem()
        except (ImportError, ValueError) as error:
            problem = f"storage.root {root!r} cannot be opened: {error}"
            raise UsageError(f"{problem}; use a folder or s3://bucket/prefix") from error

    def _filesystem(self, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
        if not self.remote:
            return fsspec.core.url_to_fs(self.root)
        from mesocosm.store.objects import Client
        from mesocosm.store.objects import options as client_options

        return Client(**client_options(), **options), Client._strip_protocol(self.root)

    # -- addresses -----------------------------------------------------------------------------

    def url(self, *parts: str) -> str:
        """The address of a path under the root, for users."""
        return "/".join([self.root.rstrip("/"), *parts])

    def _path(self, *parts: str) -> str:
        return "/".join([self._base.rstrip("/"), *parts])

    def local_path(self, *parts: str) -> Path:
        """A local path for scratch and caches of this root: inside the root where it is local."""
        return self.machine_path(*parts) if self.remote else Path(self.root).joinpath(*parts)

    def machine_path(self, *parts: str) -> Path:
        """A path in the user's cache folder on this machine, for this root alone."""
        name = hashlib.sha256(self.root.encode()).hexdigest()[:12]
        return cache_folder().joinpath(name, *parts)

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem and base path for Ray (`storage_filesystem`, `storage_path`)."""
        if not self.remote:
            return pafs.LocalFileSystem(), self._base
        client, base = self._filesystem(proven=True)
        return pafs.PyFileSystem(pafs.FSSpecHandler(client)), base

    @contextmanager
    def storage_errors(self, path: str) -> Iterator[None]:
        """Turn errors of the disk, or of S3 on a remote root, into a StorageError naming `path`."""
        try:
            yield
        except (MesocosmError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            reason = faults.reason(error)
            if reason is None or (not self.remote and faults.of_server(error)):
                raise
            raise StorageError(f"{path} in storage.root {self.root!r}: {reason}") from error

    # -- small durable files -------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> None:
        """Write a small file whole: a reader sees the old or the new, also after a crash."""
        full = self._path(path)
        with self.storage_errors(path):
            if self.remote:
                self.fs.pipe_file(full, data)
            else:
                make_folder(os.path.dirname(full))
                write_whole(full, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file whole unless it exists. One of several processes gets True."""
        full = self._path(path)
        with self.storage_errors(path):
            if self.remote:
                try:
                    self.fs.pipe_file(full, data, mode="create")
                except FileExistsError:
                    return False
                return True
            make_folder(os.path.dirname(full))
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
        """The file's bytes; None where it does not exist."""
        with self.storage_errors(path):
            try:
                return bytes(self.fs.cat_file(self._path(path)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, path: str) -> list[str]:
        """Sorted base names in a folder of the root, if it exists, without temporary files."""
        with self.storage_errors(path):
            try:
                entries = self.fs.ls(self._path(path), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return sorted(name for name in names if not name.endswith(".tmp"))

    def remove(self, path: str) -> None:
        """Remove a file or folder under the root, if it exists. It must not be an artifact."""
        assert path.split("/")[0] not in KINDS, path
        self._remove(path)

    def _remove(self, path: str) -> None:
        with self.storage_errors(path), suppress(FileNotFoundError):
            self.fs.rm(self._path(path), recursive=True)

    def files(self, path: str) -> dict[str, tuple[int, float]]:
        """Bytes and time of change (seconds since the epoch) of all files in a folder, by path."""
        with self.storage_errors(path):
            infos = self.fs.find(self._path(path), detail=True)
        skip = len(self._path(""))
        files = {}
        for name, info in infos.items():
            changed = info["LastModified"].timestamp() if self.remote else info["mtime"]
            files[name[skip:]] = info["size"], changed
        return files

    # -- checks --------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise UsageError unless files can be written under the root, and created exclusively."""
        path = f"runs/{uuid.uuid4().hex}.tmp"
        data = b"\0" * 4096  # a full disk may still take an empty file
        try:
            with self.storage_errors(path):
                self.create(path, data)
                created_twice = self.create(path, data)
                intact = self.read(path) == data
                self.remove(path)
        except Exception as error:
            fix = "name a folder in which you may write and that has free space"
            reason = self._reason(error, fix)
            raise UsageError(f"storage.root {self.root!r} cannot be written {reason}") from error
        if created_twice:
            raise UsageError(
                f"storage.root {self.root!r} creates a file twice: it ignores If-None-Match, which"
                " artifacts and ledgers need; use a store with conditional writes (docs/storage.md)"
            )
        if not intact:
            problem = f"storage.root {self.root!r} does not read back what was written"
            raise UsageError(f"{problem}; use another store")

    def check_readable(self) -> None:
        """Raise UsageError where the folder, or the bucket, does not exist or cannot be read."""
        fix = "name the folder or s3://bucket/prefix that jobs were given"
        try:
            info = self.fs.info(self._base.split("/")[0] if self.remote else self._base)
        except FileNotFoundError as error:
            raise UsageError(f"storage.root {self.root!r} does not exist; {fix}") from error
        except Exception as error:
            reason = self._reason(error, "name a folder that you may read")
            raise UsageError(f"storage.root {self.root!r} cannot be read {reason}") from error
        if info["type"] == "file":
            raise UsageError(f"storage.root {self.root!r} is a file; {fix}")

    def _reason(self, error: Exception, fix: str) -> str:
        """The reason in brackets, with `fix` on a local root, and S3's own on a remote one."""
        cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
        if not self.remote and isinstance(cause, OSError) and isinstance(cause.strerror, str):
            return f"({cause.strerror}); {fix}"
        return f"({faults.reason(cause) or faults.first_line(cause)})"

    # -- uploads and scratch -------------------------------------------------------------------

    def uploads(self) -> dict[str, tuple[int, float]]:
        """Unfinished multipart uploads, as `files` returns files; `abort_upload` takes the keys."""
        if not self.remote:
            return {}
        from mesocosm.store import objects

        skip = len(self._path(""))
        with self.storage_errors("uploads"):
            uploads = objects.uploads(self.fs, self._base)
            return {path[skip:]: (bytes, modified) for path, bytes, modified in uploads}

    def abort_upload(self, upload: str) -> None:
        """Abort an upload of `uploads`; its parts are freed."""
        from mesocosm.store import objects

        with self.storage_errors(upload.partition("?")[0]):
            objects.abort_upload(self.fs, self._path(upload))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder on the root's filesystem (where local), removed afterwards."""
        base = self.local_path("scratch")
        with self.storage_errors("scratch"):
            make_folder(base)
            folder = Path(tempfile.mkdtemp(dir=base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _local_root(root: str) -> str:
    if not root:
        raise UsageError("storage.root must be a folder or s3://bucket/prefix, got ''")
    try:
        return str(Path(root).expanduser().absolute())
    except RuntimeError as error:
        raise UsageError(f"storage.root {root!r} names the home of an unknown user") from error


def _s3_root(root: str) -> str:
    if not root.startswith("s3://"):
        raise UsageError(
            f"storage.root must be a folder or s3://bucket/prefix, got {root!r}: other stores"
            " cannot create a file exclusively, which artifacts and ledgers need"
        )
    if not re.match(r"s3://[^/]", root):
        raise UsageError(f"storage.root must be s3://bucket/prefix, got {root!r}, without a bucket")
    return root
