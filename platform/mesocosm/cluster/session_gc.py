"""Garbage collection of private Rays: folders in the temporary folder whose process was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mesocosm.cluster.session_folder import PREFIX, session_ended
from mesocosm.store.gc import Garbage


def find() -> Iterator[Garbage]:
    """Folders of private Rays that ended without removing them.

    The temporary folder holds a link where the folder itself is elsewhere.
    """
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
