"""Files of logs, on this machine or in a bucket.

A bucket is `s3://bucket/key`, with the endpoint and credentials of the environment.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

REMOTE = "s3://"


def remote(path: str) -> bool:
    return path.startswith(REMOTE)


@functools.cache
def _bucket(process: int) -> Any:
    """One client per process: a fork cannot use its parent's."""
    from mesocosm.store import objects

    return objects.Client(**objects.options())


def bucket() -> Any:
    return _bucket(os.getpid())


def opened(path: str) -> IO[bytes]:
    """Open a file for reading. Raises OSError."""
    return bucket().open(path, "rb") if remote(path) else open(path, "rb")  # type: ignore[no-any-return]


def size(path: str) -> int:
    return stamp(path)[0]


def stamp(path: str) -> tuple[int, str]:
    """(size in bytes, a mark that changes when the file does)."""
    if remote(path):
        info = bucket().info(path)
        return int(info["size"]), str(info.get("ETag") or info.get("LastModified"))
    stat = os.stat(path)
    return stat.st_size, str(stat.st_mtime_ns)


def sha256(path: str) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_folder(path: str) -> bool:
    if remote(path):
        return path.endswith("/") or (not bucket().isfile(path) and bucket().isdir(path))
    return os.path.isdir(path)


def is_file(path: str) -> bool:
    return bool(bucket().isfile(path)) if remote(path) else os.path.isfile(path)


def sorted_naturally(paths: Iterable[str]) -> list[str]:
    """Sort by name, with numbers by value: part-2 before part-10."""

    def natural(path: str) -> tuple[list[tuple[str, int]], str]:
        parts = re.split(r"([0-9]+)", path)
        numbers = [int(digits) for digits in parts[1::2]] + [-1]
        # The path itself decides between 1 and 01.
        return list(zip(parts[0::2], numbers, strict=True)), path

    return sorted(paths, key=natural)


def below(folder: str) -> list[str]:
    """All files in a folder and deeper, sorted, without hidden ones."""
    if remote(folder):
        root = folder.removeprefix(REMOTE).rstrip("/")
        names = {REMOTE + name: name[len(root) + 1 :].split("/") for name in bucket().find(root)}
    else:
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        names = {str(path): list(path.relative_to(folder).parts) for path in files}
    hidden = (".", "_")
    return sorted_naturally(
        name for name, parts in names.items() if not any(part.startswith(hidden) for part in parts)
    )


def matching(pattern: str) -> list[str]:
    """The files that a pattern matches, sorted."""
    if not remote(pattern):
        return sorted_naturally(glob.glob(pattern, recursive=True))
    names = bucket().glob(pattern) if glob.has_magic(pattern) else []
    return sorted_naturally(REMOTE + name for name in names)
