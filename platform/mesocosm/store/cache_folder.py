"""This machine's folder for copies of remote roots: private to the user, and of one place."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from mesocosm.errors import UsageError

VARIABLE = "MESOCOSM_CACHE"
"""The environment variable that holds `storage.cache`, for this process and those it starts."""


def use(folder: str | None) -> None:
    """Keep the copies in `folder` (the config key `storage.cache`); None changes nothing."""
    if folder:
        os.environ[VARIABLE] = os.path.abspath(os.path.expanduser(folder))


def private_folder() -> Path:
    """The user's folder for caches, mode 0700; it is made when it is not there.

    Raises:
        UsageError: The folder cannot be made, or belongs to another user.
    """
    parent = os.environ.get(VARIABLE) or tempfile.gettempdir()
    folder = Path(parent) / f"mesocosm-{os.getuid()}"
    try:
        os.makedirs(parent, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        facts = os.lstat(folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            fix = "set storage.cache to a folder in which only you may write"
            raise UsageError(f"the cache {str(folder)!r} is not a folder of yours; {fix}")
        if stat.S_IMODE(facts.st_mode) & 0o077:
            os.chmod(folder, 0o700)
    except OSError as error:
        why = f"the cache {str(folder)!r} cannot be made ({error.strerror})"
        raise UsageError(f"{why}; set storage.cache to a folder in which you may write") from error
    return folder
