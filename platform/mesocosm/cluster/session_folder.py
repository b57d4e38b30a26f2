"""The temporary folder of a private Ray, locked by its process, and garbage collection of those
whose process was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from mesocosm.errors import MesocosmError
from mesocosm.store.gc import Garbage

PREFIX = "mesocosm-ray-"
LOCK = "owner.lock"
"""The file that the process locks. A free lock means that the process has ended."""
SHORT = "/tmp"
"""The parent folder when TMPDIR is too long for Ray's sockets; TMPDIR then holds a link."""
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
"""The longest path of a socket in Ray's temporary folder."""


class SessionFolder:
    """A new folder, short enough for Ray's sockets and locked by this process."""

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
            raise MesocosmError(
                f"a folder for Ray cannot be made in {base!r} ({error.strerror}); set TMPDIR to a"
                f" writable folder of at most {limit - len(PREFIX) - 9} characters"
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
        with open(folder / LOCK, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def garbage() -> Iterator[Garbage]:
    """Folders of private Rays that ended without removing them, and links to removed folders."""
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        folder = path.resolve()
        if not folder.is_dir():
            yield Garbage.on_disk("Ray session", path, "its folder is gone")
        elif folder.stat().st_uid == os.getuid() and session_ended(folder):
            remove = partial(_remove, path, folder)
            yield Garbage.on_disk("Ray session", folder, "its process was killed", remove)


def _remove(path: Path, folder: Path) -> bool:
    if not session_ended(folder):
        return False
    shutil.rmtree(folder)
    if path.is_symlink():
        path.unlink()
    return True
