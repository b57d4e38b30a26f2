"""This machine's files: durable writes, checksums, and the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mesocosm.errors import UsageError

CACHE_VARIABLE = "MESOCOSM_CACHE"
"""The environment variable that holds `storage.cache`, for this process and those it starts."""


def files_of(folder: Path) -> list[str]:
    """The sorted paths of all files below a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def entry(path: Path) -> dict[str, Any]:
    """A file's entry in COMMIT.json."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: str | Path, data: bytes) -> None:
    """Write a file and make its bytes durable. A write that fails leaves no file."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.unlink(path)
        raise


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file durably. A reader sees the old or the new content, also after a crash."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    write_synced(temporary, data)
    try:
        replace(temporary, path)
    except OSError:  # `path` is a folder
        with suppress(OSError):
            os.unlink(temporary)
        raise


def replace(source: str | Path, target: str | Path) -> None:
    """Rename a file or folder and make the new name durable."""
    os.replace(source, target)
    sync(os.path.dirname(target))


def make_folder(path: str | Path) -> None:
    """Create a folder and its missing parents and make their names durable."""
    missing = []
    folder = Path(path)
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: str | Path) -> None:
    """Make a file's bytes durable, or the names in a folder, which a file's own fsync does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder durable: its files, its subfolders and all their names."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def use_cache(folder: str | None) -> None:
    """Set the parent of the cache folder (the config key `storage.cache`). None keeps the present
    one.
    """
    if folder:
        os.environ[CACHE_VARIABLE] = os.path.abspath(os.path.expanduser(folder))


def cache_folder() -> Path:
    """The user's folder for copies of remote roots. Raises UsageError where it is another's."""
    parent = os.environ.get(CACHE_VARIABLE) or tempfile.gettempdir()
    folder = Path(parent) / f"mesocosm-{os.getuid()}"
    try:
        os.makedirs(parent, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            fix = "set storage.cache to a folder in which only you may write"
            raise UsageError(f"the cache {str(folder)!r} must be a folder of this user; {fix}")
        os.chmod(folder, 0o700)
    except OSError as error:
        problem = f"the cache {str(folder)!r} cannot be created ({error.strerror})"
        fix = "set storage.cache to a folder in which you may write"
        raise UsageError(f"{problem}; {fix}") from error
    return folder
