"""The bearer token of a world's HTTP ingress, from the environment or from a private file.

It is in no config, log, runtime environment or argument of Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from mesocosm.errors import UsageError

VARIABLE = "MESOCOSM_WORLD_TOKEN"
FILE = "~/.mesocosm/world_token"
SHORTEST = 16


def read_token() -> tuple[bytes, str]:
    """Return the token and its source: `VARIABLE` of the environment, otherwise `FILE`.

    A missing file is made with a random token.

    Raises:
        UsageError: The token is too short, or others can use the file. The message never holds
            the token.
    """
    if VARIABLE in os.environ:
        token = os.environb[VARIABLE.encode()]
        return _checked(token, f"the environment variable {VARIABLE}"), f"${VARIABLE}"
    path = Path(FILE).expanduser()
    source = f"the token file {path}"
    try:
        if not os.path.lexists(path):
            _make(path)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
                fix = "remove it, and a new one is made"
                raise UsageError(f"{source} must be a plain file of this user; {fix}")
            if status.st_mode & 0o077:
                mode = f"{stat.S_IMODE(status.st_mode):04o}"
                fix = f"run `chmod 600 {path}`"
                raise UsageError(f"the token file {path} must have mode 0600, got {mode}; {fix}")
            return _checked(file.read(4096).strip(), source), str(path)
    except OSError as error:
        fix = f"make it a plain file of this user, or set {VARIABLE}"
        raise UsageError(f"{source} cannot be read ({error.strerror}); {fix}") from error


def _checked(token: bytes, source: str) -> bytes:
    if len(token) < SHORTEST or not all(33 <= byte <= 126 for byte in token):
        characters = f"{SHORTEST} visible ASCII characters without spaces"
        raise UsageError(f"{source} must hold at least {characters}; try `openssl rand -hex 32`")
    return token


def _make(path: Path) -> None:
    """Make the file in one step: another process never reads a partial token."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", prefix=".world_token-", dir=path.parent) as file:
        file.write(secrets.token_urlsafe(32) + "\n")  # the temporary file has mode 0600
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
