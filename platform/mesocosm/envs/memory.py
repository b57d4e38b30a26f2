"""The memory of an environment's process."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

GIB = 1 << 30
SUPERVISOR = str(Path(__file__).parent / "browser" / "supervisor.py")
"""The program that owns a browser. It leaves the process tree of its owner, whom its command line
names.
"""


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, all its descendants and their browsers, in bytes.

    Pages that they share count in each of them. 0 without /proc.
    """
    children, pages = defaultdict(list), dict[int, int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            _, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            pages[int(folder.name)] = int((folder / "statm").read_text().split()[1])
            owner = _owner(folder) if session == folder.name else None
            children[int(parent) if owner is None else owner].append(int(folder.name))
    total, waiting = 0, [pid]
    while waiting:
        member = waiting.pop()
        total += pages.get(member, 0)
        waiting += children[member]
    return total * os.sysconf("SC_PAGE_SIZE")


def _owner(folder: Path) -> int | None:
    """The owner of a browser's supervisor; None for other processes."""
    command = (folder / "cmdline").read_text(errors="replace").split("\0")
    if SUPERVISOR not in command:
        return None
    return int(command[command.index(SUPERVISOR) + 1])
