"""Runs a program, and kills it with all its descendants when its owner closes it or dies.

    python -I -S supervisor.py OWNER_PID PROGRAM [ARGUMENT ...]

The owner holds the standard input: its end, or the death of the process OWNER_PID by any signal,
ends the program. The program's output goes to the standard output, which closes when the last
descendant is dead. The supervisor leaves its owner's process tree at once, so that whoever kills
the children of a worker (Ray does) does not kill it first. It uses the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphaned descendants become children of this process, not of init."""

FOLDER = "/tmp"
"""Parent of the temporary folder. Chromium makes sockets in it, whose paths may have 107 bytes, so
that a long TMPDIR would keep it from starting.
"""


def children() -> list[int]:
    """The process ids of this process's children."""
    result = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1]
        except OSError:  # it has just ended
            continue
        if int(parent) == os.getpid():
            result.append(int(name))
    return result


def end_all() -> None:
    """Kill the descendants. The children of a killed child become children of this process."""
    while True:
        for pid in children():
            os.kill(pid, 9)  # a child that ended is a zombie until the wait below
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def supervise(owner: int, command: Sequence[str]) -> None:
    """Run the command until the owner is dead or has closed the standard input.

    Args:
        owner: The process id of the owner; 0 where it is dead already.
        command: The program and its arguments. Its temporary files are deleted at the end.
    """
    watched: list[int] = [0]
    try:
        if owner:
            watched.append(os.pidfd_open(owner))
    except OSError:  # the owner is dead, or the kernel is older than 5.3: the input closes
        pass
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder = tempfile.mkdtemp(prefix="mesocosm-browser-", dir=FOLDER)
    try:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": folder},
        )
        select.select(watched, [], [])
    finally:
        end_all()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__" and os.fork() == 0:
    os.setsid()
    supervise(int(sys.argv[1]), sys.argv[2:])
