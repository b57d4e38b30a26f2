"""Files of logs, on this machine or in a bucket (`s3://bucket/key`, with the endpoint and
credentials of the environment).
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
    """One client a process: a fork cannot go on with its parent's."""
    from mesocosm.store import objects

    return objects.Client(**objects.options())


def bucket() -> Any:
    return _bucket(os.getpid())


def opened(path: str) -> IO[bytes]:
    """To be read and closed. Raises OSError."""
    return open(path, "rb") if not remote(path) else bucket().open(path, "rb")  # type: ignore[no-any-return]


def size(path: str) -> int:
    return os.path.getsize(path) if not remote(path) else int(bucket().info(path)["size"])


def stamp(path: str) -> tuple[int, str]:
    """(bytes, what changes when the file does)"""
    if remote(path):
        info = bucket().info(path)
        return int(info["size"]), str(info.get("ETag") or info.get("LastModified"))
    stat = os.stat(path)
    return stat.st_size, str(stat.st_mtime_ns)


def sha256(path: str) -> str:
    with opened(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()


def is_folder(path: str) -> bool:
    return (
        os.path.isdir(path)
        if not remote(path)
        else path.endswith("/") or (not bucket().isfile(path) and bucket().isdir(path))
    )


def is_file(path: str) -> bool:
    return os.path.isfile(path) if not remote(path) else bool(bucket().isfile(path))


def sorted_naturally(paths: Iterable[str]) -> list[str]:
    """Sorted by name, with the numbers in it by value: part-2 before part-10."""
    return sorted(paths, key=_natural)


def _natural(path: str) -> tuple[list[tuple[str, int]], str]:
    """Pairs of (text, the number after it); the path itself decides between 1 and 01."""
    parts = re.split(r"([0-9]+)", path)
    numbers = [int(digits) for digits in parts[1::2]] + [-1]
    return list(zip(parts[0::2], numbers, strict=True)), path


def below(folder: str) -> list[str]:
    """Every file in it and deeper, hidden ones left out, sorted."""
    if remote(folder):
        root = folder.removeprefix(REMOTE).rstrip("/")
        found = [name for name in bucket().find(root) if _seen(name[len(root) + 1 :].split("/"))]
        return sorted_naturally(REMOTE + name for name in found)
    return sorted_naturally(
        str(path)
        for path in Path(folder).rglob("*")
        if path.is_file() and _seen(path.relative_to(folder).parts)
    )


def _seen(parts: Any) -> bool:
    return not any(part.startswith((".", "_")) for part in parts)


def matching(pattern: str) -> list[str]:
    """Files that a pattern matches, sorted."""
    if remote(pattern):
        return (
            sorted_naturally(REMOTE + name for name in bucket().glob(pattern))
            if glob.has_magic(pattern)
            else []
        )
    return sorted_naturally(glob.glob(pattern, recursive=True))
