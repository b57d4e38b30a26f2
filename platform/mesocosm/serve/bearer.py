"""The bearer token of a world's HTTP ingress: from this machine's environment, or from a file that
only its owner reads.

It is read by the process that listens, where it listens. It goes into no config, log, runtime
environment or argument of Ray.
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
    """(token, where it is from, for people): `VARIABLE` of the environment, else `FILE`, which is
    made where there is none.

    Raises UsageError, which never repeats the token, where it is too short to be one, or others can
    read the file.
    """
    if VARIABLE in os.environ:
        return (
            _checked(
                os.environ[VARIABLE].encode("utf-8", "surrogateescape"),
                f"the environment variable {VARIABLE}",
            ),
            f"${VARIABLE}",
        )
    path = Path(FILE).expanduser()
    with contextlib.suppress(FileExistsError):
        _make(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise UsageError(
                    f"the token file {path} is not a plain file of this user; move it away, and a"
                    " new one is made"
                )
            if found.st_mode & 0o077:
                raise UsageError(
                    f"the token file {path} has mode {stat.S_IMODE(found.st_mode):04o}, with which"
                    f" others can use it; run `chmod 600 {path}`"
                )
            return _checked(file.read(4096).strip(), f"the token file {path}"), str(path)
    except OSError as error:
        raise UsageError(
            f"the token file {path} cannot be read ({error.strerror}); make it a plain file of"
            f" yours, or set {VARIABLE}"
        ) from error


def _checked(token: bytes, where: str) -> bytes:
    if len(token) < SHORTEST or not all(33 <= byte <= 126 for byte in token):
        raise UsageError(
            f"{where} must hold at least {SHORTEST} visible ASCII characters without spaces;"
            " `openssl rand -hex 32` prints some"
        )
    return token


def _make(path: Path) -> None:
    """Raises FileExistsError where there is one. It appears with its token in it: another process
    never reads half of it.
    """
    if path.is_symlink() or path.exists():
        raise FileExistsError(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(prefix=".world_token-", dir=path.parent)  # mode 0600
        try:
            with open(number, "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        raise UsageError(
            f"the token file {path} cannot be made ({error.strerror}); set {VARIABLE} instead"
        ) from error
