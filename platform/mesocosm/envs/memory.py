"""The memory of an environment's process."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

GIB = 1 << 30


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants, in bytes.

    Pages that they share count in each of them. 0 where there is no /proc.
    """
    children, pages = defaultdict(list), dict[int, int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            pages[int(folder.name)] = int((folder / "statm").read_text().split()[1])
            children[int(parent)].append(int(folder.name))
    total, waiting = 0, [pid]
    while waiting:
        member = waiting.pop()
        total += pages.get(member, 0)
        waiting += children[member]
    return total * os.sysconf("SC_PAGE_SIZE")
