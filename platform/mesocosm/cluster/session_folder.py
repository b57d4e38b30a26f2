"""The temporary folder of a private Ray, locked by its process."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from mesocosm.errors import MesocosmError

PREFIX = "mesocosm-ray-"
LOCK = "owner.lock"
"""The file that the process locks. A free lock means that the process has ended."""
SHORT = "/tmp"
"""The parent folder when TMPDIR is too long for Ray's sockets; TMPDIR then holds a link."""
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
"""The longest path of a socket in Ray's temporary folder."""


class SessionFolder:
    """A new folder, short enough for Ray's sockets and locked by this process.

    Raises:
        MesocosmError: The folder cannot be made.
    """

    def __init__(self) -> None:
        base = temporary = tempfile.gettempdir()
        limit = (103 if sys.platform == "darwin" else 107) - len(SOCKET)
        if len(os.fsencode(os.path.join(base, f"{PREFIX}12345678"))) > limit:
            base = SHORT
        self.link: str | None = None
        try:
            self.path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
            self._lock = os.open(os.path.join(self.path, LOCK), os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if base != temporary:
                self.link = os.path.join(temporary, os.path.basename(self.path))  # for `storage gc`
                os.symlink(self.path, self.link)
        except OSError as error:
            longest = limit - len(PREFIX) - 9
            raise MesocosmError(
                f"a folder for Ray cannot be made in {base!r} ({error.strerror}); set TMPDIR to a"
                f" writable folder of at most {longest} characters"
            ) from error

    def release(self) -> None:
        """Leave the folder, with its logs, to `storage gc`."""
        os.close(self._lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.link is not None:
            with suppress(OSError):
                os.unlink(self.link)
        self.release()


def session_ended(folder: Path) -> bool:
    """True if the process that locked a private Ray's folder has ended."""
    try:
        handle = os.open(folder / LOCK, os.O_WRONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
