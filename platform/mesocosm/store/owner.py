"""Which process something belongs to, and whether that process still runs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process, named so that another process can tell whether it still runs."""

    host: str
    machine: str
    """The boot and the PID namespace that `pid` is of: the same PID elsewhere is another process.
    """
    pid: int
    started: int
    """When the process started, in the kernel's clock ticks since boot (0 where unknown): PIDs are
    used again.
    """

    def alive(self) -> bool | None:
        """Whether the process runs; None where this process cannot tell: it runs on another host,
        or is another user's and hidden (`hidepid`).
        """
        if self.machine != _machine():
            return None
        started = _started(self.pid)
        if started is None:
            return False
        if self.started and not started:
            return None
        return not self.started or started == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def this_process() -> Owner:
    return Owner(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()) or 0)


def _machine() -> str:
    """Not remembered: a forked child may be in a PID namespace of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: PIDs are the host's own
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """When a process of this machine started, 0 where that is unknown; None where there is no such
    process.
    """
    try:
        # The command, field 2, is in parentheses and may hold spaces; field 3 is the state, 22 the
        # start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:  # no such process, or it ended just now; or it is hidden; or this is not Linux
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
