"""Files of logs, on this machine or at `s3://bucket/key` with the environment's credentials."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

REMOTE = "s3://"


def is_remote(path: str) -> bool:
    return path.startswith(REMOTE)


@functools.cache
def _bucket(process: int) -> Any:
    """One client per process: a fork cannot use its parent's."""
    from mesocosm.store import objects

    return objects.Client(**objects.options())


def open_file(path: str) -> IO[bytes]:
    """Open a file for reading. Raises OSError."""
    return _bucket(os.getpid()).open(path, "rb") if is_remote(path) else open(path, "rb")  # type: ignore[no-any-return]


def stamp(path: str) -> tuple[int, str]:
    """(size in bytes, a mark that changes when the file does)."""
    if is_remote(path):
        info = _bucket(os.getpid()).info(path)
        return int(info["size"]), str(info.get("ETag") or info.get("LastModified"))
    stat = os.stat(path)
    return stat.st_size, str(stat.st_mtime_ns)


def sha256(path: str) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def sorted_naturally(paths: Iterable[str]) -> list[str]:
    """Sort by name, with numbers by value: part-2 before part-10."""

    def natural(path: str) -> tuple[list[tuple[str, int]], str]:
        parts = re.split(r"([0-9]+)", path)
        numbers = [int(digits) for digits in parts[1::2]] + [-1]
        # The path itself decides between 1 and 01.
        return list(zip(parts[0::2], numbers, strict=True)), path

    return sorted(paths, key=natural)


def expand(word: str, suffixes: Sequence[str]) -> list[str]:
    """The files of a path, a pattern, or a folder (with these suffixes, not hidden), sorted."""
    if is_remote(word):
        client = _bucket(os.getpid())
        if not word.endswith("/") and client.isfile(word):
            return [word]
        if not word.endswith("/") and not client.isdir(word):
            names = client.glob(word) if glob.has_magic(word) else []
            return sorted_naturally(REMOTE + name for name in names)
        paths = [REMOTE + name for name in client.find(word)]
    elif os.path.isdir(word):
        paths = [str(path) for path in Path(word).rglob("*") if path.is_file()]
    elif os.path.isfile(word):  # a name may have a pattern's characters, as part[1].jsonl
        return [word]
    else:
        return sorted_naturally(glob.glob(word, recursive=True))
    return sorted_naturally(
        path
        for path in paths
        if Path(path).suffix in suffixes
        and not any(part.startswith((".", "_")) for part in Path(path).relative_to(word).parts)
    )
