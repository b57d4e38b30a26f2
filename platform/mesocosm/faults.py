"""Errors of the disk, of the network, of S3 and of databases, as short English reasons.

`reason` explains the exceptions of other libraries; `StorageError` shows the text to the user.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

FULL = re.compile(
    "No space left on device"
    "|Disk quota exceeded"
    "|database or disk is full"
    r"|requested and \d+ written"  # numpy, which does not keep the errno
    "|PytorchStreamWriter failed"
)
NETWORK = ("botocore", "aiobotocore", "aiohttp")
CLIENTS = ("socket", "urllib", "requests")
"""Packages whose OSErrors concern a server, not a file."""
DATABASES = ("sqlite3", "sqlalchemy", "psycopg2", "MySQLdb", "pymysql")
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"


def reason(error: BaseException) -> str | None:
    """Explain an error of the disk, the network, S3 or a database, with its fix.

    Returns None for every other error.
    """
    links = list(_chain(error))
    if any(_is_full(link) for link in links):
        return "no space is left on the disk; free some space and run the same command again"
    for link in links:
        if (text := _of_s3(link)) is not None:
            return text
    for link in links:
        if type(link).__module__.split(".")[0] in DATABASES:
            return f"the database answers {first_line(link)!r}; look after the database"
    for link in links:
        if isinstance(link, OSError):
            return _of_server(link) if of_server(error) else _of_disk(link)
    return None


def of_server(error: BaseException) -> bool:
    """True if the error is of a connection to a server: its first OSError concerns no file."""
    link = next((link for link in _chain(error) if isinstance(link, OSError)), None)
    client = type(link).__module__.split(".")[0] in CLIENTS
    return client or isinstance(link, ConnectionError | TimeoutError)


def first_line(error: BaseException) -> str:
    """An error's first line, without the SQL statement and its parameters."""
    text = re.split(r"\n|\[SQL:", str(error).strip())[0].strip()
    text = re.sub(r"^\([\w.]+\) ", "", text)  # SQLAlchemy names its driver's class first
    return text[:200] or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        inner = getattr(link, "orig", None)  # SQLAlchemy's
        link = inner if isinstance(inner, BaseException) else link.__cause__


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return FULL.search(str(error)) is not None


def _of_s3(error: BaseException) -> str | None:
    if type(error).__module__.split(".")[0] not in NETWORK:
        return None
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        name = type(error).__name__
        if "Credentials" in name or name in ("ProfileNotFound", "TokenRetrievalError"):
            return f"{first_line(error)}; set AWS_PROFILE, or the key and secret of docs/storage.md"
        fix = "check AWS_ENDPOINT_URL and the network, and run the same command again"
        return f"S3 does not answer ({first_line(error)}); {fix}"
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    answer = response.get("Error", {})
    text = f"S3 answers {answer.get('Code') or status} ({answer.get('Message') or 'no message'})"
    if status in (401, 403):
        return f"{text}; check the credentials and their rights (docs/storage.md)"
    if re.search("trailer|checksum|chunked", text, re.I) or status == 501:
        return f"{text}; set {CHECKSUMS}=when_required, or use a store that has this feature"
    return f"{text}; check the address and the bucket, and run the same command again"


def _of_server(error: OSError) -> str:
    return f"{_text(error)}; check that the server runs and can be reached from here"


def _of_disk(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{_text(error)}; raise ulimit -n"
    where = f": {os.fspath(error.filename)!r}" if isinstance(error.filename, str) else ""
    return f"{_text(error)}{where}; check that the path exists and that you may use it"


def _text(error: OSError) -> str:
    return error.strerror if isinstance(error.strerror, str) else first_line(error)
