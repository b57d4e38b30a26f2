"""A storage root: its names, its small durable files, and what lies in it.

With s3.py, the only module that knows fsspec and pyarrow.fs. `Storage` adds artifacts.
"""

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
from mesocosm.store import cache_folder
from mesocosm.store.files import make_folder, replace, sync, write_synced

KINDS = ("datasets", "worlds", "laws", "plans", "agents", "evaluations")


class Root:
    """A folder of this machine, or `s3://bucket/prefix`. Its only state is the filesystem.

    Methods raise StorageError, which names the path, when the disk is full or S3 does not answer.
    """

    def __init__(self, root: str):
        self.remote = "://" in root
        self.root = _checked(root) if self.remote else _absolute(root)
        try:
            self.fs, self._base = _filesystem(self.root)
        except (ImportError, ValueError) as error:
            why = f"storage.root {root!r} cannot be opened: {error}"
            raise UsageError(f"{why}; use a folder or s3://bucket/prefix") from error

    # -- names ---------------------------------------------------------------------------------

    def url(self, *parts: str) -> str:
        return "/".join([self.root.rstrip("/"), *parts])

    def _path(self, *parts: str) -> str:
        return "/".join([self._base.rstrip("/"), *parts])

    def local_path(self, *parts: str) -> Path:
        """A local folder for scratch and caches of this root: inside the root when it is local."""
        return self.machine_path(*parts) if self.remote else Path(self.root).joinpath(*parts)

    def machine_path(self, *parts: str) -> Path:
        """In the user's cache on this machine, of this root alone."""
        name = hashlib.sha256(self.root.encode()).hexdigest()[:12]
        return cache_folder.private_folder().joinpath(name, *parts)

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """The filesystem and base path to give to Ray (`storage_filesystem`, `storage_path`)."""
        if not self.remote:
            return pafs.LocalFileSystem(), self._base
        client = _filesystem(self.root, proven=True)[0]
        return pafs.PyFileSystem(pafs.FSSpecHandler(client)), self._base

    @contextmanager
    def naming(self, path: str) -> Iterator[None]:
        """Turn errors of the disk and of S3 into a StorageError that names `path`.

        On a local root, an error of a connection is not one of storage: it is left as it is.
        """
        try:
            yield
        except (MesocosmError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            why = faults.reason(error)
            if why is None or (not self.remote and faults.of_server(error)):
                raise
            raise StorageError(f"{path} in storage.root {self.root!r}: {why}") from error

    # -- small durable files -------------------------------------------------------------------

    def write(self, path: str, data: bytes) -> None:
        """Write a small file whole: a reader sees the old or the new, also after a crash."""
        full = self._path(path)
        with self.naming(path):
            if self.remote:
                self.fs.pipe_file(full, data)
                return
            make_folder(os.path.dirname(full))
            temporary = f"{full}.{uuid.uuid4().hex}.tmp"
            write_synced(temporary, data)
            replace(temporary, full)

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file whole only if it is not there yet; False if it is.

        Among all processes one succeeds.
        """
        full = self._path(path)
        with self.naming(path):
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
        """The file's bytes, or None where there is none."""
        with self.naming(path):
            try:
                return bytes(self.fs.cat_file(self._path(path)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, path: str) -> list[str]:
        """Sorted base names in a folder of the root; empty where there is none.

        Unfinished temporary files are left out.
        """
        with self.naming(path):
            try:
                entries = self.fs.ls(self._path(path), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return sorted(name for name in names if not name.endswith(".tmp"))

    def remove(self, path: str) -> None:
        """Remove a file or a folder under the root, where there is one. Never an artifact."""
        assert path.split("/")[0] not in KINDS, path
        with self.naming(path), suppress(FileNotFoundError):
            self.fs.rm(self._path(path), recursive=True)

    def files(self, path: str) -> dict[str, tuple[int, float]]:
        """Every file in a folder of the root, and deeper, by its path under the root.

        Returns:
            Its bytes, and when it was written, in seconds since the epoch.
        """
        with self.naming(path):
            found = self.fs.find(self._path(path), detail=True)
        skip = len(self._path(""))
        return {name[skip:]: (entry["size"], _modified(entry)) for name, entry in found.items()}

    # -- checks --------------------------------------------------------------------------------

    def writable(self) -> None:
        """Check that files can be written under the root, and created exclusively.

        Raises:
            UsageError: The root cannot be written, or it creates the same file twice.
        """
        path = f"runs/{uuid.uuid4().hex}.tmp"
        data = b"\0" * 4096  # a full disk may still take an empty file
        try:
            with self.naming(path):
                self.create(path, data)
                twice = self.create(path, data)
                same = self.read(path) == data
                self.remove(path)
        except Exception as error:
            fix = "name a folder in which you may write and that has free space"
            why = self._why(error, fix)
            raise UsageError(f"storage.root {self.root!r} cannot be written {why}") from error
        if twice:
            raise UsageError(
                f"storage.root {self.root!r} creates a file twice: it ignores If-None-Match, "
                "so two jobs could both believe that they made an artifact or took a step; "
                "use a store with conditional writes (docs/storage.md)"
            )
        if not same:
            why = f"storage.root {self.root!r} does not read back what was written"
            raise UsageError(f"{why}; use another store")

    def readable(self) -> None:
        """Raises UsageError where there is no such folder, or bucket."""
        fix = "name the folder or s3://bucket/prefix that jobs were given"
        place = self._base.split("/")[0] if self.remote else self._base
        try:
            facts = self.fs.info(place)
        except FileNotFoundError as error:
            raise UsageError(f"storage.root {self.root!r} is not there; {fix}") from error
        except Exception as error:
            why = self._why(error, "name a folder that you may read")
            raise UsageError(f"storage.root {self.root!r} cannot be read {why}") from error
        if facts["type"] == "file":
            raise UsageError(f"storage.root {self.root!r} is a file; {fix}")

    def _why(self, error: Exception, fix: str) -> str:
        """The reason in brackets, and the fix: `fix` on a local root, S3's own on a remote one."""
        cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
        if not self.remote and isinstance(cause, OSError) and isinstance(cause.strerror, str):
            return f"({cause.strerror}); {fix}"
        return f"({faults.reason(cause) or faults.first_line(cause)})"

    # -- uploads and scratch -------------------------------------------------------------------

    def uploads(self) -> dict[str, tuple[int, float]]:
        """Multipart uploads to this root that were not finished, as `files` has files.

        The key is what `abort_upload` takes. Raises StorageError where the endpoint does not list them.
        """
        if not self.remote:
            return {}
        from mesocosm.store import objects

        skip = len(self._path(""))
        found = {}
        with self.naming("uploads"):
            for upload in objects.uploads(self.fs, self._base):
                found[f"{upload.path[skip:]}?uploadId={upload.id}"] = upload.bytes, upload.modified
        return found

    def abort_upload(self, upload: str) -> None:
        """End an upload of `uploads`; its parts are freed."""
        from mesocosm.store import objects

        path, _, id = upload.partition("?uploadId=")
        with self.naming(path):
            objects.give_up(self.fs, self._path(path), id)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder on the root's filesystem (where local), removed afterwards."""
        base = self.local_path("scratch")
        with self.naming("scratch"):
            make_folder(base)
            folder = Path(tempfile.mkdtemp(dir=base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _absolute(root: str) -> str:
    if not root:
        raise UsageError("storage.root must be a folder or s3://bucket/prefix, got ''")
    try:
        return str(Path(root).expanduser().absolute())
    except RuntimeError as error:
        raise UsageError(f"storage.root {root!r} names the home of an unknown user") from error


def _checked(root: str) -> str:
    scheme = root.split("://")[0]
    if scheme != "s3":
        why = f"{scheme}:// cannot create a file exclusively, which artifacts and ledgers need"
        want = "storage.root must be a folder or s3://bucket/prefix"
        raise UsageError(f"{want}, got {root!r}: {why}")
    if not re.match(r"s3://[^/]", root):
        raise UsageError(f"storage.root must be s3://bucket/prefix, got {root!r}, without a bucket")
    return root


def _filesystem(root: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    if not root.startswith("s3://"):
        return fsspec.core.url_to_fs(root)
    from mesocosm.store import objects

    return objects.Client(**objects.options(), **options), objects.Client._strip_protocol(root)


def _modified(entry: dict[str, Any]) -> float:
    """Seconds since the epoch: local files have `mtime`, objects `LastModified`."""
    return float(entry["mtime"] if "mtime" in entry else entry["LastModified"].timestamp())
