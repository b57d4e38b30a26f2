"""Files of this machine, hashed and made to outlive a crash: what storage.py stands on."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def files_of(folder: Path) -> list[str]:
    """Every file in it and deeper, by its path there, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def entry(path: Path) -> dict[str, Any]:
    """As COMMIT.json names a file."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def sha256(path: Path) -> str:
    """Of a file, in hex."""
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
    """Make a file durable; of a folder the names in it, which a file's own fsync does not."""
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
